"""From a finished run to its report, and to what the viewer serves."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmix.core.progress import log
from unmix.run.context import RunContext
from unmix.run.explaining import explanation_rows, latent_order, summary_rows
from unmix.run.training import metrics_file
from unmix.train.curves import CURVES
from unmix.viewer.data import RunFacts, collect
from unmix.viewer.report import write_report

if TYPE_CHECKING:
    from unmix.coder.sparse_coder import SparseCoder
    from unmix.lm.model import LanguageModel
    from unmix.viewer.shapes import PromptToken, ReportData

SHOWN_LOGITS = 12
SHOWN_LATENTS = 12


def write_run_report(context: RunContext) -> None:
    """The static report of a run."""
    data = run_data(context)
    drawn = metrics_file(context, context.coder_name).with_name(CURVES)
    curves = drawn.read_text(encoding="utf-8") if drawn.is_file() else None
    page = write_report(data, context.report_folder, curves)
    log.info("report: %s (%d latent pages)", page, len(data.paged))


def run_data(context: RunContext) -> ReportData:
    """Everything the viewer shows of this run; pages are made on demand."""
    config = context.config
    coder = context.coder
    evaluation = context.evaluation() if context.evaluation_file.is_file() else None
    ledger = context.ledger_file.is_file()
    activation = coder.config.activation
    k = getattr(activation, "k", None)
    return collect(
        context.index,
        context.coder_name,
        RunFacts(
            name=context.folder.name,
            model=coder.config.model.name if coder.config.model else config.model.name,
            hook=coder.config.reads[0],
            activation=activation.kind if k is None else f"{activation.kind}, k = {k}",
            source=config.data.source,
            folder=str(context.folder),
        ),
        evaluation=evaluation,
        explanations=explanation_rows(context) if ledger else (),
        summary=summary_rows(context) if ledger else None,
        logits=LatentLogits(context),
        order=latent_order(context) if ledger else (),
        windows=config.report.windows,
        context=config.report.context,
    )


class LatentLogits:
    """Tokens that a latent's decoder row promotes and suppresses through the final norm and the head.

    The row is read as if it were the whole stream, so values rank tokens and do not add up across latents; what
    the head gives for a zero stream is taken off.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._base: Tensor | None = None

    @torch.no_grad()
    def __call__(self, latent: int) -> Mapping[str, Sequence[tuple[str, float]]] | None:
        """`{"positive": [...], "negative": [...]}`; None where the coder does not write the residual stream."""
        lm, coder = self._context.lm, self._context.coder
        if coder.config.width_out != lm.d_model:
            return None
        with self._lock:
            if self._base is None:
                self._base = lm.unembed(torch.zeros(lm.d_model, device=lm.device)).float()
        logits = lm.unembed(coder.dictionary[latent].to(lm.device)).float() - self._base
        best, worst = logits.topk(SHOWN_LOGITS), (-logits).topk(SHOWN_LOGITS)
        return {
            "positive": _named(lm, best.indices, best.values),
            "negative": _named(lm, worst.indices, -worst.values),
        }


def _named(lm: LanguageModel, ids: Tensor, values: Tensor) -> list[tuple[str, float]]:
    return list(zip(lm.token_strings(ids), [float(v) for v in values], strict=True))


class ModelPromptReader:
    """Runs the run's model over a typed text and gives each token's strongest latents."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def read(self, text: str) -> list[PromptToken]:
        """One entry a token; masked positions have no latents."""
        from unmix.lm.tokens import policy_mask

        lm, coder = self._context.lm, self._context.coder
        policy = coder.config.input_policy
        ids = lm.encode_text(text, policy)
        hook = coder.config.reads[0]
        acts = lm.capture(ids, [hook], policy)[hook][0]
        with torch.no_grad():
            codes = coder.encode(acts.float())
        counts = policy_mask(ids[None], policy)[0]
        result: list[PromptToken] = []
        for i, string in enumerate(lm.token_strings(ids)):
            result.append({"token": string, "latents": strongest(coder, codes.row(i)) if bool(counts[i]) else []})
        return result


def strongest(coder: SparseCoder, row: tuple[Tensor, Tensor]) -> list[tuple[int, float]]:
    """The strongest firing latents of one token: `(latent, activation)`."""
    indices, values = row
    order = values.abs().argsort(descending=True, stable=True)[:SHOWN_LATENTS]
    return [(int(indices[j]), float(values[j])) for j in order if float(values[j]) != 0]
