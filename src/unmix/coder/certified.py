"""Selections from bfloat16 candidates, proven row by row to be the float32 path's.

Close calls are settled by small products of that path; rows that cannot be proven go through it whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unmix.coder.scoring import Screen, below, count, hits, kth_largest, two_least

CLOSE = 16
"""Close calls a row that are weighed in float64; with more, ties mostly, the float32 path is the cheaper way."""

TOGETHER = 64
"""Rows whose close calls are scored again in one product."""
DENSE = 64
"""Where more than one latent in so many is a candidate, scoring pairs one by one costs more than it saves."""

Exact = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The float32 path on the rows of these numbers `[n]`: `(latent ids [n, k] ascending, pre-activations [n, k])`."""
ExactRagged = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""The same where rows differ in length: `(place of the row among those [c], latent ids [c], pre-activations [c])`."""
Dots = Callable[[Tensor, Tensor], Tensor]
"""float32 pre-activations of pairs `(rows [c], ids [c])`."""
Corner = Callable[[Tensor, Tensor], Tensor]
"""float32 pre-activations `[r, c]` of all pairs of rows `[r]` and latents `[c]`, bit for bit the float32 path's."""


@dataclass(frozen=True)
class Candidates:
    """Pairs that may belong to a row's best, in (token, latent) order, with their float32 scores."""

    rows: Tensor
    ids: Tensor
    counts: Tensor
    """How many of them each row has [n]."""
    z: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Paths:
    """What else can be asked of the float32 path, each costlier than the one before it."""

    dots: Dots
    corner: Corner
    """Of some latents, for some rows."""
    whole: Exact


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


def top_k(screen: Screen, rule: TopKRule, tile_rows: int, paths: Paths) -> tuple[Tensor, Tensor]:
    """`(latent ids [rows, k] ascending, pre-activations [rows, k])`."""
    n = len(screen.x)
    found = _candidates(screen, rule, tile_rows, paths.dots)
    keep, proven = _choose(screen, rule, found, paths.corner)
    again = (~proven).nonzero().squeeze(-1)
    count(n, len(again))
    if not len(again):
        kept = keep.nonzero().squeeze(-1)
        return found.ids.index_select(0, kept).view(n, rule.k), found.z.index_select(0, kept).view(n, rule.k)
    kept = (keep & proven.index_select(0, found.rows)).nonzero().squeeze(-1)
    ids = found.ids.new_empty(n, rule.k)
    z = found.z.new_empty(n, rule.k)
    ids[proven] = found.ids.index_select(0, kept).view(-1, rule.k)
    z[proven] = found.z.index_select(0, kept).view(-1, rule.k)
    ids[again], z[again] = paths.whole(again)
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
        best = tile[:, : size * groups].unflatten(1, (size, groups)).amax(1)
        # The k-th largest of the groups' maxima is no larger than the k-th largest of the row.
        floor = _floor(kth_largest(best, rule.k), screen.margins.screen[start : start + len(tile)], screen.relative)
        crowded = (best.float() >= floor).sum(-1, keepdim=True) > 3 * rule.k
        floor = below(floor).masked_fill_(crowded | ~torch.isfinite(floor), torch.inf)
        places.append(hits(tile, floor).add_(start * n_latents))
    rows, ids, counts = _located(torch.cat(places), len(screen.x), n_latents)
    z = dots(rows, ids)
    gate = screen.gates(z, ids)
    return Candidates(rows, ids, counts, z, gate.abs() if rule.magnitude else gate)


