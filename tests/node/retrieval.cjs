// A file from its upload to an answer with its passages, with OpenAI's official SDK; what it saw goes to stdout as one line of JSON.
//
//   node retrieval.cjs <base url> <path of a PDF> <question>
//
// The one rule: nothing is caught but the SDK's own errors, so that a surprise is a failed exit and a stack on stderr.
"use strict";

const fs = require("fs");
const { default: OpenAI, NotFoundError } = require("openai");

const [, , baseURL, path, question] = process.argv;
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });

async function main() {
  const sent = await client.files.create({ file: fs.createReadStream(path), purpose: "assistants" });
  const again = await client.files.create({ file: fs.createReadStream(path), purpose: "assistants" });
  const file = await client.files.waitForProcessing(sent.id, { pollInterval: 20, maxWait: 15000 });
  const names = [];
  for await (const each of client.files.list({ limit: 1 })) names.push(each.filename);
  const content = Buffer.from(await (await client.files.content(sent.id)).arrayBuffer());

  const found = { text: "", sources: null, lastHasThem: false };
  const messages = [{ role: "user", content: question }];
  for await (const chunk of await client.chat.completions.create({ model: "demo/inspect", messages, stream: true, useRAG: true })) {
    found.text += chunk.choices[0]?.delta.content ?? "";
    found.sources = chunk.penstock?.sources ?? found.sources;
    found.lastHasThem = Boolean(chunk.choices[0]?.finish_reason && chunk.penstock?.sources);
  }
  const whole = await client.chat.completions.create({ model: "demo/inspect", messages, useRAG: true });

  const deleted = await client.files.delete(sent.id);
  let gone = null;
  try {
    await client.files.retrieve(sent.id);
  } catch (error) {
    if (!(error instanceof NotFoundError)) throw error;
    gone = error.code;
  }
  const same = { again: again.id === sent.id, content: content.equals(fs.readFileSync(path)), whole: whole.penstock.sources };
  process.stdout.write(JSON.stringify({ file, names, ...found, ...same, deleted, gone }) + "\n");
}

main();
