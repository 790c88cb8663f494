"""What a format reads and writes: a coder's config and its tensors, not made yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import NonFiniteError
from unmix.formats.lazy import Lazy, State


@dataclass(frozen=True)
class Draft:
    """A coder before its weights are in memory."""

    config: CoderConfig
    state: State
    """By the coder's own parameter names, float32."""
    statistics: Mapping[str, Lazy] = field(default_factory=lambda: {})
    """Facts of each latent that were published beside the weights; never in the maths."""

    @classmethod
    def of(cls, coder: SparseCoder) -> Draft:
        """The draft of a coder in memory, float32 on the CPU. `NonFiniteError` for NaN or infinity in its weights."""
        state = {name: t.detach().cpu().float() for name, t in coder.state_dict().items()}
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{coder.name}: {name} holds NaN or infinity; nothing was written")
        statistics = {name: Lazy.of(t.detach().cpu()) for name, t in coder.statistics.items()}
        return cls(coder.config, {name: Lazy.of(t) for name, t in state.items()}, statistics)

    def coder(self) -> SparseCoder:
        """The coder itself: every tensor is made now."""
        state = {name: lazy() for name, lazy in self.state.items()}
        return SparseCoder.from_state(self.config, state, {name: lazy() for name, lazy in self.statistics.items()})
