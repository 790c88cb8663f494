"""One answer for every dtype and layout, wherever the one bad number is."""

from __future__ import annotations

import pytest
import torch

from unmix.formats.stores import finite, is_finite

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 17, 34])
def test_one_bad_number_is_found(dtype: torch.dtype, bad: float, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_CHUNK", 4)
    tensor = torch.randn(5, 7).to(dtype)
    for view in (tensor, tensor.t(), tensor[None]):
        assert is_finite(view)
    tensor.view(-1)[at] = bad
    for view in (tensor, tensor.t(), tensor[None], tensor[:, None, :].expand(5, 2, 7)):
        assert not is_finite(view)


def test_strided_views_look_at_their_own_numbers_only() -> None:
    tensor = torch.ones(4, 6)
    tensor[:, 1] = torch.nan
    assert is_finite(tensor[:, ::2])
    assert not is_finite(tensor[:, 1::2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sums_that_overflow_are_not_infinite_numbers(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


def test_infinities_that_cancel() -> None:
    assert not is_finite(torch.tensor([torch.inf, -torch.inf]))


def test_other_kinds() -> None:
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.arange(3))
    assert is_finite(torch.tensor(True))
    assert is_finite(torch.nn.Parameter(torch.ones(2)))
    assert not is_finite(torch.tensor([1, complex(0, float("nan"))]))
    assert not is_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor(float("inf")))
