// Numbers as they are printed. A missing number is an en dash everywhere.

export const NONE = "–";
const GAP = "\u202f"; // narrow, and no place to break a line
const MINUS = "−";

const signed = (text: string) => text.replace("-", MINUS);

export function plain(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return signed(value.toExponential(1)).replace("e", "·e");
  return signed(size >= 1000 ? value.toFixed(0) : value.toPrecision(digits));
}

export function fixed(value: number | null | undefined, digits = 2): string {
  return value === null || value === undefined ? NONE : signed(value.toFixed(digits));
}

export function share(value: number | null | undefined): string {
  if (value === null || value === undefined) return NONE;
  const percent = value * 100;
  const size = Math.abs(percent);
  if (size === 0) return `0${GAP}%`;
  if (size < 0.001) return `<${GAP}0.001${GAP}%`;
  const digits = size >= 10 ? 1 : size >= 0.1 ? 2 : 3;
  return `${signed(percent.toFixed(digits))}${GAP}%`;
}

export function count(value: number | null | undefined): string {
  return value === null || value === undefined ? NONE : Math.round(value).toLocaleString("en").replaceAll(",", GAP);
}

export function metric(kind: string, value: number | null): string {
  if (kind === "share") return share(value);
  if (kind === "count") return count(value);
  return kind === "nats" ? fixed(value, 3) : plain(value);
}

const UP = ["⁰", "¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹"];

export function power(exponent: number): string {
  if (exponent === 0) return "1";
  const digits = [...String(Math.abs(exponent))].map((digit) => UP[Number(digit)]).join("");
  return `10${exponent < 0 ? "⁻" : ""}${digits}`;
}

export function figureName(figure: string): string {
  if (figure === "f1" || figure === "auc") return figure.toUpperCase();
  return figure.charAt(0).toUpperCase() + figure.slice(1).replaceAll("_", " ");
}
