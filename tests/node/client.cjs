// One scenario with OpenAI's official SDK, as its users write it; what it saw goes to stdout as one line of JSON.
//
//   node client.cjs <base url> <scenario> <model>
//
// The one rule: nothing is caught but the SDK's own errors, so that a surprise is a failed exit and a stack on stderr.
"use strict";

const { default: OpenAI, APIError, BadRequestError, NotFoundError, RateLimitError, InternalServerError } = require("openai");

const [, , baseURL, scenario, model] = process.argv;
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const tell = (found) => process.stdout.write(JSON.stringify(found) + "\n");

// The most special class that an error is of.
const classes = { BadRequestError, NotFoundError, RateLimitError, InternalServerError, APIError };
const named = (error) => Object.keys(classes).find((name) => error instanceof classes[name]);

async function failing(run) {
  try {
    await run();
  } catch (error) {
    if (!(error instanceof APIError)) throw error;
    return { error: named(error), status: error.status ?? null, code: error.code ?? null, param: error.param ?? null };
  }
  throw new Error("this should have failed");
}

const scenarios = {
  async stream() {
    const found = { text: "", finish: null, usage: null };
    const stream = await client.chat.completions.create({ model, messages, stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) {
      found.text += chunk.choices[0]?.delta.content ?? "";
      found.finish = chunk.choices[0]?.finish_reason ?? found.finish;
      found.usage = chunk.usage ?? found.usage;
    }
    return found;
  },
  async tools() {
    // The SDK's own accumulator refuses deltas that are not as OpenAI sends them.
    const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
    const tools = [{ type: "function", function: { name: "weather", parameters } }];
    const completion = await client.chat.completions.stream({ model, messages, tools }).finalChatCompletion();
    const [choice] = completion.choices;
    return { finish: choice.finish_reason, calls: choice.message.tool_calls.map((call) => call.function) };
  },
  async whole() {
    const completion = await client.chat.completions.create({ model, messages });
    return { text: completion.choices[0].message.content, finish: completion.choices[0].finish_reason };
  },
  async error() {
    return failing(() => client.chat.completions.create({ model, messages, stream: true }));
  },
  async midstream() {
    let text = "";
    const found = await failing(async () => {
      for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
        text += chunk.choices[0]?.delta.content ?? "";
      }
    });
    return { ...found, text };
  },
  async abort() {
    const controller = new AbortController();
    const stream = await client.chat.completions.create({ model, messages, stream: true }, { signal: controller.signal });
    for await (const chunk of stream) {
      if (chunk.choices[0]?.delta.content) {
        tell({ first: chunk.choices[0].delta.content });
        controller.abort();
      }
    }
    // The process stays until it is told, so that its end is not what closes the connection.
    await new Promise((resolve) => process.stdin.once("end", resolve).resume());
    return { aborted: stream.controller.signal.aborted };
  },
};

scenarios[scenario]().then(tell);
