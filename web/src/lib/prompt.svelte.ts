// The prompt page's text and answer; kept while one follows a latent and comes back.

import { source } from "./source";
import type { PromptToken } from "./types";

const LISTED = 24;

class Prompting {
  text = $state("");
  tokens = $state.raw<PromptToken[]>([]);
  at = $state(-1);
  latent = $state(-1);
  busy = $state(false);
  failure = $state("");

  /** Each latent's strongest activation in the text. */
  strongest = $derived.by(() => {
    const best = new Map<number, number>();
    for (const token of this.tokens)
      for (const [id, value] of token.latents)
        if (value !== null && Math.abs(value) > Math.abs(best.get(id) ?? 0)) best.set(id, value);
    const found: [number, number][] = [...best];
    return found.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, LISTED);
  });

  async read() {
    if (this.busy || this.text.trim() === "") return;
    this.busy = true;
    this.failure = "";
    try {
      this.tokens = await source.prompt(this.text);
      this.at = -1;
      this.latent = this.strongest[0]?.[0] ?? -1;
    } catch (error) {
      this.failure = (error as Error).message;
    } finally {
      this.busy = false;
    }
  }
}

export const prompting = new Prompting();
