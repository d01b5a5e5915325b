// A chat stream with nothing but fetch: `for await (const chunk of chat(url, body)) ...`. Browsers and Node 18+, no dependencies.
// Bytes become text, text becomes lines, lines become events, an event's data becomes a chunk; wherever the network cuts them.
// The one rule: only [DONE] is an end. An error chunk, broken JSON and a line that merely stops are raised.

/**
 * @typedef {{ prompt_tokens: number, completion_tokens: number, total_tokens: number }} Usage
 * @typedef {{ content?: string | null, reasoning_content?: string | null }} Delta
 * @typedef {{ id: string, model: string, choices: { index: number, delta: Delta, finish_reason: string | null }[],
 *   usage?: Usage | null, error?: { message: string, code?: string | null } }} Chunk
 */

/** The stream did not complete. status: of an answer that never was a stream, else 0. code: the gateway's word for it. */
export class StreamFailed extends Error {
  /** @param {string} message @param {{ status?: number, code?: string | null, cause?: unknown }} [more] */
  constructor(message, { status = 0, code = null, cause } = {}) {
    super(message, { cause });
    this.name = "StreamFailed";
    this.status = status;
    this.code = code;
  }
}

/**
 * The chunks of one chat completion. url: of `/v1/chat/completions`. Throws StreamFailed, and AbortError when `signal` aborts.
 * Leaving the loop closes the connection, and with it the provider's.
 *
 * @param {string} url @param {object} body @param {{ key?: string, signal?: AbortSignal }} [options]
 * @returns {AsyncGenerator<Chunk, void, void>}
 */
export async function* chat(url, body, { key, signal } = {}) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const sent = JSON.stringify({ ...body, stream: true });
  const response = await broken(fetch(url, { method: "POST", headers, body: sent, signal: signal ?? null }), signal);
  if (!response.ok) throw await refusal(response);
  for await (const data of events(/** @type {ReadableStream<Uint8Array>} */ (response.body), signal)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new StreamFailed(chunk.error.message, { code: chunk.error.code ?? null });
    yield chunk;
  }
  throw new StreamFailed("The stream ended before [DONE].", { code: "cut" });
}

/**
 * The data of each complete event of a body. What the body ends in the middle of is left out.
 *
 * @param {ReadableStream<Uint8Array>} body @param {AbortSignal} [signal] @returns {AsyncGenerator<string, void, void>}
 */
export async function* events(body, signal) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // keeps half a character, and drops a byte order mark
  const push = lineReader();
  try {
    for (;;) {
      const { value, done } = await broken(reader.read(), signal);
      if (done) return;
      yield* push(decoder.decode(value, { stream: true }));
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** A function from pieces of text to the events that they complete: https://html.spec.whatwg.org/#event-stream-interpretation */
export function lineReader() {
  let rest = "";
  let afterReturn = false;
  /** @type {string[]} */
  let data = [];
  /** @param {string} text @returns {string[]} */
  return (text) => {
    if (!text) return [];
    // A CR ends its line at once; should an LF follow in the next piece, it belongs to that CR.
    const lines = (rest + (afterReturn && text[0] === "\n" ? text.slice(1) : text)).split(/\r\n|\r|\n/);
    afterReturn = text.endsWith("\r");
    rest = lines.pop() ?? "";
    const found = [];
    for (const line of lines) {
      if (line === "") {
        if (data.length) found.push(data.join("\n"));
        data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        data.push(line.slice(5).replace(/^ /, ""));
      }
    }
    return found;
  };
}

/** @param {string} data @returns {Chunk} */
function parsed(data) {
  try {
    return JSON.parse(data);
  } catch (cause) {
    throw new StreamFailed("The stream has an event that is not JSON.", { code: "malformed", cause });
  }
}

/** @param {Response} response */
async function refusal(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return new StreamFailed(error.message, { status: response.status, code: error.code });
  } catch {
    return new StreamFailed(`The answer was ${response.status}: ${text.slice(0, 200)}`, { status: response.status });
  }
}

/**
 * What fetch and read throw for a line that cannot be had or breaks, as StreamFailed.
 *
 * @template T @param {Promise<T>} promise @param {AbortSignal} [signal] @returns {Promise<T>}
 */
async function broken(promise, signal) {
  try {
    return await promise;
  } catch (cause) {
    if (signal?.aborted) throw cause;
    throw new StreamFailed("The connection failed.", { code: "connection", cause });
  }
}
