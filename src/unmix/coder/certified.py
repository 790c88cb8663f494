"""Selections from bfloat16 candidates, proven row by row to be the float32 path's.

Rows that cannot be proven go through that path whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unmix.coder.scoring import Screen, below, count, hits

CLOSE = 16
"""Close calls a row that are weighed in float64; with more, ties mostly, the float32 path is the cheaper way."""

DENSE = 64
"""Where more than one latent in so many is a candidate, scoring pairs one by one costs more than it saves."""

Exact = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The float32 path on the rows of these numbers `[n]`: `(latent ids [n, k] ascending, pre-activations [n, k])`."""
ExactRagged = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""The same where rows differ in length: `(place of the row among those [c], latent ids [c], pre-activations [c])`."""
Dots = Callable[[Tensor, Tensor], Tensor]
"""float32 pre-activations of pairs `(rows [c], ids [c])`."""


@dataclass(frozen=True)
class Candidates:
    """Pairs that may belong to a row's best, in (token, latent) order, with their float32 scores."""

    rows: Tensor
    ids: Tensor
    z: Tensor
    gate: Tensor


@dataclass(frozen=True)
class TopKRule:
    """What is ranked: the gate, its magnitude, or what is left of it after a ReLU."""

    k: int
    magnitude: bool
    positive: bool
    """Whether the k-th has to be above zero: among zeros the lowest ids win, and those are no candidates."""


def group_size(n_latents: int, k: int) -> int:
    """Latents a group whose maximum stands for it; 0 where there are too few latents for groups to say anything."""
    size = 64
    while size > 1 and n_latents // size < 4 * k:
        size //= 2
    return size if size > 1 else 0


def top_k(screen: Screen, rule: TopKRule, tile_rows: int, dots: Dots, exact: Exact) -> tuple[Tensor, Tensor]:
    """`(latent ids [rows, k] ascending, pre-activations [rows, k])`."""
    n = len(screen.x)
    found = _candidates(screen, rule, tile_rows, dots)
    keep, proven = _choose(screen, rule, found, n)
    ids = found.ids.new_empty(n, rule.k)
    z = found.z.new_empty(n, rule.k)
    keep &= proven[found.rows]
    ids[proven] = found.ids[keep].view(-1, rule.k)
    z[proven] = found.z[keep].view(-1, rule.k)
    again = (~proven).nonzero().squeeze(-1)
    if len(again):
        ids[again], z[again] = exact(again)
    count(n, len(again))
    return ids, z


def _candidates(screen: Screen, rule: TopKRule, tile_rows: int, dots: Dots) -> Candidates:
    """Every entry that the margins do not exclude; rows with too many of them have none."""
    n_latents = screen.W.shape[0]
    size = group_size(n_latents, rule.k)
    groups = n_latents // size
    places: list[Tensor] = []
    for start, tile in screen.tiles(tile_rows):
        if rule.magnitude:
            tile.abs_()
        best = tile[:, : size * groups].unflatten(1, (size, groups)).amax(1).float()
        # The k-th largest of the groups' maxima is no larger than the k-th largest of the row.
        kth = best.topk(rule.k, sorted=False).values.amin(-1, keepdim=True)
        floor = _floor(kth, screen.margins.screen[start : start + len(tile)], screen.relative)
        crowded = (best >= floor).sum(-1, keepdim=True) > 2 * rule.k
        floor = below(floor).masked_fill_(crowded | ~torch.isfinite(floor), torch.inf)
        places.append(hits(tile, floor).add_(start * n_latents))
    flat = torch.cat(places)
    rows = flat // n_latents
    ids = flat - rows * n_latents
    z = dots(rows, ids)
    gate = screen.gates(z, ids)
    return Candidates(rows, ids, z, gate.abs() if rule.magnitude else gate)


def _floor(kth: Tensor, off: Tensor, relative: float) -> Tensor:
    """The smallest bfloat16 score whose float32 one may reach the float32 score of `kth`, both off by the margin."""
    reach = kth - relative * kth.abs() - 2 * off
    return torch.where(reach >= 0, reach / (1 + relative), reach / (1 - relative))


