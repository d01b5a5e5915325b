// Follows a stream that runs in the background, with nothing but the browser's EventSource, which comes back by itself when its
// line is cut, behind the last event that it has seen. `stop = follow(url, { text, end, fail, cut })`.
// The one rule: an error with a number of its own is about the stream, and final; one without is about this line, and passes.

/**
 * text: more of it has come. end: that was all. fail: the stream broke, or is not there (any more). cut: the line was lost, the
 * browser comes back within seconds.
 *
 * @param {string} url
 * @param {{ text: (more: string) => void, end: () => void, fail: (message: string) => void, cut?: () => void }} on
 * @returns {() => void} stop reading; the stream itself goes on for the gateway's `grace`
 */
export function follow(url, { text, end, fail, cut = () => {} }) {
  const source = new EventSource(url);
  let last = "";
  source.onmessage = ({ data, lastEventId }) => {
    const numbered = lastEventId !== last;
    last = lastEventId;
    if (data === "[DONE]") {
      source.close();
      return end();
    }
    const chunk = JSON.parse(data);
    if (!chunk.error) return text(chunk.choices[0]?.delta.content ?? "");
    if (!numbered) return; // the line ends behind it, and onerror follows
    source.close();
    fail(chunk.error.message);
  };
  source.onerror = () => {
    // CLOSED: the answer was no stream (404: unknown or forgotten; 410: too far behind), and the browser gives up.
    if (source.readyState === EventSource.CLOSED) fail("The stream cannot be had any more.");
    else cut();
  };
  return () => source.close();
}
