// A browser for the tests: each line of stdin is a chain of Playwright's calls, beginning at the page, and is answered by a line.
//
//   NODE_PATH=examples/node_modules node browser.cjs <chromium>
//   [["getByRole", "button", {"name": "Stop"}], ["click"]]  ->  {"found": null}
//
// ["open", url, scale] begins with a page that knows nothing of the one before, in the same process of the browser where it can.
// The one rule: an error that a page did not catch fails the next call.
"use strict";

const { createInterface } = require("node:readline");
const { chromium } = require("playwright-core");

const args = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
args.push("--disable-component-update", "--disable-sync", "--no-proxy-server");
const tell = (found) => process.stdout.write(JSON.stringify(found) + "\n");

const viewport = { width: 736, height: 520 };
const pages = {};
let page, uncaught;

async function open(browser, url, scale) {
  uncaught = [];
  page = pages[scale] ??= await made(browser, scale);
  await page.goto("about:blank"); // ends what still streams, also where only the fragment is another
  await page.goto(url);
}

async function made(browser, scale) {
  const context = await browser.newContext({ viewport, deviceScaleFactor: scale, colorScheme: "light", reducedMotion: "reduce" });
  context.setDefaultTimeout(15_000);
  const page = await context.newPage();
  page.on("pageerror", (error) => uncaught.push(String(error)));
  return page;
}

async function run(browser, chain) {
  if (chain[0][0] === "open") return open(browser, ...chain[0].slice(1));
  let found = page;
  for (const [method, ...given] of chain) found = await found[method](...given);
  if (uncaught.length) throw new Error(uncaught.splice(0).join("; "));
  return typeof found === "object" && !Array.isArray(found) ? null : found;
}

(async () => {
  const browser = await chromium.launch({ executablePath: process.argv[2], args });
  for await (const line of createInterface({ input: process.stdin })) {
    await run(browser, JSON.parse(line)).then(
      (found) => tell({ found: found ?? null }),
      (error) => tell({ error: String(error) }),
    );
  }
  await browser.close();
})();
