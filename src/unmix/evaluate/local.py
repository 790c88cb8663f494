"""Metrics of codes and reconstructions, from activations that are at hand or cached."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.evaluate.evaluation import Evaluation
from unmix.metrics.intervals import Estimate
from unmix.metrics.reconstruction import Reconstruction
from unmix.metrics.sparsity import Sparsity

Rows = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""`(x [rows, d_in], context ids [rows])`; of a coder that writes elsewhere `(x, target [rows, d_out], context ids)`."""


class LocalMetrics:
    """Reconstruction and sparsity of one coder, streamed."""

    def __init__(self, coder: SparseCoder, centre: Float[Tensor, " d_out"] | None = None) -> None:
        """`centre`: the mean of the targets over the whole set, where it is known."""
        self.coder = coder
        self.reconstruction = Reconstruction(centre)
        self.sparsity = Sparsity(coder.n_latents)

    @torch.no_grad()
    def update(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], contexts: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows d_out"]:
        """Add a batch; returns the reconstruction, which the splice needs too."""
        # A coder that looks at the tokens before needs to know which rows follow each other.
        codes = self.coder.encode(x, contexts.to(x.device) if self.coder.encoder.sequential else None)
        reconstruction = self.coder.decode(codes)
        self.reconstruction.update(target, reconstruction, contexts)
        self.sparsity.update(codes, contexts)
        return reconstruction

    def intervals(self, seed: int, resamples: int, level: float) -> dict[str, Estimate]:
        """Every metric, reconstruction first."""
        return {
            **self.reconstruction.intervals(seed=seed, resamples=resamples, level=level),
            **self.sparsity.intervals(seed=seed, resamples=resamples, level=level),
        }


def local_metrics(coder: SparseCoder, batches: Iterable[Rows]) -> LocalMetrics:
    """Run `coder` over rows of activations. `ConfigError` where it writes elsewhere and no targets are given."""
    metrics = LocalMetrics(coder)
    elsewhere = coder.config.writes != coder.config.reads
    for batch in batches:
        if len(batch) == 2 and elsewhere:
            raise ConfigError(
                f"{coder.name} writes {', '.join(coder.config.writes)}: give (x, target, contexts), not (x, contexts)"
            )
        x, target, contexts = batch if len(batch) == 3 else (batch[0], batch[0], batch[1])
        metrics.update(x.to(coder.device), target.to(coder.device), contexts.cpu())
    return metrics


def evaluate_activations(
    coder: SparseCoder,
    batches: Iterable[Rows],
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Evaluation:
    """Local metrics of `coder` over (cached) activations; every row counts.

    One pass, so the mean is not known beforehand and `explained_variance_per_token` is left out. `ConfigError`
    for batches without the targets that the coder needs, `NonFiniteError` for NaN or infinity.
    """
    metrics = local_metrics(coder, batches)
    settings = {
        "coder": coder_facts(coder),
        "tokens_counted": metrics.sparsity.n_tokens,
        "source": "activations given by the caller; every row counts",
        "interval": interval_facts(seed, resamples, level),
    }
    return Evaluation(metrics.intervals(seed, resamples, level), metrics.sparsity.histogram(), settings)


def coder_facts(coder: SparseCoder) -> dict[str, object]:
    """What the result says of the coder."""
    config = coder.config
    return {
        "name": coder.name,
        "hash": coder.hash(),
        "reads": list(config.reads),
        "writes": list(config.writes),
        "n_latents": config.n_latents,
        "dtype": str(coder.dtype).removeprefix("torch."),
    }


def interval_facts(seed: int, resamples: int, level: float) -> dict[str, object]:
    """What the result says of its intervals."""
    return {
        "method": "percentile bootstrap over contexts",
        "level": level,
        "resamples": resamples,
        "seed": seed,
        "none_for": "alive_fraction and dense_fraction_*, which are counts over the dictionary",
    }
