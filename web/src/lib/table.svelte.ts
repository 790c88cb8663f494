// The list of latents: rows, search, sort. Its order is what "next" and "previous" walk through.

import { source } from "./source";
import type { LatentTable } from "./types";

export interface Row {
  id: number;
  rank: number;
  text: string | null;
  score: number | null;
  frequency: number | null;
  max: number | null;
  tokens: string[];
  paged: boolean;
  hay: string;
}

export type Column = "rank" | "id" | "text" | "score" | "frequency" | "max";
export type Show = "all" | "explained" | "alive";

export function rowsOf(table: LatentTable): Row[] {
  return table.ids.map((id, rank) => {
    const text = table.texts[rank] ?? null;
    const tokens = table.tokens[rank] ?? [];
    return {
      id,
      rank,
      text,
      score: table.scores[rank] ?? null,
      frequency: table.frequencies[rank] ?? null,
      max: table.maxima[rank] ?? null,
      tokens,
      paged: source.served || (table.chunks[rank] ?? -1) >= 0,
      hay: `${text ?? ""}\n${tokens.join("\n")}`.toLowerCase(),
    };
  });
}

/** Every word must occur in explanation or tokens; a number also finds the latent of that number. */
export function search(rows: Row[], query: string, show: Show): Row[] {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const number = /^#?(\d+)$/.exec(query.trim());
  const wanted = number ? Number(number[1]) : -1;
  const found = rows.filter((row) => {
    if (show === "explained" && row.text === null) return false;
    if (show === "alive" && !row.frequency) return false;
    return row.id === wanted || words.every((word) => row.hay.includes(word));
  });
  if (wanted < 0) return found;
  return [...found.filter((row) => row.id === wanted), ...found.filter((row) => row.id !== wanted)];
}

/** Missing values come last whichever way the column is sorted. */
export function sorted(rows: Row[], column: Column, down: boolean): Row[] {
  if (column === "rank") return rows;
  const sign = down ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [x, y] = [a[column], b[column]];
    if (x === null || y === null) return x === y ? a.rank - b.rank : x === null ? 1 : -1;
    const order = typeof x === "string" ? x.localeCompare(y as string) : x - (y as number);
    return order === 0 ? a.rank - b.rank : sign * order;
  });
}

export class Listing {
  rows = $state.raw<Row[]>([]);
  byId = $state.raw(new Map<number, Row>());
  scoreName = $state("");
  ready = $state(false);
  query = $state("");
  show = $state<Show>("all");
  column = $state<Column>("rank");
  down = $state(false);
  scroll = 0;
  current = $derived(sorted(search(this.rows, this.query, this.show), this.column, this.down));

  async load(): Promise<void> {
    if (this.ready) return;
    const table = await source.latents();
    if (this.ready) return;
    this.rows = rowsOf(table);
    this.byId = new Map(this.rows.map((row) => [row.id, row]));
    this.scoreName = table.score_name;
    this.ready = true;
  }

  sortBy(column: Column) {
    const descending = column === "score" || column === "frequency" || column === "max";
    if (this.column !== column) [this.column, this.down] = [column, descending];
    else if (this.down === descending) this.down = !this.down;
    else [this.column, this.down] = ["rank", false];
  }

  /** Neighbours of a latent in the list as it stands; in the whole list where it was filtered away. */
  around(id: number): { before: Row | null; after: Row | null; place: number; of: number } {
    const open = (list: Row[]) => list.filter((row) => row.paged);
    let list = open(this.current);
    let place = list.findIndex((row) => row.id === id);
    if (place < 0) {
      list = open(this.rows);
      place = list.findIndex((row) => row.id === id);
    }
    if (place < 0) return { before: null, after: null, place, of: list.length };
    return { before: list[place - 1] ?? null, after: list[place + 1] ?? null, place, of: list.length };
  }
}

export const listing = new Listing();
