"""Coders small enough to compute by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unmix.coder.codes import Codes
from unmix.coder.config import CoderConfig, Identity, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.policy import InputPolicy

EVERYWHERE = InputPolicy(bos="none", skip_first=0)


class LinearCoder(nn.Module):
    """codes = x @ W (dense, signed), reconstruction = codes @ V: nothing but two matrices."""

    def __init__(
        self, reads: str | tuple[str, ...], width: int, writes: str | tuple[str, ...] = (), *, d_out: int | None = None,
        latents: int = 5, seed: int = 0, policy: InputPolicy = EVERYWHERE, name: str = "", **config: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.config = CoderConfig(
            name=name, reads=(reads,) if isinstance(reads, str) else reads,
            writes=(writes,) if isinstance(writes, str) else writes, d_in=width, d_out=d_out or width,
            n_latents=latents, activation=Identity(), pre_bias="none", input_policy=policy, **config,
        )  # fmt: skip
        self.W = nn.Parameter(torch.randn(width, latents, generator=random) / width**0.5)
        self.V = nn.Parameter(torch.randn(latents, d_out or width, generator=random) / latents**0.5)

    def encode(self, x: Tensor) -> Codes:
        return Codes.from_dense(x.to(self.W.dtype) @ self.W)

    def decode(self, codes: Codes) -> Tensor:
        return codes.dense() @ self.V

    def map(self, x: Tensor) -> Tensor:
        """The same in one line, for tests to compare with."""
        return x.to(self.W.dtype) @ self.W @ self.V


class PerfectCoder(LinearCoder):
    """Reconstructs exactly: codes are the coordinates."""

    def __init__(self, hook: str, width: int, **options: Any) -> None:
        super().__init__(hook, width, latents=width, **options)
        with torch.no_grad():
            self.W.copy_(torch.eye(width))
            self.V.copy_(torch.eye(width))


def topk_coder(hook: str, width: int, latents: int = 24, k: int = 4, **options: Any) -> SparseCoder:
    """A real coder with random weights."""
    options = {"input_policy": EVERYWHERE, **options}
    config = CoderConfig(reads=(hook,), d_in=width, n_latents=latents, activation=TopK(k=k), **options)
    return SparseCoder(config, seed=1)
