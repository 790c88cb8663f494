// How windows are laid out; kept while one walks from latent to latent.

export type Mode = "aligned" | "flowing" | "lines";

const narrow = window.matchMedia("(max-width: 900px)").matches;

class Reading {
  mode = $state<Mode>(narrow ? "flowing" : "aligned");
}

export const reading = new Reading();
