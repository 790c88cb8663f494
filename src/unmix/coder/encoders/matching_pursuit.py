"""Matching pursuit (Mallat & Zhang 1993): codes found one latent at a time on what is still unexplained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from unmix.coder.codes import Codes, offsets_of
from unmix.coder.config import MatchingPursuit
from unmix.coder.sparse import tile_rows
from unmix.core.errors import ConfigError

if TYPE_CHECKING:
    from unmix.coder.sparse_coder import SparseCoder


class MatchingPursuitEncoder:
    """Greedy steps on the residual. A latent may be chosen again; its values add up.

    Costs one product with W_enc a step. Memory holds one tile of scores and the choices [tokens, steps].
    """

    sequential = False

    def __init__(self, config: MatchingPursuit) -> None:
        self.config = config

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """None beyond the affine ones."""
        return {}

    def codes(self, coder: SparseCoder, x: Tensor, context: Tensor | None) -> Codes:
        """Codes of `x [rows, d_in]`. `ConfigError` for a gate factor or an output of another width."""
        if coder.config.gate_space != "raw" or coder.config.width_out != coder.config.d_in:
            raise ConfigError(
                f"{coder.name}: matching pursuit takes what it reconstructs from its own input, so it needs "
                "gate_space 'raw' and d_out = d_in"
            )
        bias = coder.input_bias()
        residual = x if bias is None else x - bias
        step = tile_rows(coder.n_latents, x.element_size())
        ids, values = zip(*(self._pursue(coder, part) for part in residual.split(step)), strict=True)
        return _gather(list(ids), list(values), coder.n_latents, x)

    def pre_activations(self, coder: SparseCoder, x: Tensor) -> Tensor:
        """Scores [rows, n_latents] of the first step."""
        bias = coder.input_bias()
        return functional.linear(x if bias is None else x - bias, coder.W_enc, coder.b_enc)

    def _pursue(
        self, coder: SparseCoder, residual: Float[Tensor, "rows d"]
    ) -> tuple[Int[Tensor, "rows steps"], Float[Tensor, "rows steps"]]:
        """Chosen latents and what each step added: 0 once a token is done."""
        rule = self.config
        rows = residual.shape[0]
        done = torch.zeros(rows, dtype=torch.bool, device=residual.device)
        ids = torch.zeros(rows, 0, dtype=torch.int64, device=residual.device)
        values = residual.new_zeros(rows, 0)
        for _ in range(rule.max_iterations or coder.config.d_in):
            with torch.no_grad():
                chosen = functional.linear(residual, coder.W_enc, coder.b_enc).argmax(-1)
            added = ((residual * coder.W_enc[chosen]).sum(-1) + coder.b_enc[chosen]).relu()
            added = torch.where(done, 0.0, added)
            residual = residual - added[:, None] * coder.W_dec[chosen]
            if rule.stop_on_duplicate_support:
                done = done | ~_is_new(chosen, added.detach(), ids, values.detach())
            ids, values = torch.cat([ids, chosen[:, None]], 1), torch.cat([values, added[:, None]], 1)
            if rule.residual_threshold > 0:
                done = done | (residual.detach().norm(dim=-1) < rule.residual_threshold)
            if bool(done.all()):
                break
        return ids, values


def _is_new(
    chosen: Int[Tensor, " rows"],
    added: Float[Tensor, " rows"],
    ids: Int[Tensor, "rows steps"],
    values: Float[Tensor, "rows steps"],
) -> Bool[Tensor, " rows"]:
    """Whether a step brought a latent that no step before it had."""
    return (added > 0) & ~((ids == chosen[:, None]) & (values > 0)).any(-1)


def _gather(ids: list[Tensor], values: list[Tensor], n_latents: int, like: Tensor) -> Codes:
    """Steps of every token as codes: the values of a latent added up, zeros left out."""
    rows, keys, added, start = like.shape[0], list[Tensor](), list[Tensor](), 0
    for part, value in zip(ids, values, strict=True):
        row = torch.arange(start, start + len(part), device=like.device)[:, None]
        kept = value.detach() > 0
        keys.append((row * n_latents + part)[kept])
        added.append(value[kept])
        start += len(part)
    unique, place = torch.cat(keys).unique(return_inverse=True)
    summed = like.new_zeros(len(unique)).index_add(0, place, torch.cat(added))
    offsets = offsets_of(torch.bincount(unique // n_latents, minlength=rows))
    return Codes((unique % n_latents).to(torch.int32), summed, offsets, n_latents, (rows,))
