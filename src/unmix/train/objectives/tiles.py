"""KL(p ‖ q) of two sets of logits and its gradient, by tiles of the vocabulary that stay in the processor's caches.

Each tile is made, softmaxed and left behind: s = softmax inside the tile, e = its log-sum-exp. With E = log Σ exp(e)
over the tiles, s·exp(e − E) is the tile of the whole softmax, so nothing is exponentiated twice, and
KL = Σ exp(e_p − E_p)·(s_p · (z_p − z_q)) − E_p + E_q. Products whose result is as wide as a vocabulary spend a third
of their time on writing rows that are far apart; tiles are written side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

TILE = 2048
"""Tokens of the vocabulary in a tile, on a processor; a card takes them all at once."""


@dataclass(frozen=True)
class LinearHead:
    """Logits that end in a product: `weight` times what `before` makes of rows."""

    before: Callable[[Tensor], Tensor]
    weight: Float[Tensor, "vocab d"]
    bias: Float[Tensor, " vocab"] | None = None

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        """Whole logits."""
        return functional.linear(self.before(x), self.weight, self.bias)


class TiledKL:
    """Buffers for the tiles of one chunk of rows after another."""

    def __init__(self, head: LinearHead, dtype: torch.dtype, tile: int | None = None) -> None:
        """`dtype`: of the softmax, float32 or wider."""
        self.weight, self.bias, self.dtype = head.weight.detach(), head.bias, dtype
        width = tile or (TILE if self.weight.device.type == "cpu" else len(self.weight))
        self.parts = [slice(at, min(at + width, len(self.weight))) for at in range(0, len(self.weight), width)]
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, q: Float[Tensor, "n d"], p: Float[Tensor, "n d"], slope: bool
    ) -> tuple[Float[Tensor, " n"], Tensor | None]:
        """`(KL of each row, its gradient at q [n, d] in the softmax's dtype)` of what the head's product reads.

        Not finite where a tile holds no finite logit: the caller takes whole rows then.
        """
        n, tiles = len(q), len(self.parts)
        e_q, e_p, dots = (q.new_empty(tiles, n, dtype=self.dtype) for _ in range(3))
        for t, part in enumerate(self.parts):
            z_q, z_p = self._logits("z_q", q, part), self._logits("z_p", p, part)
            s_q, s_p = self._share("q", n, part), self._share("p", n, part)
            e_q[t], e_p[t] = _softmax(z_q, s_q), _softmax(z_p, s_p)
            dots[t] = torch.linalg.vecdot(s_p, z_p.sub_(z_q))
        total_q, total_p = e_q.logsumexp(0), e_p.logsumexp(0)
        w_q, w_p = e_q.sub_(total_q).exp_(), e_p.sub_(total_p).exp_()
        values = (w_p * dots).sum(0) - total_p + total_q
        if not slope:
            return values, None
        grad = q.new_zeros(q.shape, dtype=self.dtype)
        for t, part in enumerate(self.parts):
            s_q, s_p = self._share("q", n, part), self._share("p", n, part)
            s_q.mul_(w_q[t].unsqueeze(-1)).addcmul_(s_p, w_p[t].unsqueeze(-1), value=-1)
            if self.weight.dtype == self.dtype:
                grad.addmm_(s_q, self.weight[part])
            else:
                grad.add_(s_q.to(self.weight.dtype) @ self.weight[part])
        return values, grad

    def _logits(self, name: str, x: Tensor, part: slice) -> Tensor:
        weight = self.weight[part]
        z = torch.mm(x, weight.T, out=self._room(f"{name} {x.dtype}", len(x), len(weight), x.dtype))
        if self.bias is not None:
            z.add_(self.bias[part])
        return z if z.dtype == self.dtype else self._room(name, len(x), len(weight), self.dtype).copy_(z)

    def _share(self, name: str, n: int, part: slice) -> Tensor:
        """Where a tile's softmax lies: tiles one after the other, rows side by side in each."""
        flat = self._room(name, n, len(self.weight), self.dtype).view(-1)
        return flat[n * part.start : n * part.stop].view(n, part.stop - part.start)

    def _room(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        held = self._held.get(name)
        if held is None or held.numel() < rows * columns:
            held = self._held[name] = torch.empty(rows * columns, dtype=dtype, device=self.weight.device)
        return held[: rows * columns].view(rows, columns)


def _softmax(z: Tensor, out: Tensor) -> Tensor:
    """`out` = softmax of `z`; the rows' log-sum-exp, which the largest share tells: it is exp(max − e)."""
    torch.softmax(z, -1, out=out)
    return z.amax(-1) - out.amax(-1).log()
