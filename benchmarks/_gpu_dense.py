"""What the kernels are measured against on a card: a dense step under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DenseStep:
    """A top-k step as anybody would write it: dense products in bfloat16 by autocast, autograd, fused Adam."""

    def __init__(self, x: Tensor, rows: Tensor, k: int, variance: float) -> None:
        """Nothing is made before the first call, so that nothing is held where it is not asked for."""
        self.x, self.rows, self.k, self.variance = x, rows, k, variance
        self._step: Callable[[], Tensor] | None = None

    def __call__(self) -> None:
        """One step."""
        if self._step is None:
            self._step = self._made()
        self._step()

    def _made(self) -> Callable[[], Tensor]:
        W_dec, W_enc = (nn.Parameter(self.rows.clone()) for _ in range(2))
        b_enc = nn.Parameter(torch.zeros(len(self.rows), device=self.x.device))
        b_dec = nn.Parameter(torch.zeros(self.x.shape[1], device=self.x.device))
        parameters = [W_dec, W_enc, b_enc, b_dec]
        optimiser = torch.optim.Adam(parameters, lr=1e-5, fused=True)

        def loss(x: Tensor) -> Tensor:
            with torch.autocast(self.x.device.type, torch.bfloat16):
                pre = torch.relu((x - b_dec) @ W_enc.T + b_enc)
                best = pre.topk(self.k, dim=-1)
                y = torch.zeros_like(pre).scatter(-1, best.indices, best.values) @ W_dec + b_dec
            return (y.float() - x).square().sum() / (len(x) * self.variance)

        compiled: Callable[[Tensor], Tensor] = torch.compile(loss)

        def step() -> Tensor:
            value = compiled(self.x)
            value.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            with torch.no_grad():
                W_dec.div_(W_dec.norm(dim=-1, keepdim=True))
            return value

        return step