def _located(flat: Tensor, n: int, n_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(rows [c], latent ids [c], entries of each row [n])` of ascending flat places in `[n, n_latents]`."""
    ends = torch.arange(n + 1) * n_latents
    counts = torch.searchsorted(flat, ends).diff()
    starts = ends[:-1].repeat_interleave(counts, output_size=len(flat))
    rows = torch.arange(n).repeat_interleave(counts, output_size=len(flat))
    return rows, starts.neg_().add_(flat), counts


def _floor(kth: Tensor, off: Tensor, relative: float) -> Tensor:
    """The smallest bfloat16 score whose float32 one may reach the float32 score of `kth`, both off by the margin."""
    reach = kth - relative * kth.abs() - 2 * off
    return torch.where(reach >= 0, reach / (1 + relative), reach / (1 - relative))


def _choose(screen: Screen, rule: TopKRule, found: Candidates, corner: Corner) -> tuple[Tensor, Tensor]:
    """Which candidates are kept [c], and of which rows that is proven [n]."""
    k, off = rule.k, 4 * screen.margins.round_off
    padded, place = _pad(found.gate, found.counts, -torch.inf, k + 1)
    last, next_ = two_least(padded.topk(k + 1, sorted=False).values)
    keep = (padded >= last).view(-1).index_select(0, place)
    enough = ((found.counts >= k) & torch.isfinite(last).squeeze(-1)).unsqueeze(-1)
    if rule.positive:
        enough &= last > off
    proven = enough & (last - next_ > off)
    unclear = enough & ~proven
    if not bool(unclear.any()):
        return keep, proven.squeeze(-1)
    close = unclear & (padded >= last - off) & (padded <= next_ + off)
    wanted = k - (padded > next_ + off).sum(-1)
    where = close.view(-1).index_select(0, place).nonzero().squeeze(-1)
    # Two ways to weigh the close ones, the second for what the first leaves open.
    for way in (_weigh, _compare):
        rows, ids = found.rows.index_select(0, where), found.ids.index_select(0, where)
        chosen, settled = way(screen, rule, rows, ids, wanted, corner)
        keep[where] = chosen
        proven |= settled.unsqueeze(-1)
        where = where[~settled.index_select(0, rows)]
        if not len(where):
            break
    return keep, proven.squeeze(-1)


def _weigh(
    screen: Screen, rule: TopKRule, rows: Tensor, ids: Tensor, wanted: Tensor, corner: Corner
) -> tuple[Tensor, Tensor]:
    """The `wanted[row]` best of some close pairs by float64: `(kept [pairs], whether that settles the row [n])`."""
    kept, settled, few = _few(rows, len(wanted))
    rows, ids = rows[few], ids[few]
    if not len(rows):
        return kept, settled
    gate, off = screen.weigh(rows, ids)
    some, counts = rows.unique_consecutive(return_counts=True)
    padded, place = _pad(gate.abs() if rule.magnitude else gate, counts, -torch.inf, 1)
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


def _compare(
    screen: Screen, rule: TopKRule, rows: Tensor, ids: Tensor, wanted: Tensor, corner: Corner
) -> tuple[Tensor, Tensor]:
    """The same by the float32 path's own scores, ties included; the lowest ids win those."""
    kept, settled, few = _few(rows, len(wanted))
    rows, ids = rows[few], ids[few]
    if not len(rows):
        return kept, settled
    gate = screen.gates(cut_out(corner, rows, ids), ids)
    some, counts = rows.unique_consecutive(return_counts=True)
    padded, place = _pad(gate.abs() if rule.magnitude else gate, counts, -torch.inf, 1)
    # Pairs of a row are in order of their ids, and a stable sort keeps equals in it.
    ordered, order = padded.sort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(padded.shape[1]) < wanted[some].unsqueeze(-1)
    settled[some] = torch.where(chosen, ordered, torch.inf).amin(-1) > 0 if rule.positive else True
    kept[few] = torch.zeros_like(chosen).scatter(-1, order, chosen).view(-1)[place]
    return kept, settled


def _few(rows: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing kept [pairs], nothing settled [n], and the places of pairs in rows that have no more than `CLOSE`."""
    few = (torch.bincount(rows, minlength=n) <= CLOSE).index_select(0, rows)
    return torch.zeros_like(few), torch.zeros(n, dtype=torch.bool), few.nonzero().squeeze(-1)


def cut_out(corner: Corner, rows: Tensor, ids: Tensor) -> Tensor:
    """Scores of pairs in row order from small dense products: every pair is scored as in the product of all."""
    parts: list[Tensor] = []
    numbers = rows.unique_consecutive(return_inverse=True)[1]
    edges = torch.searchsorted(numbers, torch.arange(0, int(numbers[-1]) + 1 + TOGETHER, TOGETHER))
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        some, row = rows[start:end].unique_consecutive(return_inverse=True)
        latents, column = ids[start:end].unique(return_inverse=True)
        parts.append(corner(some, latents)[row, column])
    return torch.cat(parts)


def above(
    screen: Screen, floor: Tensor | float, tile_rows: int, dots: Dots, corner: Corner, exact: ExactRagged
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
    rows, ids, _ = _located(torch.cat(places), n, n_latents)
    z = dots(rows, ids)
    least = floor.index_select(0, ids) if isinstance(floor, Tensor) else torch.full_like(z, floor)
    gate = screen.gates(z, ids)
    proven = torch.isfinite(screen.margins.screen).squeeze(-1)
    keep = gate > least
    close = ~((gate - least).abs() > (2 * screen.margins.round_off).squeeze(-1).index_select(0, rows))
    where = close.nonzero().squeeze(-1)
    if len(where) <= CLOSE * n:
        true, off = screen.weigh(rows.index_select(0, where), ids.index_select(0, where))
        distance = true - least.index_select(0, where).double()
        keep[where] = distance > 0
        where = where[~(distance.abs() > off)]
    if 0 < len(where) <= n:
        some, latents = rows.index_select(0, where), ids.index_select(0, where)
        keep[where] = screen.gates(cut_out(corner, some, latents), latents) > least.index_select(0, where)
    else:
        proven[rows.index_select(0, where)] = False
    again = (~proven).nonzero().squeeze(-1)
    if len(again) > n // 2:
        return None
    count(n, len(again))
    if not len(again):
        kept = keep.nonzero().squeeze(-1)
        return rows.index_select(0, kept), ids.index_select(0, kept), z.index_select(0, kept)
    keep &= proven.index_select(0, rows)
    rows, ids, z = rows[keep], ids[keep], z[keep]
    place, more, values = exact(again)
    rows = torch.cat([rows, again[place]])
    order = torch.argsort(rows, stable=True)
    return rows[order], torch.cat([ids, more])[order], torch.cat([z, values])[order]


def _pad(values: Tensor, counts: Tensor, fill: float, least: int) -> tuple[Tensor, Tensor]:
    """Ragged values, `counts[row]` a row, as a matrix `[rows, widest]`, and the flat place of each in it."""
    width = max(least, int(counts.max()))
    # From the place in the list to the place in the matrix: as far as the rows before it fall short of the width.
    short = torch.arange(len(counts)).mul_(width).sub_(counts.cumsum(0) - counts)
    place = short.repeat_interleave(counts, output_size=len(values)).add_(torch.arange(len(values)))
    padded = values.new_full((len(counts), width), fill)
    padded.view(-1).scatter_(0, place, values)
    return padded, place
