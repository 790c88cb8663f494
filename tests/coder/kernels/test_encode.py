"""Scoring fused with selection: whatever the floor, exactly the k best, or exactly what lies above a threshold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unmix.coder.activations.selection import top_lowest
from unmix.coder.kernels import encode, plain
from unmix.coder.kernels.rules import Found, TopRule


def make(t: int, F: int, d: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Random input, encoder and bias."""
    x, W, b = torch.randn(t, d), torch.randn(F, d), torch.randn(F)
    return x.to(device, dtype), W.to(device, dtype), b.to(device)


def expected(x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, rule: TopRule) -> tuple[Tensor, Tensor]:
    """The dense way in float64."""
    z = x.double() @ W.double().T + b.double()
    ids = top_lowest(rule.gate(z, None if scale is None else scale.double()), rule.k)
    return ids, z.gather(1, ids)


def assert_same(found: Found, ids: Tensor, z: Tensor) -> None:
    """Same latents, values to float32."""
    assert found.indices.dtype == torch.int32
    assert found.indices.view(ids.shape).tolist() == ids.tolist()
    torch.testing.assert_close(found.z.view(z.shape).double(), z.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "dtype", "scaled", "t", "F", "d"),
    [
        (TopRule(5), torch.float32, False, 3, 300, 24),
        (TopRule(1), torch.float16, True, 3, 257, 7),
        (TopRule(20, magnitude=True), torch.float32, True, 2, 290, 17),
        (TopRule(4, positive=True), torch.bfloat16, False, 3, 256, 16),
    ],
    ids=str,
)
def test_the_k_best_of_each_token(
    device: str, rule: TopRule, dtype: torch.dtype, scaled: bool, t: int, F: int, d: int
) -> None:
    """Odd sizes, every kind of gate, low precisions (the interpreter multiplies bfloat16 wrongly: up-cast)."""
    x, W, b = make(t, F, d, device, dtype)
    scale = torch.rand(F, device=device) + 0.5 if scaled else None
    found = encode.top_codes(x, W, b, scale, rule, stride=4)
    assert_same(found, *expected(x, W, b, scale, rule))
    assert found.offsets.tolist() == [i * rule.k for i in range(t + 1)]
    assert found.again == 0


def test_many_latents_a_token(device: str) -> None:
    """k of 512, with every latent a candidate."""
    x, W, b = make(1, 700, 8, device)
    found = encode.top_codes(x, W, b, None, TopRule(512), floor=torch.full((1,), -1e9, device=device), capacity=1024)
    assert_same(found, *expected(x, W, b, None, TopRule(512)))
    assert found.again == 0


def test_floors_that_are_wrong_cost_time_and_nothing_else(device: str) -> None:
    """Too high: too few candidates. Too low, or no number: more than there is room for. Then the plain path."""
    x, W, b = make(4, 200, 12, device)
    floor = torch.tensor([1e9, -1e9, math.nan, -1.0], device=device)
    found = encode.top_codes(x, W, b, None, TopRule(6), floor=floor, capacity=128)
    assert_same(found, *expected(x, W, b, None, TopRule(6)))
    assert found.again == 3


