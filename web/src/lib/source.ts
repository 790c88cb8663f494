// Where data come from: a server's JSON, or scripts beside a page that was opened from disk.

import type { LatentPage, LatentTable, Overview, PromptToken } from "./types";

export interface Source {
  served: boolean;
  overview(): Promise<Overview>;
  latents(): Promise<LatentTable>;
  page(id: number): Promise<LatentPage | null>;
  prompt(text: string): Promise<PromptToken[]>;
}

declare global {
  interface Window {
    __unmix?: Record<string, unknown>;
  }
}

const KEPT_PAGES = 64;

async function answer<T>(response: Response): Promise<T> {
  let body: unknown = null;
  try {
    body = await response.json();
  } catch {
    // A body that is no JSON is reported by its status below.
  }
  if (response.ok && body !== null) return body as T;
  const said = (body as { error?: unknown } | null)?.error;
  throw new Error(typeof said === "string" ? said : `The server answered ${response.status}.`);
}

async function ask<T>(path: string, init?: RequestInit): Promise<T> {
  let response: Response;
  try {
    response = await fetch(path, init);
  } catch {
    throw new Error("The server does not answer. Is `unmix view` still running?");
  }
  return answer<T>(response);
}

function servedSource(token: string): Source {
  return {
    served: true,
    overview: () => ask("api/run"),
    latents: () => ask("api/latents"),
    page: (id) => ask(`api/latent/${id}`),
    prompt: async (text) => {
      const found = await ask<{ tokens: PromptToken[] }>("api/prompt", {
        method: "POST",
        headers: { "content-type": "application/json", "x-unmix-token": token },
        body: JSON.stringify({ text }),
      });
      return found.tokens;
    },
  };
}

function script<T>(name: string, path: string): Promise<T> {
  const held = window.__unmix?.[name];
  if (held !== undefined) return Promise.resolve(held as T);
  return new Promise((resolve, reject) => {
    const missing = () => reject(new Error(`${path} is missing: this copy of the report is not whole.`));
    const element = document.createElement("script");
    element.src = path;
    element.onload = () => {
      const value = window.__unmix?.[name];
      element.remove();
      if (value === undefined) missing();
      else resolve(value as T);
    };
    element.onerror = missing;
    document.head.append(element);
  });
}

function staticSource(): Source {
  const latents = once(() => script<LatentTable>("latents", "data/latents.js"));
  return {
    served: false,
    overview: () => script("run", "data/run.js"),
    latents,
    page: async (id) => {
      const table = await latents();
      const chunk = table.chunks[table.ids.indexOf(id)];
      if (chunk === undefined) throw new Error(`There is no latent ${id}.`);
      if (chunk < 0) return null;
      const path = `data/pages-${String(chunk).padStart(4, "0")}.js`;
      const pages = await script<LatentPage[]>(`pages-${chunk}`, path);
      return pages.find((page) => page.id === id) ?? null;
    },
    prompt: () => Promise.reject(new Error("A report on disk has no language model.")),
  };
}

function once<T>(make: () => Promise<T>): () => Promise<T> {
  let held: Promise<T> | null = null;
  return () => {
    held ??= make().catch((error: unknown) => {
      held = null;
      throw error;
    });
    return held;
  };
}

function remembered(source: Source): Source {
  const pages = new Map<number, Promise<LatentPage | null>>();
  return {
    ...source,
    overview: once(source.overview),
    latents: once(source.latents),
    page: (id) => {
      const held = pages.get(id);
      if (held) return held;
      const asked = source.page(id);
      pages.set(id, asked);
      asked.catch(() => pages.delete(id));
      const oldest = pages.keys().next().value;
      if (pages.size > KEPT_PAGES && oldest !== undefined) pages.delete(oldest);
      return asked;
    },
  };
}

const meta = document.querySelector<HTMLMetaElement>('meta[name="unmix"]');
export const source = remembered(
  meta?.content === "served" ? servedSource(meta.dataset.token ?? "") : staticSource(),
);
