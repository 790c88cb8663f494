"""What the viewer shows, as plain JSON shapes. `web/src/lib/types.ts` says the same in TypeScript."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypedDict


class RunInfo(TypedDict):
    """The head of every page."""

    name: str
    model: str
    hook: str
    coder: str
    n_latents: int
    activation: str
    """For people: `top-k, k = 32`."""
    source: str
    """The text that was indexed, for people; empty where unknown."""
    tokens: int | None
    """Tokens indexed."""
    command: str
    """What serves this run: `unmix view runs/demo`."""
    version: str


class Metric(TypedDict):
    """One measured number with its 95 % interval, where there is one, and its meaning in plain words."""

    key: str
    label: str
    group: str
    help: str
    kind: str
    """`share` (shown as %), `nats`, `count` or `plain`."""
    value: float | None
    low: float | None
    high: float | None


class Histogram(TypedDict):
    """`counts[i]` things lie between `edges[i]` and `edges[i + 1]`."""

    edges: list[float]
    counts: list[int]
    outside: int
    """How many have no place on the axis (latents that never fired)."""


class ScoreDistribution(TypedDict):
    """Scores of one explainer's explanations, beside those of random explanations where they were scored."""

    explainer: str
    scorer: str
    figure: str
    histogram: Histogram
    mean: float | None
    baseline: list[int] | None
    """Counts of the random explanations in the same bins."""
    baseline_mean: float | None


class SummaryRow(TypedDict):
    """Mean of one figure over latents with its 95 % interval, and how many latents it covers."""

    explainer: str
    scorer: str
    figure: str
    mean: float | None
    low: float | None
    high: float | None
    done: int
    """Latents that have this figure."""
    asked: int
    """Latents that should have it."""
    baseline: bool
    """Random explanations: what chance gives."""


class LatentTable(TypedDict):
    """One column a list, row order = the most meaningful first."""

    ids: list[int]
    texts: list[str | None]
    scores: list[float | None]
    frequencies: list[float | None]
    maxima: list[float | None]
    tokens: list[list[str]]
    chunks: list[int]
    """Number of the `data/pages-N.js` that holds the latent's page; -1: none (a static report holds some only)."""
    explained: int
    """How many of the latents have an explanation."""
    score_name: str
    """What `scores` are, for people: `F1 (detection)`; empty where nothing was scored."""


class Score(TypedDict):
    """One score of one explanation."""

    scorer: str
    figure: str
    value: float | None
    low: float | None
    high: float | None


class Explanation(TypedDict):
    """What an explainer said of a latent. `text` is None where it failed, and `error` says how."""

    explainer: str
    text: str | None
    error: str | None
    scores: list[Score]


class TokenShare(TypedDict):
    """A token that a latent fires on."""

    token: str
    count: int
    mean: float | None


class TokenLogit(TypedDict):
    """How far the latent's decoder row pushes a token's logit."""

    token: str
    value: float | None


class TopLogits(TypedDict):
    """The tokens a latent promotes and those it suppresses, strongest first."""

    positive: list[TokenLogit]
    negative: list[TokenLogit]


class ShownWindow(TypedDict):
    """A window: `tokens` and `values` of one length; `peak` is the place of the strongest."""

    tokens: list[str]
    values: list[float | None]
    peak: int
    role: str
    document: int
    position: int
    tenth: int | None
    """Tenth of the latent's peaks it was drawn from, 0 weakest; None for the strongest windows."""


class LatentPage(TypedDict):
    """Everything on a latent's page."""

    id: int
    explanations: list[Explanation]
    frequency: float | None
    max: float | None
    mean: float | None
    histogram: Histogram | None
    tokens: list[TokenShare]
    logits: TopLogits | None
    top: list[ShownWindow]
    quantiles: list[ShownWindow]


class PromptToken(TypedDict):
    """One token of a prompt and its latents, strongest first: `(latent, activation)`."""

    token: str
    latents: list[tuple[int, float]]


class PromptReader(Protocol):
    """Runs the model over a text. Made by whoever serves a run: the viewer knows no language model."""

    def read(self, text: str) -> list[PromptToken]:
        """Tokens of `text` with their strongest latents. `UnmixError` for a text it cannot take."""
        ...


@dataclass(frozen=True)
class ReportData:
    """A run as the viewer sees it. Pages are made on demand: an index holds far more than one looks at."""

    run: RunInfo
    metrics: list[Metric]
    frequency: Histogram | None
    """Latents by log10 of their frequency."""
    scores: list[ScoreDistribution]
    summary: list[SummaryRow]
    latents: LatentTable
    page: Callable[[int], LatentPage]
    """`page(latent)`; safe to call from several threads."""
    paged: tuple[int, ...]
    """Latents whose pages a static report holds, in table order."""
