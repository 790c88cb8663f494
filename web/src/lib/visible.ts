// Tokens with everything that hides made visible. Mirrors `unmix.metrics.windows.visible`.

export interface Piece {
  text: string;
  ghost: boolean;
}

const SPECIAL = /\n|\t| {2,}|[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

function mark(found: string): string {
  if (found === "\n") return "↵";
  if (found === "\t") return "⇥";
  if (found.startsWith(" ")) return "·".repeat(found.length);
  return `‹U+${found.codePointAt(0)!.toString(16).toUpperCase().padStart(4, "0")}›`;
}

/** The token cut into text and ghosts: newlines ↵, tabs ⇥, runs of spaces ···, other marks by code point. */
export function pieces(token: string): Piece[] {
  const found: Piece[] = [];
  let end = 0;
  for (const match of token.matchAll(SPECIAL)) {
    if (match.index > end) found.push({ text: token.slice(end, match.index), ghost: false });
    found.push({ text: mark(match[0]), ghost: true });
    end = match.index + match[0].length;
  }
  if (end < token.length || token === "") found.push({ text: token.slice(end) || "∅", ghost: token === "" });
  return found;
}

/** One string, for titles and lists: a leading space is shown as ␣, so that ` the` and `the` differ. */
export function shown(token: string): string {
  const text = pieces(token)
    .map((piece) => piece.text)
    .join("");
  return text.startsWith(" ") ? `␣${text.slice(1)}` : text;
}
