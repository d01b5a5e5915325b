// The official SDK against the gateway: a stream with its usage, a cancelled one, and errors. node chat.mjs [base url]
import OpenAI, { APIError, APIUserAbortError, RateLimitError } from "openai";

const baseURL = process.argv[2] ?? "http://127.0.0.1:8080/v1";
// The gateway retries and falls back; a client that retried as well would multiply that.
const client = new OpenAI({ baseURL, apiKey: process.env.PENSTOCK_KEY ?? "any", maxRetries: 0 });
const messages = [{ role: "user", content: "What is a penstock?" }];
const print = (text) => process.stdout.write(text);

async function streamed() {
  const asked = { model: "demo/echo", messages, stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create(asked)) {
    print(chunk.choices[0]?.delta.content ?? ""); // the last chunk has usage and no choices
    if (chunk.usage) print(`\n${chunk.usage.prompt_tokens} tokens in, ${chunk.usage.completion_tokens} out\n`);
  }
}

// Whoever stops reading stops paying: the abort closes the line, and the gateway closes the provider's.
async function cancelled() {
  const controller = new AbortController();
  const { signal } = controller;
  const stream = await client.chat.completions.create({ model: "demo/slow", messages, stream: true }, { signal });
  let words = 0;
  for await (const chunk of stream) {
    print(chunk.choices[0]?.delta.content ?? "");
    if (++words === 2) controller.abort();
  }
  print(` … cancelled after ${words} words\n`);
}

// Before the first word an error is a status, and has a class of the SDK's; in mid-stream it is an APIError without one.
async function failing(model) {
  try {
    for await (const chunk of await client.chat.completions.create({ model, messages, stream: true }))
      print(chunk.choices[0]?.delta.content ?? "");
  } catch (error) {
    if (error instanceof APIUserAbortError || !(error instanceof APIError)) throw error;
    if (error instanceof RateLimitError) print(`too many requests, try again in ${error.headers.get("retry-after")} s\n`);
    else if (error.status === undefined) print(` … broke off: ${error.message}\n`);
    else print(`refused with ${error.status}: ${error.message}\n`);
  }
}

await streamed();
await cancelled();
for (const model of ["demo/fail-429", "demo/fail-500", "demo/fail-midstream", "demo/cut"]) await failing(model);
