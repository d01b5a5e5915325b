// Two exchanges of one session with OpenAI's official SDK, as Super Agent Stack's users write them; what the SDK saw goes to stdout
// as lines of JSON.
//
//   node memory.cjs <base url> <scenario>
"use strict";

const { default: OpenAI } = require("openai");

const [, , baseURL, scenario] = process.argv;
const client = new OpenAI({
  baseURL,
  apiKey: "sk-own-provider-key",
  defaultHeaders: { superAgentKey: "sk-one-0123456789abcdef" },
  maxRetries: 0,
});
const sessionId = "2f0d7a3e-node";
const tell = (found) => process.stdout.write(JSON.stringify(found) + "\n");

async function say(model, content, options = {}, onText = () => {}) {
  const stream = await client.chat.completions.create(
    {
      model,
      messages: [{ role: "user", content }],
      stream: true,
      stream_options: { include_usage: true },
      sessionId,
      saveToMemory: true,
    },
    options,
  );
  const found = { text: "", finish: null, usage: null, last: null };
  for await (const chunk of stream) {
    found.text += chunk.choices[0]?.delta.content ?? "";
    found.finish = chunk.choices[0]?.finish_reason ?? found.finish;
    found.usage = chunk.usage ?? found.usage;
    found.last = { choices: chunk.choices.length, usage: chunk.usage ?? null };
    onText(chunk.choices[0]?.delta.content);
  }
  return found;
}

const scenarios = {
  async remember() {
    tell(await say("openai/m", "My name is Ada."));
    tell(await say("demo/inspect", "What is my name?"));
  },
  async cancel() {
    const controller = new AbortController();
    await say("openai/held", "A question that is given up.", { signal: controller.signal }, (text) => text && controller.abort());
    tell({ aborted: controller.signal.aborted });
    // The next question waits for a line, so that the test can look first.
    await new Promise((resolve) => process.stdin.once("data", resolve));
    process.stdin.destroy();
    tell(await say("demo/inspect", "What did I ask?"));
  },
};

scenarios[scenario]();
