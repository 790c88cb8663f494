"""Everything the viewer shows of a run, gathered from index, evaluation and explanations.

What is missing is shown as missing: a run that was only indexed has a viewer too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from unmix._version import __version__
from unmix.core.errors import ConfigError
from unmix.index.reader import CoderIndex, LatentIndex
from unmix.viewer.glossary import metrics_of
from unmix.viewer.pages import LogitSource, PageMaker
from unmix.viewer.scores import (
    ExplanationRow,
    distributions,
    explanations_by_latent,
    headline,
    score_name,
    score_of,
    summarise,
    summary_rows,
)
from unmix.viewer.shapes import Explanation, Histogram, LatentTable, ReportData, RunInfo
from unmix.viewer.wire import number

PAGES = 500
"""Latents with a page in a static report where nothing else is asked for: some 5 MB."""
DENSE = 0.1
"""Above this frequency a latent is listed after the others: it is rarely nameable."""
TABLE_TOKENS = 5


@dataclass(frozen=True)
class RunFacts:
    """What the index does not know about its run; every field may stay empty."""

    name: str
    model: str = ""
    hook: str = ""
    activation: str = ""
    """For people: `top-k, k = 32`."""
    source: str = ""
    """The text that was indexed."""
    folder: str = ""
    """The run folder, as the user would type it."""


def collect(
    index: LatentIndex,
    coder_name: str,
    facts: RunFacts,
    *,
    evaluation: Mapping[str, Any] | None = None,
    explanations: Iterable[ExplanationRow] = (),
    summary: Iterable[Mapping[str, Any]] | None = None,
    logits: LogitSource | None = None,
    order: Sequence[int] = (),
    n_latents: int = PAGES,
    windows: int = 24,
    context: tuple[int, int] = (20, 8),
) -> ReportData:
    """Gather a run's `ReportData`; costs one pass over the stored figures, windows are read page by page.

    Args:
        evaluation: what `evaluate` measured: metric → number or `{"value", "low", "high"}`.
        explanations: rows of the ledger (`ExplanationRow`); random ones feed the baselines only.
        summary: means over latents that were computed elsewhere; by default they are computed from the rows.
        logits: gives the tokens that a latent promotes and suppresses.
        order: latents that the table starts with, in this order; the others follow as `latent_table` ranks them.
        n_latents: how many latents get a page in a static report: the most meaningful, explained ones in any case.
        windows: windows on a page.
        context: tokens before and after a window's peak.

    Raises:
        ConfigError: the index has no such coder, or a row names a latent that the coder does not have.
    """
    coder = index.coder(coder_name)
    rows = list(explanations)
    for row in rows:
        if not 0 <= row["latent"] < coder.n_latents:
            raise ConfigError(
                f"explanations name latent {row['latent']}; {coder_name!r} has latents 0 to {coder.n_latents - 1}"
            )
    by_latent = explanations_by_latent(rows)
    table = latent_table(coder, index, by_latent, order)
    measured = cast("Mapping[str, Any]", (evaluation or {}).get("metrics", evaluation or {}))
    explained = set(by_latent)
    return ReportData(
        run=_run_info(index, coder, facts),
        metrics=metrics_of(measured),
        frequency=frequency_histogram(evaluation or {}, coder.frequency),
        scores=distributions(rows),
        summary=summarise(rows) if summary is None else summary_rows(summary),
        latents=table,
        page=PageMaker(coder, by_latent, logits, windows, context),
        paged=tuple(i for rank, i in enumerate(table["ids"]) if rank < n_latents or i in explained),
    )


def _run_info(index: LatentIndex, coder: CoderIndex, facts: RunFacts) -> RunInfo:
    return {
        "name": facts.name,
        "model": facts.model,
        "hook": facts.hook,
        "coder": coder.name,
        "n_latents": coder.n_latents,
        "activation": facts.activation,
        "source": facts.source,
        "tokens": int(index.n_tokens),
        "command": f"unmix view {facts.folder or 'RUN'}",
        "version": __version__,
    }


def latent_table(
    coder: CoderIndex, index: LatentIndex, by_latent: Mapping[int, list[Explanation]], first: Sequence[int] = ()
) -> LatentTable:
    """All latents: those of `first`, then the most meaningful: scored (best first), explained, alive, dense, silent."""
    wanted = headline(one for found in by_latent.values() for one in found)
    best = {latent: _best(found, wanted) for latent, found in by_latent.items()}
    frequency = np.asarray(coder.frequency, np.float64)
    given = dict.fromkeys(first)
    rest = (i for i in range(coder.n_latents) if i not in given)
    order = [*given, *sorted(rest, key=lambda i: _rank(i, best.get(i), float(frequency[i])))]
    tokens = _table_tokens(coder, index)
    return {
        "ids": order,
        "texts": [best[i][0] if i in best else None for i in order],
        "scores": [best[i][1] if i in best else None for i in order],
        "frequencies": [number(frequency[i]) for i in order],
        "maxima": [number(coder.max[i]) for i in order],
        "tokens": [tokens[i] for i in order],
        "chunks": [-1] * coder.n_latents,
        "explained": sum(text is not None for text, _ in best.values()),
        "score_name": score_name(wanted),
    }


def _best(found: Sequence[Explanation], wanted: tuple[str, str] | None) -> tuple[str | None, float | None]:
    """Text and score of the best explanation; one without a score counts less than any that has one."""

    def worth(one: Explanation) -> tuple[bool, bool, float]:
        score = score_of(one, wanted)
        return one["text"] is not None, score is not None, score or 0.0

    chosen = max(found, key=worth)
    return chosen["text"], score_of(chosen, wanted)


def _rank(latent: int, best: tuple[str | None, float | None] | None, frequency: float) -> tuple[float, float, int]:
    text, score = best or (None, None)
    if score is not None:
        return 0, -score, latent
    if text is not None:
        return 1, -frequency, latent
    if frequency == 0:
        return 4, 0, latent
    return (3 if frequency > DENSE else 2), -frequency, latent


def _table_tokens(coder: CoderIndex, index: LatentIndex) -> list[list[str]]:
    """A few top tokens of every latent, in one go: ten thousand `Latent`s would cost seconds."""
    rows: list[list[int]] = np.asarray(coder.figures.top_token_ids)[:, :TABLE_TOKENS].tolist()
    distinct = sorted({token for row in rows for token in row if token >= 0})
    shown = index.token_strings(distinct)
    strings = dict(zip(distinct, shown if shown is not None else [f"<{i}>" for i in distinct], strict=True))
    return [[strings[token] for token in row if token >= 0] for row in rows]


def frequency_histogram(evaluation: Mapping[str, Any], frequency: Float[np.ndarray, " latents"]) -> Histogram | None:
    """Latents by log10 frequency: as measured on held-out text where `evaluation` has it, else from the index."""
    stored = evaluation.get("frequency_histogram")
    if isinstance(stored, Mapping):
        found = cast("Mapping[str, Any]", stored)
        edges = found.get("log10_edges", found.get("edges"))
        counts = found.get("latents", found.get("counts"))
        if edges is not None and counts is not None and len(edges) == len(counts) + 1:
            return {
                "edges": [float(edge) for edge in edges],
                "counts": [int(count) for count in counts],
                "outside": int(found.get("never", 0)),
            }
    if not len(frequency):
        return None
    alive = frequency > 0
    logs = np.log10(frequency[alive], dtype=np.float64)
    edges = np.linspace(min(-6.0, float(np.floor(logs.min()))) if len(logs) else -6.0, 0.0, 25)
    counts, _ = np.histogram(np.clip(logs, edges[0], 0.0), bins=edges)
    return {
        "edges": [round(float(edge), 6) for edge in edges],
        "counts": [int(count) for count in counts],
        "outside": int((~alive).sum()),
    }