def _choose(screen: Screen, rule: TopKRule, found: Candidates, n: int) -> tuple[Tensor, Tensor]:
    """Which candidates are kept [c], and of which rows that is proven [n]."""
    k, off = rule.k, 4 * screen.margins.round_off
    counts = torch.bincount(found.rows, minlength=n)
    padded, place = _pad(found.gate, found.rows, counts, -torch.inf, k + 1)
    best = padded.topk(k + 1).values
    last, next_ = best[:, k - 1 : k], best[:, k:]
    keep = (padded >= last).view(-1)[place]
    enough = (counts >= k) & torch.isfinite(last).squeeze(-1)
    if rule.positive:
        enough &= (last > off).squeeze(-1)
    proven = enough & (last - next_ > off).squeeze(-1)
    unclear = (enough & ~proven).unsqueeze(-1)
    close = unclear & (padded >= last - off) & (padded <= next_ + off)
    where = close.view(-1)[place].nonzero().squeeze(-1)
    if len(where):
        wanted = k - (padded > next_ + off).sum(-1)
        keep[where], settled = _weigh(screen, rule, found.rows[where], found.ids[where], wanted)
        proven |= settled
    return keep, proven


def _weigh(screen: Screen, rule: TopKRule, rows: Tensor, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The `wanted[row]` best of some close pairs by float64: `(kept [pairs], whether that settles the row [n])`."""
    n = len(wanted)
    counts = torch.bincount(rows, minlength=n)
    few = (counts <= CLOSE)[rows]
    kept = torch.zeros_like(few)
    settled = torch.zeros(n, dtype=torch.bool)
    rows, ids = rows[few], ids[few]
    if not len(rows):
        return kept, settled
    gate, off = screen.weigh(rows, ids)
    some, local = rows.unique_consecutive(return_inverse=True)
    counts = torch.bincount(local)
    padded, place = _pad(gate.abs() if rule.magnitude else gate, local, counts, -torch.inf, 1)
    margin = torch.zeros_like(padded)
    margin.view(-1)[place] = off
    ordered, order = padded.sort(dim=-1, descending=True)
    margin = margin.gather(-1, order)
    chosen = torch.arange(padded.shape[1]) < wanted[some].unsqueeze(-1)
    lowest = torch.where(chosen, ordered - margin, torch.inf).amin(-1)
    highest = torch.where(chosen, -torch.inf, ordered + margin).amax(-1)
    settled[some] = (lowest > highest) & (lowest > 0 if rule.positive else True)
    kept[few] = torch.zeros_like(chosen).scatter(-1, order, chosen).view(-1)[place]
    return kept, settled


def above(
    screen: Screen, floor: Tensor | float, tile_rows: int, dots: Dots, exact: ExactRagged
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`(rows, latent ids, pre-activations)` [nnz] of gates above `floor`, in (token, latent) order.

    None where so many latents fire that the float32 product is the cheaper way.
    """
    n, n_latents = len(screen.x), screen.W.shape[0]
    places: list[Tensor] = []
    for start, tile in screen.tiles(tile_rows):
        reach = below(-screen.margins.screen[start : start + len(tile)] / (1 - screen.relative))
        # A row whose margins are not finite has no candidates, and is not proven either.
        reach = reach.masked_fill(~torch.isfinite(reach), torch.inf)
        places.append(hits(tile, reach).add_(start * n_latents))
        if len(places[-1]) > len(tile) * n_latents // DENSE:
            return None
    flat = torch.cat(places)
    rows = flat // n_latents
    ids = flat - rows * n_latents
    z = dots(rows, ids)
    least = floor[ids] if isinstance(floor, Tensor) else torch.full_like(z, floor)
    gate = screen.gates(z, ids)
    proven = torch.isfinite(screen.margins.screen).squeeze(-1)
    keep = gate > least
    close = ~((gate - least).abs() > 2 * screen.margins.round_off.squeeze(-1)[rows])
    where = close.nonzero().squeeze(-1)
    if len(where) <= CLOSE * n:
        true, off = screen.weigh(rows[where], ids[where])
        distance = true - least[where].double()
        keep[where] = distance > 0
        where = where[~(distance.abs() > off)]
    proven[rows[where]] = False
    again = (~proven).nonzero().squeeze(-1)
    if len(again) > n // 2:
        return None
    count(n, len(again))
    keep &= proven[rows]
    rows, ids, z = rows[keep], ids[keep], z[keep]
    if not len(again):
        return rows, ids, z
    place, more, values = exact(again)
    rows = torch.cat([rows, again[place]])
    order = torch.argsort(rows, stable=True)
    return rows[order], torch.cat([ids, more])[order], torch.cat([z, values])[order]


def _pad(values: Tensor, rows: Tensor, counts: Tensor, fill: float, least: int) -> tuple[Tensor, Tensor]:
    """Ragged values as a matrix `[rows, widest]`, and the flat place of each in it."""
    width = max(least, int(counts.max()))
    first = counts.cumsum(0) - counts
    place = torch.arange(len(rows)) - first[rows] + rows * width
    padded = values.new_full((len(counts), width), fill)
    padded.view(-1)[place] = values
    return padded, place
