// Addresses live behind the #, which works from disk as well: #/latents?q=words, #/latent/123.

export interface Place {
  page: "overview" | "latents" | "latent" | "prompt" | "nowhere";
  id: number;
  query: URLSearchParams;
}

export function parse(hash: string): Place {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const place = { id: -1, query: new URLSearchParams(query) };
  if (path === "") return { page: "overview", ...place };
  if (path === "latents" || path === "prompt") return { page: path, ...place };
  const match = /^latent\/(\d{1,9})$/.exec(path);
  if (match) return { page: "latent", ...place, id: Number(match[1]) };
  return { page: "nowhere", ...place };
}

let place = $state.raw(parse(location.hash));
window.addEventListener("hashchange", () => (place = parse(location.hash)));

export const here = {
  get place() {
    return place;
  },
};

export const latentHref = (id: number) => `#/latent/${id}`;

export function go(href: string) {
  location.hash = href;
}
