"""What a reconstruction does to the language model's predictions, in nats a token.

Position t predicts token t + 1. kl is KL(p_original ‖ p_other): how much the model that reads the
reconstruction misses of what the model itself would have said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmix.core.errors import ConfigError, NonFiniteError
from unmix.metrics.context_sums import ContextSums, one_context
from unmix.metrics.intervals import Estimate, bootstrap, finite_or_none

CHUNK_BYTES = 48 * 2**20
"""Size of one chunk of float32 logits; about five live at once (230 MB for a vocabulary of 49k, measured).

Above 32 MiB on purpose: glibc gives such blocks back to the system at once. With chunks of 16 MiB its heap
fragmented to 1.5 GB on the same batch.
"""

Rows = Callable[[Tensor, Tensor], Tensor]
"""Logits [rows, vocab] at places in the batch [rows] and positions [rows]: what spares holding all of them."""


@dataclass(frozen=True)
class TokenLosses:
    """One value a prediction, float64 on the CPU, in the order of the mask's true positions."""

    ce: Float[Tensor, " predictions"]
    kl: Float[Tensor, " predictions"] | None = None
    agrees: Float[Tensor, " predictions"] | None = None
    """1.0 where both models rank the same token first."""


def predictions(mask: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Positions that a prediction is scored from: those of `mask`, without the last of each context.

    The token predicted may itself be masked or be the first of another document.
    """
    scored = mask.clone()
    scored[:, -1] = False
    return scored


def logits_rows(logits: Float[Tensor, "batch pos vocab"]) -> Rows:
    """The rows of logits that are held whole."""
    return lambda batch, position: logits[batch.to(logits.device), position.to(logits.device)]


def token_losses(
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    original: Rows,
    others: Mapping[str, Rows],
) -> dict[str, TokenLosses]:
    """Losses of the next token from each true position of `mask`: under `"original"` and each name of `others`.

    Log-probabilities are formed for a few rows at a time (`CHUNK_BYTES`), in float32 or in the logits' own dtype
    where that is wider, so [batch, pos, vocab] never exists at once. `NonFiniteError` names the logits, the
    context's place in the batch and the position.
    """
    batch, position = predictions(mask).nonzero(as_tuple=True)
    if len(batch) == 0:
        nothing = torch.zeros(0, dtype=torch.float64)
        return {"original": TokenLosses(nothing), **{name: TokenLosses(nothing, nothing, nothing) for name in others}}
    targets = tokens[batch, position + 1].long()
    vocab = original(batch[:1], position[:1]).shape[-1]
    step = max(1, CHUNK_BYTES // (4 * vocab))
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in ("original", *others)}
    for start in range(0, len(batch), step):
        b, p, target = (t[start : start + step] for t in (batch, position, targets))
        log_p = _log_probabilities(original(b, p))
        parts["original"].append((_cross_entropy(log_p, target),))
        share, first = log_p.exp(), log_p.argmax(-1)
        silent = share == 0
        for name, rows in others.items():
            log_q = _log_probabilities(rows(b, p))
            ce, agrees = _cross_entropy(log_q, target), (log_q.argmax(-1) == first).double().cpu()
            # KL(p ‖ q): a token that p gives no mass adds nothing, even where q gives it none (−inf − −inf).
            kl = torch.linalg.vecdot(share, (log_p - log_q).masked_fill_(silent, 0.0)).cpu().double()
            parts[name].append((ce, kl, agrees))
    losses = {name: TokenLosses(*(torch.cat(column) for column in zip(*rows))) for name, rows in parts.items()}
    for name, found in losses.items():
        _require_finite_losses(found, name, batch, position)
    return losses


def _log_probabilities(logits: Tensor) -> Tensor:
    wide = logits.detach()
    return torch.log_softmax(wide if wide.dtype == torch.float64 else wide.float(), dim=-1)


def _cross_entropy(log_q: Tensor, target: Tensor) -> Tensor:
    return -log_q.gather(-1, target.to(log_q.device)[:, None]).squeeze(-1).cpu().double()


def _require_finite_losses(losses: TokenLosses, name: str, batch: Tensor, position: Tensor) -> None:
    for what, values in (("cross-entropy", losses.ce), ("KL", losses.kl)):
        if values is None or bool(torch.isfinite(values).all()):
            continue
        bad = (~torch.isfinite(values)).nonzero().squeeze(-1)
        first = int(bad[0])
        raise NonFiniteError(
            f"{name} logits: {len(bad)} predictions with non-finite {what}, first {float(values[first])} at context "
            f"{int(batch[first])} of the batch, position {int(position[first])}"
        )


class Language:
    """Streaming language metrics of one coder against the original model and named ablations."""

    def __init__(self, ablations: Sequence[str] = ("zero",)) -> None:
        self.ablations = tuple(ablations)
        ablated = [f"{what}_{name}" for name in self.ablations for what in ("ce", "kl")]
        self._sums = ContextSums(["predictions", "ce_orig", "ce_spliced", "kl_spliced", "agrees", *ablated])

    def update(
        self,
        original: TokenLosses,
        spliced: TokenLosses,
        ablated: Mapping[str, TokenLosses],
        contexts: Int[Tensor, " predictions"] | None = None,
    ) -> None:
        """Add the losses of one batch, all over the same predictions; `spliced` and `ablated` with KL."""
        if set(ablated) != set(self.ablations):
            raise ConfigError(f"language: ablations {sorted(ablated)}, expected {sorted(self.ablations)}")
        columns = [torch.ones_like(original.ce), original.ce, spliced.ce, _kl(spliced), _agrees(spliced)]
        for name in self.ablations:
            columns += [ablated[name].ce, _kl(ablated[name])]
        self._sums.add(one_context(len(original.ce), contexts), torch.stack(columns, -1))

    def merge(self, other: Language) -> None:
        """Add what `other` has seen, with the same ablations."""
        self._sums.merge(other._sums)

    @property
    def n_predictions(self) -> int:
        """Predictions seen."""
        return int(self._sums.totals()[0])

    def result(self) -> dict[str, float | None]:
        """`ce_orig ce_spliced ce_increase kl_spliced top1_agreement`, and for each ablation A
        `ce_ablated_A kl_ablated_A`. `ce_recovered` and `kl_recovered` are against zero ablation, the published
        habit; another ablation's carry its name (`ce_recovered_mean`). `None` where undefined."""
        if self.n_predictions == 0:
            return {}
        return {name: finite_or_none(v) for name, v in self._finish(self._sums.totals()).items()}

    def intervals(self, *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> dict[str, Estimate]:
        """Each metric with its bootstrap interval over contexts."""
        if self.n_predictions == 0:
            return {}
        return bootstrap(self._sums.table(), self._finish, seed=seed, resamples=resamples, level=level)

    def _finish(self, sums: Tensor) -> dict[str, Tensor]:
        mean = {name: sums[..., i] / sums[..., 0] for i, name in enumerate(self._sums.columns)}
        metrics = {
            "ce_orig": mean["ce_orig"],
            "ce_spliced": mean["ce_spliced"],
            "ce_increase": mean["ce_spliced"] - mean["ce_orig"],
            "kl_spliced": mean["kl_spliced"],
            "top1_agreement": mean["agrees"],
        }
        for name in self.ablations:
            suffix = "" if name == "zero" else f"_{name}"
            ce, kl = mean[f"ce_{name}"], mean[f"kl_{name}"]
            metrics[f"ce_ablated_{name}"] = ce
            metrics[f"kl_ablated_{name}"] = kl
            metrics[f"ce_recovered{suffix}"] = (ce - mean["ce_spliced"]) / (ce - mean["ce_orig"])
            metrics[f"kl_recovered{suffix}"] = 1 - mean["kl_spliced"] / kl
        return metrics


def _kl(losses: TokenLosses) -> Tensor:
    if losses.kl is None:
        raise ConfigError("language: these losses have no KL: they are the original's")
    return losses.kl


def _agrees(losses: TokenLosses) -> Tensor:
    if losses.agrees is None:
        raise ConfigError("language: these losses have no agreement: they are the original's")
    return losses.agrees
