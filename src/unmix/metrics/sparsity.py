"""How many latents fire, how often, and which never do. A latent fires on a token where its code is not 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError
from unmix.metrics.context_sums import ContextSums, one_context, require_finite
from unmix.metrics.intervals import Estimate, bootstrap, finite_or_none

EDGES = np.linspace(-8.0, 0.0, 33)
"""Bin edges of the log10 frequency histogram: four bins a decade."""


class Sparsity:
    """Streaming counts of one coder's codes. Costs 8 bytes a latent and 16 a context."""

    def __init__(self, n_latents: int) -> None:
        self.n_latents = n_latents
        self._counts = torch.zeros(n_latents, dtype=torch.int64)
        self._sums = ContextSums(["tokens", "fired"])

    def update(self, codes: Codes, contexts: Int[Tensor, " tokens"] | None = None) -> None:
        """Add the codes of a batch (`codes.rows` tokens). Explicit zeros do not count. `NonFiniteError` on NaN."""
        if codes.n_latents != self.n_latents:
            raise ConfigError(f"sparsity: codes have {codes.n_latents} latents, expected {self.n_latents}")
        contexts = one_context(codes.rows, contexts)
        if not bool(torch.isfinite(codes.values).all()):
            require_finite(
                codes.values, "sparsity", "the code values", contexts.to(codes.values.device)[codes.token_rows()]
            )
        fired = codes.indices[codes.values != 0].long()
        self._counts += torch.bincount(fired, minlength=self.n_latents).cpu()
        l0 = codes.l0().to(torch.float64)
        self._sums.add(contexts, torch.stack([torch.ones_like(l0), l0], -1))

    def merge(self, other: Sparsity) -> None:
        """Add what `other` has seen, of the same dictionary."""
        if other.n_latents != self.n_latents:
            raise ConfigError(f"sparsity: {other.n_latents} and {self.n_latents} latents do not merge")
        self._counts += other._counts
        self._sums.merge(other._sums)

    @property
    def n_tokens(self) -> int:
        """Tokens seen."""
        return int(self._sums.totals()[0])

    @property
    def counts(self) -> Int[Tensor, " latents"]:
        """int64 number of tokens that each latent fired on."""
        return self._counts

    @property
    def frequency(self) -> Float[Tensor, " latents"]:
        """float64 share of tokens that each latent fired on."""
        return self._counts.double() / max(self.n_tokens, 1)

    def result(self) -> dict[str, float | None]:
        """`l0`, `alive_fraction` (fired at least once in the tokens seen), `dense_fraction_1` and `_10` (%)."""
        if self.n_tokens == 0:
            return {}
        frequency = self.frequency
        return {
            "l0": finite_or_none(_l0(self._sums.totals())["l0"]),
            "alive_fraction": float((self._counts > 0).double().mean()),
            "dense_fraction_1": float((frequency > 0.01).double().mean()),
            "dense_fraction_10": float((frequency > 0.10).double().mean()),
        }

    def intervals(self, *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> dict[str, Estimate]:
        """The same, `l0` with its interval over contexts. Shares of the dictionary are counts: no interval."""
        estimates = {name: Estimate(value) for name, value in self.result().items()}
        if estimates:
            estimates |= bootstrap(self._sums.table(), _l0, seed=seed, resamples=resamples, level=level)
        return estimates

    def histogram(self) -> dict[str, Any]:
        """`{"log10_edges" [33], "latents" [32], "never", "tokens"}`: latents by log10 of their frequency."""
        alive = self._counts > 0
        logs = np.log10(self.frequency[alive].numpy())
        latents, _ = np.histogram(np.clip(logs, EDGES[0], EDGES[-1]), bins=EDGES)
        return {
            "log10_edges": EDGES.tolist(),
            "latents": latents.tolist(),
            "never": int((~alive).sum()),
            "tokens": self.n_tokens,
        }


def _l0(sums: Tensor) -> dict[str, Tensor]:
    return {"l0": sums[..., 1] / sums[..., 0]}