def test_ties_go_to_the_lowest_ids(device: str) -> None:
    """Across the border, in whole numbers, zeros of both signs among them; where ties overflow the room, plainly."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (3, 4), generator=generator).float().to(device)
    W = torch.randint(-1, 2, (100, 4), generator=generator).float().to(device)
    b = torch.zeros(100, device=device)
    b[::3] = -0.0
    floor = torch.full((3,), -0.5, device=device)
    for capacity, again in ((128, 0), (16, 3)):
        found = encode.top_codes(x, W, b, None, TopRule(7), floor=floor, capacity=capacity)
        assert_same(found, *expected(x, W, b, None, TopRule(7)))
        assert found.again == again


def test_nan_counts_as_the_largest_as_it_does_in_the_plain_path(device: str) -> None:
    """A token that is no number goes there whole; a latent that is none is a candidate of every token."""
    x, W, b = make(3, 150, 9, device)
    x[1, 2] = math.nan
    W[40] = -math.nan
    found = encode.top_codes(x, W, b, None, TopRule(3), floor=torch.full((3,), 1.0, device=device), capacity=128)
    ids, _ = plain.top(x, W, b, None, TopRule(3))
    assert found.indices.view(3, 3).tolist() == ids.tolist()
    assert all(40 in row for row in ids[[0, 2]].tolist())
    assert found.again == 1


def test_relu_before_the_selection_leaves_rows_of_zeros_to_the_plain_path(device: str) -> None:
    """Fewer than k positive scores: the lowest ids among the zeros fill up."""
    x, W, b = make(2, 300, 6, device)
    b[x.new_ones(300).bool()] = -100.0
    b[:2] = 100.0
    found = encode.top_codes(x, W, b, None, TopRule(4, positive=True), stride=4)
    assert found.indices.view(2, 4).tolist() == [[0, 1, 2, 3]] * 2
    assert found.again == 2


def test_candidates_may_stand_in_any_order(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card they come as programs finish; what is picked or collected of them is the same."""
    score = encode.candidates

    def shuffled(*args: Any) -> tuple[Tensor, Tensor]:
        counts, room = score(*args)
        for count, row in zip(counts.tolist(), room, strict=True):
            row[:count] = row[torch.randperm(count, device=device)]
        return counts, room

    monkeypatch.setattr(encode, "candidates", shuffled)
    x, W, b = make(2, 80, 6, device)
    floor = torch.full((2,), -1.0, device=device)
    assert_same(
        encode.top_codes(x, W, b, None, TopRule(5), floor=floor, capacity=128), *expected(x, W, b, None, TopRule(5))
    )
    found, wanted = encode.threshold_codes(x, W, b, None, 0.5), plain.above(x, W, b, None, torch.full_like(b, 0.5))
    assert found.indices.tolist() == wanted.indices.tolist()
    torch.testing.assert_close(found.z, wanted.z)


@pytest.mark.parametrize("capacity", [64, 16])
@pytest.mark.parametrize("mode", ["number", "latents", "scores"])
def test_all_above_a_threshold(device: str, mode: str, capacity: int) -> None:
    """One floor or one a latent, on gates or scores; ragged rows, an empty one, and rows that overflow."""
    x, W, b = make(5, 90, 10, device)
    x[3] = 0
    b = -b.abs()
    scale = None if mode == "number" else torch.rand(90, device=device) + 0.5
    floor = 2.0 if mode == "number" else torch.rand(90, device=device) * 3
    found = encode.threshold_codes(x, W, b, scale, floor, mode == "scores", capacity)
    z = x.double() @ W.double().T + b.double()
    keep = (z if mode == "scores" or scale is None else z * scale) > floor
    assert found.offsets.diff().tolist() == keep.sum(1).tolist()
    assert found.indices.tolist() == keep.nonzero()[:, 1].tolist()
    torch.testing.assert_close(found.z.double(), z[keep], rtol=1e-5, atol=1e-5)
    assert found.offsets.diff()[3] == 0
    assert (found.again > 0) == (capacity == 16)


def test_of_no_tokens(device: str) -> None:
    """Nothing in, nothing out."""
    x, W, b = make(0, 300, 8, device)
    for found in (encode.top_codes(x, W, b, None, TopRule(3)), encode.threshold_codes(x, W, b, None, 1.0)):
        assert len(found.z) == len(found.indices) == 0
        assert found.offsets.tolist() == [0]


def test_rows_of_wider_tensors_need_no_copy(device: str) -> None:
    """Strides are handed to the kernel."""
    x, W, b = make(3, 260, 10, device)
    wide, tall = torch.cat([x, x], 1), torch.cat([W, W], 1)
    found = encode.top_codes(wide[:, :10], tall[:, :10], b, None, TopRule(2), stride=4)
    assert_same(found, *expected(x, W, b, None, TopRule(2)))


def test_how_deep_the_sample_is_ranked() -> None:
    """The chance that fewer than k reach the floor is a Poisson tail; deeper floors for larger shares of k."""
    for k, sample, n in ((32, 768, 24_576), (64, 2_048, 65_536), (512, 2_048, 65_536)):
        rank, mean = encode.rank_of(k, sample, n), k * sample / n
        tail = 1 - sum(math.exp(-mean) * mean**i / math.factorial(i) for i in range(rank))
        longer = tail + math.exp(-mean) * mean ** (rank - 1) / math.factorial(rank - 1)
        assert tail <= encode.MISSES < longer
        assert encode.room_for(k, rank, sample, n) >= max(k, (rank + 4 * math.sqrt(rank)) * n / sample)
    assert [encode.rank_of(k, n // 32, n) for k, n in ((1, 4096), (32, 24_576), (64, 65_536))] == [2, 6, 8]
