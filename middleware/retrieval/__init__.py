"""Files that callers upload, and answers from them. The text side is in `text`, the joining of ranked lists in `fusion`."""
