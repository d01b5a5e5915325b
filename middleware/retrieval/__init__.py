"""Files that callers upload, and answers from them.

`layer` is the middleware; the text side is in `text`, the joining of ranked lists in `fusion`. The one rule: this module imports
nothing, because the process that reads files, started for each of them, imports it too.
"""
