"""The plain reference: a TopK coder as anybody would write it in torch, every product dense, gradients by autograd.

It does what our trainer does in a step (clip at 1, decoder rows kept at norm 1, Adam, dead latents counted) and nothing
cleverly: `[tokens, latents]` pre-activations, a scattered copy of them, and autograd's dense products backwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._worker import Contestant, Shape, serve


class DenseTopK(nn.Module):
    """`x̂ = W_dec · topk(relu(W_enc (x − b_dec) + b_enc)) + b_dec`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.k = shape.k
        directions = torch.randn(shape.n_latents, shape.d)
        directions /= directions.norm(dim=-1, keepdim=True)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(shape.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(shape.d))

    def encode(self, x: Tensor) -> Tensor:
        """`[tokens, d]` → dense latents `[tokens, F]`."""
        pre = torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)
        best = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, best.indices, best.values)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(reconstruction, latents)`."""
        latents = self.encode(x)
        return latents @ self.W_dec + self.b_dec, latents


def build(shape: Shape, variant: str, batches: Any) -> Contestant:
    """One coder and one torch.optim.Adam with its defaults."""
    torch.manual_seed(0)
    coder = DenseTopK(shape)
    with torch.no_grad():
        coder.b_dec.copy_(batches[0].mean(0))
    optimiser = torch.optim.Adam(coder.parameters(), lr=8e-4)
    variance = (batches[0] - batches[0].mean(0)).square().sum(-1).mean()
    since_fired = torch.zeros(shape.n_latents, dtype=torch.int64)

    def step(i: int) -> None:
        x = batches[i % len(batches)]
        reconstruction, latents = coder(x)
        loss = (x - reconstruction).square().sum(-1).mean() / variance
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            along = (coder.W_dec.grad * coder.W_dec).sum(-1, keepdim=True)
            coder.W_dec.grad -= along * coder.W_dec
        nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            coder.W_dec /= coder.W_dec.norm(dim=-1, keepdim=True)
            since_fired.add_(len(x))
            since_fired[(latents != 0).any(0)] = 0
        float(loss)

    return Contestant(step, lambda x: coder(x)[0], {})


if __name__ == "__main__":
    serve(build)
