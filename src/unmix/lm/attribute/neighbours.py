"""Latents whose decoder rows point the same way, in one coder or between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.lm.attribute.direct import check_latents

_BLOCK = 8192


@dataclass(frozen=True)
class Neighbour:
    """A latent and the cosine of its decoder row."""

    latent: int
    cosine: float


@torch.no_grad()
def decoder_neighbours(
    coder: SparseCoder, latents: int | Sequence[int], n: int = 10, other: SparseCoder | None = None
) -> list[list[Neighbour]]:
    """For each latent the `n` of the largest decoder cosine, largest first, itself left out.

    `other`: look among that coder's latents instead. Rows of zeros have a cosine of 0. Memory: a block of decoder rows
    and a [latents, block] product at a time. `ConfigError` where the coders write different widths, `ModelError` for a
    latent out of range.
    """
    there = coder if other is None else other
    ids = check_latents(coder, latents)
    if there.config.width_out != coder.config.width_out:
        raise ConfigError(
            f"{coder.name} writes {coder.config.width_out} values and {there.name} {there.config.width_out}: "
            "their decoder rows have no cosine"
        )
    rows = torch.nn.functional.normalize(coder.W_dec[torch.tensor(ids, device=coder.device)].float(), dim=-1)
    best_values = rows.new_full((len(ids), 0), 0.0)
    best_ids = torch.zeros(len(ids), 0, dtype=torch.int64, device=rows.device)
    own = torch.tensor(ids, device=rows.device)
    for start in range(0, there.n_latents, _BLOCK):
        block = torch.nn.functional.normalize(there.W_dec[start : start + _BLOCK].float(), dim=-1).to(rows.device)
        cosines = rows @ block.T
        places = torch.arange(start, start + len(block), device=rows.device)
        if other is None:
            cosines = cosines.masked_fill(own[:, None] == places, -2.0)
        values = torch.cat([best_values, cosines], dim=-1)
        found = torch.cat([best_ids, places.expand(len(ids), -1)], dim=-1)
        best_values, order = values.topk(min(n, values.shape[-1]), dim=-1)
        best_ids = found.gather(-1, order)
    listed = zip(best_ids.tolist(), best_values.tolist())
    return [[Neighbour(i, value) for i, value in zip(*pair) if value > -2.0] for pair in listed]
