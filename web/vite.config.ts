import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

// One classic script and one style sheet: a page opened from disk may not load modules.
export default defineConfig({
  plugins: [svelte({ compilerOptions: { runes: true } })],
  publicDir: false,
  build: {
    outDir: process.env.UNMIX_VIEWER_OUT ?? "../src/unmix/viewer/static",
    emptyOutDir: true,
    target: "es2022",
    cssMinify: true,
    lib: {
      entry: "src/main.ts",
      name: "unmixViewer",
      formats: ["iife"],
      fileName: () => "unmix.js",
      cssFileName: "unmix",
    },
  },
});
