"""The selection over shards keeps what one process keeps, ties and zeros included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmix.coder.activations.selection import BatchTopKSelector, Selector, TopKSelector
from unmix.train.parallel.selection import best_of_batch, shared_selector

from .threads import ThreadMesh, together

ROWS, F = 12, 24


def scores(seed: int, dtype: torch.dtype, levels: int) -> Tensor:
    """`[ROWS, F]` numbers of which many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels + 1, (ROWS, F), generator=generator).to(dtype) / 4


def pairs(selector: Selector, part: Tensor, scale: Tensor | None) -> tuple[list[list[int]], list[float]]:
    """`(latents of each row, values)` that a selector keeps, in two tiles."""
    kept = [selector.tile(tile, tile if scale is None else tile * scale) for tile in part.split(5)]
    indices, offsets, values = selector.finish(kept, part)
    return [row.tolist() for row in indices.tensor_split(offsets[1:-1])], values.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("data", "dictionary"), [(1, 2), (2, 2), (1, 4), (3, 1)])
@pytest.mark.parametrize(("magnitude", "relu_first"), [(False, False), (True, False), (False, True)])
def test_top_k_of_all_shards(data: int, dictionary: int, dtype: torch.dtype, magnitude: bool, relu_first: bool) -> None:
    """Row by row; scales that make more ties change nothing."""
    for seed, levels in ((0, 1), (1, 3), (2, 1000)):
        whole = scores(seed, dtype, levels)
        scale = torch.tensor([1.0, 2.0], dtype=dtype).repeat(F // 2)
        expected, values = pairs(TopKSelector(3, magnitude, relu_first), whole, scale)

        def work(mesh: ThreadMesh, whole: Tensor = whole, scale: Tensor = scale) -> tuple[list[list[int]], list[float]]:
            n, rows = F // mesh.dictionary, ROWS // mesh.data
            own = slice(mesh.dictionary_index * n, (mesh.dictionary_index + 1) * n)
            part = whole[mesh.data_index * rows : (mesh.data_index + 1) * rows, own]
            selector = shared_selector(TopKSelector(3, magnitude, relu_first), F, scale[own], mesh)
            return pairs(selector, part, scale[own])

        assert gathered(together(data, dictionary, work), dictionary) == expected
        assert sum(len(row) for row in expected) == len(values) == 3 * ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("data", "dictionary"), [(1, 2), (2, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_top_k_of_the_whole_batch(data: int, dictionary: int, dtype: torch.dtype, k: int) -> None:
    """Among equals the first (token, latent) wins, wherever it lies; with k = 20 all positive entries are kept."""
    for seed, levels in ((0, 1), (1, 3), (2, 1000)):
        whole = scores(seed, dtype, levels)
        expected, _ = pairs(BatchTopKSelector(k, ROWS), whole, None)

        def work(mesh: ThreadMesh, whole: Tensor = whole) -> tuple[list[list[int]], list[float]]:
            n, rows = F // mesh.dictionary, ROWS // mesh.data
            own = slice(mesh.dictionary_index * n, (mesh.dictionary_index + 1) * n)
            part = whole[mesh.data_index * rows : (mesh.data_index + 1) * rows, own]
            return pairs(shared_selector(BatchTopKSelector(k, ROWS), F, None, mesh), part, None)

        assert gathered(together(data, dictionary, work), dictionary) == expected


def gathered(found: list[tuple[list[list[int]], list[float]]], dictionary: int) -> list[list[int]]:
    """Latents of every row over all ranks, by their number in the whole coder."""
    result: list[list[int]] = []
    for start in range(0, len(found), dictionary):
        shards = [rows for rows, _ in found[start : start + dictionary]]
        n = F // dictionary
        result += [
            [latent + i * n for i, row in enumerate(rows) for latent in row] for rows in zip(*shards, strict=True)
        ]
    return result


def test_the_border_is_found_among_close_numbers() -> None:
    """Neighbouring floats, the smallest and the largest there are."""
    top = torch.finfo(torch.float32)
    numbers = torch.tensor([top.max, top.tiny, 1.0, 1.0 + top.eps, 1.0 - top.eps / 2, 2.0, top.smallest_normal])
    keys = torch.arange(len(numbers))
    for budget in range(1, len(numbers)):
        kept = best_of_batch(numbers, keys, budget, ThreadMesh(0, 1, 1))
        best = numbers.sort(descending=True, stable=True).indices[:budget]
        assert kept.nonzero().squeeze(-1).tolist() == sorted(best.tolist())
