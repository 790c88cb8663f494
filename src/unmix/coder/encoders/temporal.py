"""Temporal coders (arXiv 2511.01836): attention predicts codes from earlier tokens, the codes are of what is new.

F: latents. E: F / bottleneck, the width of queries and keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from unmix.coder.activations.selection import top_lowest
from unmix.coder.codes import Codes, offsets_of
from unmix.coder.config import Temporal
from unmix.core.errors import ConfigError

if TYPE_CHECKING:
    from unmix.coder.sparse_coder import SparseCoder

PREDICTED = "predicted"
"""In `Codes.context`: the reconstruction [*leading, d_out] of what attention predicted, which `decode` adds."""

PARTS = ("q", "k", "v", "o")
"""Of each attention layer: queries of the token itself, keys and values of those before it, and the output's map."""


def part_name(layer: int, part: str, bias: bool = False) -> str:
    """The parameter's name: `attn0_W_q`, `attn0_b_q`."""
    return f"attn{layer}_{'b' if bias else 'W'}_{part}"


class TemporalEncoder:
    """z_t = relu(W_enc (z_scale · r_t) + b_enc), where r_t is x_t without its prediction.

    Holds dense codes [tokens of a sequence, F] and attention over them: made for analysis, not for speed.
    """

    sequential = True

    def __init__(self, config: Temporal) -> None:
        self.config = config

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """Of each layer W_q, W_k [E, F], W_v, W_o [F, F] and their biases, all zero: nothing is predicted."""
        rule = self.config
        if n_latents % (rule.bottleneck * rule.n_heads):
            raise ConfigError(
                f"n_latents = {n_latents} is not a multiple of bottleneck · n_heads = {rule.bottleneck * rule.n_heads}"
            )
        wide = {"q": n_latents // rule.bottleneck, "k": n_latents // rule.bottleneck, "v": n_latents, "o": n_latents}
        made: dict[str, Tensor] = {}
        for layer in range(rule.n_layers):
            for part in PARTS:
                made[part_name(layer, part)] = torch.zeros(wide[part], n_latents)
                made[part_name(layer, part, bias=True)] = torch.zeros(wide[part])
        return made

    def codes(self, coder: SparseCoder, x: Tensor, context: Tensor | None) -> Codes:
        """Codes of the new part of `x [rows, d_in]`, with the prediction's reconstruction as context.

        `context` [rows] numbers the sequences: tokens of one number, in their order, follow each other. `ConfigError`
        where it is missing, or the coder writes another width than it reads.
        """
        if context is None:
            raise ConfigError(
                f"{coder.name}: a temporal coder needs to know which tokens follow each other: give it x as "
                "[sequences, tokens, d_in], or context = the number of each token's sequence"
            )
        if coder.config.gate_space != "raw" or coder.config.width_out != coder.config.d_in:
            raise ConfigError(f"{coder.name}: a temporal coder needs gate_space 'raw' and d_out = d_in")
        bias = coder.input_bias()
        s = x if bias is None else x - bias
        numbers = context.reshape(-1)
        if numbers.shape[0] != s.shape[0]:
            raise ConfigError(f"{coder.name}: context numbers {numbers.shape[0]} tokens, x has {s.shape[0]}")
        novel = s.new_zeros(s.shape[0], coder.n_latents)
        predicted = torch.zeros_like(s)
        for number in numbers.unique():
            rows = (numbers == number).nonzero().squeeze(-1)
            z, said = self._one(coder, s[rows])
            novel, predicted = novel.index_put((rows,), z), predicted.index_put((rows,), said)
        return self._sparse(novel, predicted)

    def pre_activations(self, coder: SparseCoder, x: Tensor) -> Tensor:
        """Of each token by itself, [rows, n_latents], before anything is predicted."""
        bias = coder.input_bias()
        return self._scores(coder, x if bias is None else x - bias)

    def _scores(self, coder: SparseCoder, residual: Tensor) -> Tensor:
        return functional.linear(residual * self.config.z_scale, coder.W_enc, coder.b_enc)

    def _one(
        self, coder: SparseCoder, residual: Float[Tensor, "tokens d"]
    ) -> tuple[Float[Tensor, "tokens F"], Float[Tensor, "tokens d"]]:
        """Codes of what is new in one sequence, and the reconstruction of what was predicted."""
        predicted = torch.zeros_like(residual)
        for layer in range(self.config.n_layers):
            z = self._scores(coder, residual).relu()
            before = functional.pad(z[:-1], (0, 0, 1, 0))
            guess = self._attend(coder, layer, z, before).relu() @ coder.W_dec
            norm = guess.norm(dim=-1, keepdim=True) + self.config.eps
            guess = guess * ((guess * residual).sum(-1, keepdim=True) / norm.square())
            predicted, residual = predicted + guess, residual - guess
        return self._scores(coder, residual).relu(), predicted

    def _attend(self, coder: SparseCoder, layer: int, z: Tensor, before: Tensor) -> Tensor:
        """Codes predicted for each token [tokens, F] by causal attention over the tokens before it."""
        heads, extra = self.config.n_heads, coder.extra()

        def mapped(part: str, t: Tensor) -> Tensor:
            return functional.linear(t, extra[part_name(layer, part)], extra[part_name(layer, part, bias=True)])

        q, k, v = (
            mapped(part, t).unflatten(-1, (heads, -1)).transpose(0, 1)
            for part, t in (("q", z), ("k", before), ("v", before))
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mapped("o", mixed.transpose(0, 1).flatten(1))

    def _sparse(self, novel: Float[Tensor, "rows F"], predicted: Tensor) -> Codes:
        rows, n = novel.shape
        context = {PREDICTED: predicted}
        if self.config.k is not None:
            ids = top_lowest(novel.detach(), min(self.config.k, n))
            offsets = torch.arange(rows + 1, device=novel.device) * ids.shape[-1]
            values = novel.gather(-1, ids).reshape(-1)
            return Codes(ids.reshape(-1).to(torch.int32), values, offsets, n, (rows,), ids.shape[-1], context)
        row, ids = (novel > 0).nonzero(as_tuple=True)
        offsets = offsets_of(torch.bincount(row, minlength=rows))
        return Codes(ids.to(torch.int32), novel[row, ids], offsets, n, (rows,), None, context)
