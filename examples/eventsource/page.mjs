// The page: asks its own server to begin (route.ts), then follows. The URL is kept in the page's own, so that a reload goes on.
import { follow } from "./follow.mjs";

/** @param {string} id */
const at = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/** @param {string} url */
function read(url) {
  at("answer").textContent = "";
  at("state").textContent = "reading";
  follow(url, {
    text(more) {
      at("answer").append(more);
      at("state").textContent = "reading";
    },
    end: () => (at("state").textContent = "complete"),
    fail: (message) => (at("state").textContent = message),
    cut: () => (at("state").textContent = "line cut, coming back"),
  });
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const model = new URLSearchParams(location.search).get("model") ?? undefined;
  const content = /** @type {HTMLInputElement} */ (at("question")).value;
  const body = JSON.stringify({ model, messages: [{ role: "user", content }] });
  const answer = await (await fetch("/api/background", { method: "POST", body })).json();
  if (!answer.url) return (at("state").textContent = answer.error.message);
  location.hash = encodeURIComponent(answer.url);
  read(answer.url);
});

if (location.hash) read(decodeURIComponent(location.hash.slice(1)));
