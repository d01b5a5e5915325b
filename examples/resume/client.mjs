// A chat stream that survives a broken line: `for await (const chunk of stream(url, body)) ...`. Node 18+ and browsers, no
// dependencies. Each event has a number; a line that breaks before [DONE] is followed up by GET /v1/streams/{id} behind the last
// number seen.

export class StreamFailed extends Error {}

// The chunks of one completion, each once. baseUrl: "http://host:port/v1". attempts: in a row, without a further event. pause:
// milliseconds before the second attempt, doubled for each further one. timeout: of the silence, in milliseconds, after which a
// line counts as broken. Throws StreamFailed.
export async function* stream(baseUrl, body, { key = "", attempts = 8, pause = 250, timeout = 60_000 } = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const sent = JSON.stringify({ ...body, stream: true, resume: true });
  let [url, options] = [`${baseUrl}/chat/completions`, { method: "POST", headers, body: sent }];
  let [last, failures, begun] = [0, 0, false];
  for (;;) {
    const before = last;
    const abort = new AbortController();
    let timer = setTimeout(() => abort.abort(), timeout);
    try {
      const response = await fetch(url, { ...options, signal: abort.signal });
      if (response.status === 204) return;
      if (!response.ok && (response.status < 500 || !begun))
        throw new StreamFailed(`${response.status}: ${await response.text()}`);
      if (response.ok) {
        if (!begun && !response.headers.has("X-Stream-Id"))
          throw new StreamFailed("the gateway has no middleware `resume`, or its server.cors.origins lacks this page's");
        if (!begun) url = `${baseUrl}/streams/${response.headers.get("X-Stream-Id")}`;
        begun = true;
        for await (const [number, data] of events(response.body)) {
          clearTimeout(timer); // what the caller takes is not the line's silence
          if (data === "[DONE]") return;
          const chunk = JSON.parse(data);
          // An error without a number is about this line, not about the stream.
          if (chunk.error && number) throw new StreamFailed(chunk.error.message);
          if (number > last) yield ((last = number), chunk);
          timer = setTimeout(() => abort.abort(), timeout);
        }
      }
    } catch (error) {
      if (error instanceof StreamFailed) throw error;
      if (!begun) throw new StreamFailed(`no answer: ${error.cause ?? error}`);
    } finally {
      clearTimeout(timer);
      abort.abort();
    }
    failures = last > before ? 1 : failures + 1;
    if (failures >= attempts) throw new StreamFailed(`the line broke ${failures} times in a row behind event ${last}`);
    await new Promise((resolve) => setTimeout(resolve, pause * 2 ** (failures - 1) * Math.random()));
    options = { headers: { ...headers, "Last-Event-ID": String(last) } };
  }
}

// [number, data] of each complete server-sent event; what the line broke off in the middle of is left out.
async function* events(body) {
  const [reader, decoder] = [body.getReader(), new TextDecoder()];
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      if (fields.data !== undefined) yield [Number(fields.id ?? 0), fields.data];
    }
  }
}
