// The page: a question, the answer as it comes, and stop. `?url=` and `?model=` choose whom it asks.
import { chat } from "./stream.mjs";

/** @param {string} id */
const at = (id) => /** @type {HTMLElement} */ (document.getElementById(id));
const asked = new URLSearchParams(location.search);
const [url, model, key] = [asked.get("url") ?? "/api/chat", asked.get("model") ?? "demo/echo", asked.get("key")];
let controller = new AbortController();

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  controller.abort();
  const { signal } = (controller = new AbortController());
  const content = /** @type {HTMLInputElement} */ (at("question")).value;
  at("answer").textContent = "";
  at("state").textContent = "reading";
  try {
    const body = { model, messages: [{ role: "user", content }], stream_options: { include_usage: true } };
    for await (const chunk of chat(url, body, { signal, ...(key && { key }) })) {
      at("answer").append(chunk.choices[0]?.delta.content ?? "");
      if (chunk.usage) at("state").textContent = `complete, ${chunk.usage.completion_tokens} tokens`;
    }
  } catch (error) {
    at("state").textContent = signal.aborted ? "stopped" : `failed: ${/** @type {Error} */ (error).message}`;
  }
});
at("stop").addEventListener("click", () => controller.abort());
