"""The small functions inside kernels: 64-bit row starts, keys in the order of numbers, selection by bits."""

from __future__ import annotations

import math

import torch

from unmix.coder.kernels.launching import power_of_two, tiles_of, usable

SPECIAL = [
    0.0,
    -0.0,
    1.5,
    -1.5,
    math.inf,
    -math.inf,
    math.nan,
    -math.nan,
    1e-42,
    -1e-42,
    3e38,
    -3e38,
    1.0,
    2.0,
    -1.0,
    7,
]


def test_rows_start_beyond_32_bits(device: str) -> None:
    """Latents × d and tokens × room pass 2³¹, though each factor is far below it."""
    from coder.kernels import probes

    rows = torch.tensor([0, 1, 131_071, 2**31 - 1], dtype=torch.int32, device=device)
    out = torch.zeros(4, dtype=torch.int64, device=device)
    probes.starts[(1,)](rows, 32_768, out, N=4)
    assert out.tolist() == [row * 32_768 for row in rows.tolist()]
    assert out[2] > 2**31


def test_keys_are_in_the_order_of_numbers(device: str) -> None:
    """Zeros equal, NaN of either sign on top, infinities and subnormal numbers in their places."""
    from coder.kernels import probes

    numbers = torch.tensor(SPECIAL, device=device)
    keys, back = torch.zeros(16, dtype=torch.int64, device=device), torch.zeros(16, device=device)
    probes.ranks[(1,)](numbers, keys, back, N=16)
    real = ~numbers.isnan()
    for i in range(16):
        for j in range(16):
            if real[i] and real[j]:
                assert (keys[i] < keys[j]) == (numbers[i] < numbers[j])
    assert torch.equal(back[real], numbers[real])
    assert keys[~real].tolist() == [2**32 - 1] * 2 and keys.min() >= 0
    assert keys[real].max() < 2**32 - 1


def test_borders_by_bits(device: str) -> None:
    """The k-th largest with repeats and negatives, and the k-th smallest id of some."""
    from coder.kernels import probes

    numbers = torch.tensor([3.0, -1.0, 3.0, 0.5, -7.0, 0.0, 9.0, 3.0], device=device)
    ids = torch.tensor([70_000, 1, 4, 131_071, 0, 2, 5, 3], dtype=torch.int32, device=device)
    for k in (1, 2, 4, 5):
        value, smallest = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        probes.borders[(1,)](numbers, ids, k, value, smallest, N=8)
        assert float(value) == numbers.sort(descending=True).values[k - 1]
        assert int(smallest) == [3, 4, 5, 70_000, 131_071][k - 1]


def test_packed_pairs_come_back(device: str) -> None:
    """Bits of any number, ids of any latent."""
    from coder.kernels import probes

    numbers = torch.tensor(SPECIAL, device=device)
    ids = torch.arange(16, dtype=torch.int32, device=device) * 134_217_727
    value, back = torch.zeros(16, device=device), torch.zeros(16, dtype=torch.int32, device=device)
    probes.packing[(1,)](numbers, ids, value, back, N=16)
    assert torch.equal(value.view(torch.int32), numbers.view(torch.int32))
    assert torch.equal(back, ids)


def test_when_kernels_can_run(device: str) -> None:
    """On one kind of device at a time, and on numbers that they know."""
    assert usable(torch.zeros(2, device=device), torch.zeros(2, dtype=torch.bfloat16, device=device))
    assert not usable(torch.zeros(2, dtype=torch.float64, device=device))
    assert not usable(torch.zeros(2, device="meta"))
    assert tiles_of(torch.float16).latents > 0


def test_powers_of_two() -> None:
    """At least the number, and at least the least."""
    assert [power_of_two(n) for n in (0, 1, 2, 3, 512, 513)] == [1, 1, 2, 4, 512, 1024]
    assert power_of_two(3, 16) == 16
