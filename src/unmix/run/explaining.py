"""The explain and score stages of a run, and their rows for summary and viewer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.explain.ledger import Ledger
from unmix.explain.pipeline import explain, score
from unmix.explain.table import RANDOM, summary
from unmix.run.config import ClientConfig
from unmix.run.context import RunContext

if TYPE_CHECKING:
    from unmix.explain.clients.calls import Client
    from unmix.viewer.scores import ExplanationRow

SHOWN_FIGURES = ("f1", "pearson", "balanced_accuracy")
"""Figures in the summary at the end of a run; the ledger holds all."""


def client_of(config: ClientConfig | None) -> Client | None:
    """The configured language model, probed; None where none is configured."""
    if config is None:
        return None
    from unmix.explain.clients.openai import OpenAIClient

    client = OpenAIClient(
        config.base_url,
        config.model,
        api_key_env=config.api_key_env,
        concurrency=config.concurrency,
        timeout=config.timeout,
    )
    client.probe()
    return client


def explain_run(context: RunContext) -> None:
    """Every configured explainer on the chosen latents; then, for comparison, the same explanations dealt wrongly."""
    spec = context.config.explain
    client = client_of(spec.client)
    with Ledger(context.ledger_file) as ledger:
        for name in spec.explainers:
            explain(
                context.index,
                spec.latents,
                explainer=name,
                client=client,
                ledger=ledger,
                coder=context.coder_name,
                seed=context.config.seed,
            )
        for name in spec.explainers if spec.baseline else ():
            explain(
                context.index,
                spec.latents,
                explainer=RANDOM + name,
                ledger=ledger,
                coder=context.coder_name,
                seed=context.config.seed,
            )


def score_run(context: RunContext) -> None:
    """Every configured scorer on every explanation that it can score."""
    spec = context.config.explain
    client = client_of(spec.client)
    with Ledger(context.ledger_file) as ledger:
        for name in spec.scorers:
            score(
                context.index,
                ledger,
                scorer=name,
                client=client,
                coder=context.coder_name,
                seed=context.config.seed,
            )


def summary_rows(context: RunContext) -> list[dict[str, Any]]:
    """Mean scores by explainer, scorer and figure, with intervals and coverage."""
    with Ledger(context.ledger_file, read_only=True) as ledger:
        rows: list[dict[str, Any]] = summary(ledger, context.index, context.config.seed)["rows"]
    return rows


def explanation_rows(context: RunContext) -> list[ExplanationRow]:
    """Every explanation of the run's coder with its scores, failures included."""
    with Ledger(context.ledger_file, read_only=True) as ledger:
        scores: dict[int, dict[str, Any]] = {}
        for one in ledger.scores(index_hash=context.index.hash):
            if one.status == "done":
                scores.setdefault(one.explanation_id, {})[one.method] = one.figures
        found = ledger.explanations(index_hash=context.index.hash, coder=context.coder_name)
    return [
        {
            "latent": e.latent,
            "explainer": e.method,
            "text": e.text,
            "scores": scores.get(e.id),
            "error": f"{e.error}: {e.message}" if e.status == "failed" else None,
            "baseline": e.method.startswith(RANDOM),
        }
        for e in found
    ]


def latent_order(context: RunContext) -> list[int]:
    """Latents in the order they are shown: plainly meaningful ones first."""
    from unmix.explain.ranking import ranked

    with Ledger(context.ledger_file, read_only=True) as ledger:
        return ranked(ledger, context.index, context.coder_name)
