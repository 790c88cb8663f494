"""How strongly a latent fires on some text: what `units="quantile"` and `to="mean"` are measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64

from unmix.core.errors import ConfigError, DataError
from unmix.lm.forward import as_inputs
from unmix.lm.tokens import policy_mask

if TYPE_CHECKING:
    from unmix.coder.sparse_coder import SparseCoder
    from unmix.lm.model import LanguageModel


@runtime_checkable
class Distribution(Protocol):
    """Facts about single latents of one coder."""

    def quantile(self, latent: int, q: float) -> float:
        """The value that stands for `q`."""
        ...

    def mean(self, latent: int) -> float:
        """Mean over all positions, silent ones counted as 0."""
        ...


def value_at(values: Float64[np.ndarray, " n"], q: float) -> float:
    """The `q`-quantile of ascending values of a latent where it fires, between neighbours linearly.

    Above 1: that many times the largest. Below 0: minus the value of −q.
    """
    if q < 0:
        return -value_at(values, -q)
    return float(np.quantile(values, min(q, 1.0))) * max(q, 1.0)


@dataclass(frozen=True)
class LatentDistribution:
    """Activations of some latents on a stretch of text."""

    values: Mapping[int, Sequence[float] | np.ndarray]
    """By latent: its activations where it fired, in any order."""
    positions: int
    """How many positions they were gathered from, silent ones included."""

    def quantile(self, latent: int, q: float) -> float:
        """See `value_at`. `ConfigError` for a latent that is not here, or that never fired."""
        return value_at(np.sort(self._of(latent)), q)

    def mean(self, latent: int) -> float:
        """Mean over all positions, silent ones counted as 0."""
        if latent in self.values and len(self.values[latent]) == 0:
            return 0.0
        return float(self._of(latent).sum()) / self.positions

    def _of(self, latent: int) -> Float64[np.ndarray, " n"]:
        if latent not in self.values:
            raise ConfigError(f"the distribution given says nothing of latent {latent}")
        found = np.asarray(self.values[latent], dtype=np.float64)
        if not len(found):
            raise ConfigError(f"latent {latent} never fired on the text that its distribution was taken from")
        return found


@torch.no_grad()
def measure_latents(
    lm: LanguageModel, coder: SparseCoder, inputs: Any, latents: Sequence[int], batch: int = 16
) -> LatentDistribution:
    """Activations of `latents` on `inputs`: texts, or token ids [n, pos]; masked positions of the coder left out.

    Nothing else is kept. `DataError` where no position counts, `ConfigError` for a latent out of range.
    """
    for latent in latents:
        if not 0 <= latent < coder.config.n_latents:
            raise ConfigError(f"no latent {latent}: {coder.config.name!r} has 0 to {coder.config.n_latents - 1}")
    policy = coder.config.input_policy
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not len(texts):
        raise DataError("there is no text to measure latents on")
    prompts = (
        [as_inputs(lm, text, policy) for text in texts]
        if isinstance(texts[0], str)
        else list(as_inputs(lm, inputs, policy).split(batch))
    )
    gathered: dict[int, list[np.ndarray]] = {int(latent): [] for latent in latents}
    positions = 0
    for tokens in prompts:
        mask = policy_mask(tokens, policy)
        reads = coder.config.reads
        found = lm.capture(tokens, list(reads), policy, positions=mask)
        x = torch.cat([found[name] for name in reads], dim=-1)
        positions += len(x)
        codes = coder.encode(x)
        for latent, parts in gathered.items():
            values = codes.values[(codes.indices == latent) & (codes.values != 0)]
            parts.append(values.double().cpu().numpy())
    if not positions:
        raise DataError("every position of the text is masked by the coder's input policy")
    return LatentDistribution({k: np.concatenate(v) for k, v in gathered.items()}, positions)


class IndexedDistribution:
    """The distribution of a coder in a latent index (`index["layers.10"]`), read latent by latent."""

    def __init__(self, index: Any) -> None:
        """`index[i].postings()` gives (positions, values); `index.frequency[i]` the share of positions."""
        self.index = index

    def quantile(self, latent: int, q: float) -> float:
        """See `value_at`; `ConfigError` where the latent never fired in the index."""
        values = np.sort(np.asarray(self.index[latent].postings()[1], dtype=np.float64))
        if not len(values):
            raise ConfigError(f"latent {latent} never fires in the index that was given")
        return value_at(values, q)

    def mean(self, latent: int) -> float:
        """Mean over all unmasked positions."""
        return float(self.index[latent].mean) * float(self.index.frequency[latent])


def as_distribution(given: Any) -> Distribution:
    """`given` itself, or a coder's index seen as one; `ConfigError` for anything else."""
    if isinstance(given, Distribution):
        return given
    if hasattr(given, "frequency") and hasattr(given, "__getitem__"):
        return IndexedDistribution(given)
    raise ConfigError(
        f"a distribution is a LatentDistribution or a coder's index (index[name]), found {type(given).__name__}"
    )


def named_distributions(given: Any, names: Sequence[str]) -> dict[str, Distribution]:
    """By coder: one for the only coder, or a mapping {name: distribution}; `ConfigError` where names do not fit."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(names) != 1:
            raise ConfigError(f"several coders are bound: give distributions by name, of {', '.join(names)}")
        return {names[0]: as_distribution(given)}
    named = cast("Mapping[str, Any]", given)
    unknown = [name for name in named if name not in names]
    if unknown:
        raise ConfigError(f"distribution of {unknown[0]!r}: no such coder is bound; bound: {', '.join(names)}")
    return {name: as_distribution(one) for name, one in named.items()}
