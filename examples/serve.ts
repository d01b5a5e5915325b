// What serves the examples' pages, and runs their routes as a framework would: a Request in, a Response out. `npm start`.
// The routes know nothing of Node: what a server of one's own has to do for them is `answer`, and no more.
// The one rule: whoever closes the page aborts the route's request, and so the gateway's, and so the provider's.
import { readFile, readdir } from "node:fs/promises";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";

type Route = (request: Request) => Promise<Response>;

const routes: Record<string, () => Promise<{ POST: Route }>> = {
  "/api/chat": () => import("./next-route/app/api/chat/route.ts"),
  "/api/ai-sdk": () => import("./ai-sdk-chat/route.ts"),
  "/api/background": () => import("./eventsource/route.ts"),
};
const types: Record<string, string> = { ".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css" };
const folder = join(import.meta.dirname, "..", "pages");
// Node forgets to abort the signal of a Request that nobody holds any more, and a route may keep no more of it than the signal.
const running = new Set<Request>();
const files = new Set((await readdir(folder, { recursive: true })).filter(extname).map((name) => `/${name}`));

async function answer(route: Route, asked: IncomingMessage, response: ServerResponse): Promise<void> {
  const gone = new AbortController();
  response.once("close", () => gone.abort());
  const parts: Buffer[] = [];
  for await (const part of asked) parts.push(part);
  const headers = new Headers(Object.entries(asked.headers).map(([name, value]) => [name, String(value)] as [string, string]));
  const url = new URL(asked.url ?? "/", `http://${asked.headers.host}`);
  const request = new Request(url, { method: "POST", headers, body: Buffer.concat(parts), signal: gone.signal });
  running.add(request);
  response.once("close", () => running.delete(request));
  const found = await route(request);
  response.writeHead(found.status, Object.fromEntries(found.headers));
  if (found.body) await pipeline(Readable.fromWeb(found.body as Parameters<typeof Readable.fromWeb>[0]), response);
  else response.end();
}

async function page(path: string, response: ServerResponse): Promise<void> {
  const name = path.endsWith("/") ? `${path}index.html` : path;
  if (!files.has(name)) {
    const there = [...files].filter((file) => file.endsWith("/index.html")).map((file) => file.slice(0, -"index.html".length));
    return void response.writeHead(404).end(`Not found. There are: ${there.join(" ")}\n`);
  }
  const text = await readFile(join(folder, name));
  response.writeHead(200, { "Content-Type": types[extname(name)] ?? "application/octet-stream" }).end(text);
}

const server = createServer(async (asked, response) => {
  try {
    const path = new URL(asked.url ?? "/", "http://localhost").pathname;
    const load = asked.method === "POST" ? routes[path] : undefined;
    await (load ? answer((await load()).POST, asked, response) : page(path, response));
  } catch (error) {
    if (!response.closed) console.error(error);
    // A stream that broke must not end as if it were whole: the connection is cut.
    if (response.headersSent) response.destroy();
    else response.writeHead(500).end();
  }
});
server.listen(Number(process.env.PORT ?? 5173), "127.0.0.1", () => {
  console.log(`http://localhost:${(server.address() as AddressInfo).port}/react-chat/`);
});
