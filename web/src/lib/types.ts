// The wire shapes of `unmix.viewer.shapes`.

export interface RunInfo {
  name: string;
  model: string;
  hook: string;
  coder: string;
  n_latents: number;
  activation: string;
  source: string;
  tokens: number | null;
  command: string;
  version: string;
}

export interface Metric {
  key: string;
  label: string;
  group: string;
  help: string;
  kind: "share" | "nats" | "count" | "plain";
  value: number | null;
  low: number | null;
  high: number | null;
}

export interface HistogramData {
  edges: number[];
  counts: number[];
  outside: number;
}

export interface ScoreDistribution {
  explainer: string;
  scorer: string;
  figure: string;
  histogram: HistogramData;
  mean: number | null;
  baseline: number[] | null;
  baseline_mean: number | null;
}

export interface SummaryRow {
  explainer: string;
  scorer: string;
  figure: string;
  mean: number | null;
  low: number | null;
  high: number | null;
  done: number;
  asked: number;
  baseline: boolean;
}

export interface FirstRow {
  id: number;
  text: string | null;
  score: number | null;
  tokens: string[];
}

export interface Overview {
  run: RunInfo;
  metrics: Metric[];
  frequency: HistogramData | null;
  scores: ScoreDistribution[];
  summary: SummaryRow[];
  first: FirstRow[];
  explained: number;
  score_name: string;
  prompt?: boolean;
}

export interface LatentTable {
  ids: number[];
  texts: (string | null)[];
  scores: (number | null)[];
  frequencies: (number | null)[];
  maxima: (number | null)[];
  tokens: string[][];
  chunks: number[];
  explained: number;
  score_name: string;
}

export interface Score {
  scorer: string;
  figure: string;
  value: number | null;
  low: number | null;
  high: number | null;
}

export interface Explanation {
  explainer: string;
  text: string | null;
  error: string | null;
  scores: Score[];
}

export interface TokenShare {
  token: string;
  count: number;
  mean: number | null;
}

export interface TokenLogit {
  token: string;
  value: number | null;
}

export interface WindowData {
  tokens: string[];
  values: (number | null)[];
  peak: number;
  role: string;
  document: number;
  position: number;
  tenth: number | null;
}

export interface LatentPage {
  id: number;
  explanations: Explanation[];
  frequency: number | null;
  max: number | null;
  mean: number | null;
  histogram: HistogramData | null;
  tokens: TokenShare[];
  logits: { positive: TokenLogit[]; negative: TokenLogit[] } | null;
  top: WindowData[];
  quantiles: WindowData[];
}

export interface PromptToken {
  token: string;
  latents: [number, number | null][];
}
