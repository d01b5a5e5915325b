// One build for all examples with a page: every folder's index.html goes to dist/pages, the server of serve.ts to dist/server.
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { defineConfig } from "vite";

const here = import.meta.dirname;
const pages = readdirSync(here)
  .filter((name) => name !== "dist" && name !== "node_modules")
  .map((name) => join(here, name, "index.html"))
  .filter(existsSync);

export default defineConfig(({ isSsrBuild }) => ({
  root: here,
  build: isSsrBuild ? { outDir: "dist/server", target: "node20" } : { outDir: "dist/pages", rollupOptions: { input: pages } },
}));
