// Every split of the bytes gives the same events, and no end but [DONE] passes for one: node --test
import assert from "node:assert/strict";
import { test } from "node:test";
import { chat, events, lineReader } from "./stream.mjs";

const bytes = (text) => new TextEncoder().encode(text);
const body = (...pieces) =>
  new ReadableStream({
    start(controller) {
      for (const piece of pieces) controller.enqueue(typeof piece === "string" ? bytes(piece) : piece);
      controller.close();
    },
  });

async function all(stream) {
  const found = [];
  for await (const one of stream) found.push(one);
  return found;
}

// Comments, fields of no interest, data without a blank, in many lines and without any, characters of one to four bytes.
const text = [
  ": ping", "", "data: Grüße €", "id: 7", "", "event: x", "data:two", "data", "data:  lines", "", "retry: 5", "",
  "data: 🌊\u2028", "", "database: no", ":", "", "data: [DONE]", "", "data: half",
].join("\n");
const expected = ["Grüße €", "two\n\n lines", "🌊\u2028", "[DONE]"];

for (const [name, ending] of [["LF", "\n"], ["CR", "\r"], ["CRLF", "\r\n"]]) {
  const raw = bytes("\ufeff" + text.replaceAll("\n", ending));

  test(`${name}: every cut, with a second one behind it`, async () => {
    for (let one = 0; one <= raw.length; one++)
      for (let two = one; two <= raw.length; two += 7) {
        const pieces = [raw.subarray(0, one), raw.subarray(one, two), raw.subarray(two)];
        assert.deepEqual(await all(events(body(...pieces))), expected, `cut at ${one} and ${two}`);
      }
  });

  test(`${name}: byte by byte`, async () => {
    assert.deepEqual(await all(events(body(...[...raw].map((byte) => Uint8Array.of(byte))))), expected);
  });
}

test("an event is out as soon as its blank line is, also where that ends in CR", () => {
  const push = lineReader();
  assert.deepEqual(push("data: a\r\n\r"), ["a"]);
  assert.deepEqual(push("\ndata: b\r"), []);
  assert.deepEqual(push("\r"), ["b"]);
  assert.deepEqual(push("\n"), []);
  assert.deepEqual(push("\n"), [], "a blank line without data is no event");
});

const chunk = (content) => `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content } }] })}\n\n`;
const answering = (t, response) => t.mock.method(globalThis, "fetch", async () => response);
const read = async (found) => {
  for await (const { choices } of chat("http://gateway/v1/chat/completions", {})) found.push(choices[0].delta.content);
};

test("[DONE] is the end, whatever follows", async (t) => {
  answering(t, new Response(body(chunk("a"), chunk("b"), "data: [DONE]\n\n", chunk("c"))));
  const found = [];
  await read(found);
  assert.deepEqual(found, ["a", "b"]);
});

const failures = [
  ["a stream that stops", body(chunk("a")), { code: "cut" }],
  ["a stream that stops in an event", body(chunk("a"), chunk("b").slice(0, -1)), { code: "cut" }],
  ["[DONE] without its blank line", body(chunk("a"), "data: [DONE]\n"), { code: "cut" }],
  ["an error chunk", body(chunk("a"), 'data: {"error":{"message":"broke","code":"x"},"choices":[]}\n\n'), { message: "broke" }],
  ["an event that is no JSON", body(chunk("a"), "data: {\n\n"), { code: "malformed" }],
];
for (const [name, stream, wanted] of failures)
  test(`${name} is raised, behind what came before`, async (t) => {
    answering(t, new Response(stream));
    const found = [];
    await assert.rejects(read(found), { name: "StreamFailed", status: 0, ...wanted });
    assert.deepEqual(found, ["a"]);
  });

test("a refusal is raised with its status, in the envelope or not", async (t) => {
  answering(t, Response.json({ error: { message: "too fast", code: "rate_limited" } }, { status: 429 }));
  await assert.rejects(read([]), { name: "StreamFailed", status: 429, message: "too fast", code: "rate_limited" });
  t.mock.restoreAll();
  answering(t, new Response("<html>", { status: 502 }));
  await assert.rejects(read([]), { status: 502, message: "The answer was 502: <html>" });
});

test("a line that cannot be had, and one that breaks, are raised; an abort stays an abort", async (t) => {
  t.mock.method(globalThis, "fetch", () => Promise.reject(new TypeError("refused")));
  await assert.rejects(read([]), { name: "StreamFailed", code: "connection" });
  t.mock.restoreAll();
  const torn = new ReadableStream({ pull: (controller) => controller.error(new TypeError("reset")) });
  answering(t, new Response(torn));
  await assert.rejects(read([]), { name: "StreamFailed", code: "connection" });
  t.mock.restoreAll();
  t.mock.method(globalThis, "fetch", async (_, { signal }) => signal.throwIfAborted());
  const aborted = chat("http://gateway", {}, { signal: AbortSignal.abort() });
  await assert.rejects(aborted.next(), { name: "AbortError" });
});

test("leaving the loop closes the connection", async (t) => {
  const cancel = t.mock.fn();
  answering(t, new Response(new ReadableStream({ start: (controller) => controller.enqueue(bytes(chunk("a"))), cancel })));
  for await (const _ of chat("http://gateway", {})) break;
  assert.equal(cancel.mock.callCount(), 1);
});

test("the request asks for a stream, with the key", async (t) => {
  const fetched = answering(t, new Response(body("data: [DONE]\n\n")));
  await all(chat("http://gateway", { model: "m" }, { key: "k" }));
  const [url, { method, headers, body: sent }] = fetched.mock.calls[0].arguments;
  assert.deepEqual([url, method, JSON.parse(sent)], ["http://gateway", "POST", { model: "m", stream: true }]);
  assert.deepEqual(headers, { "Content-Type": "application/json", Authorization: "Bearer k" });
});
