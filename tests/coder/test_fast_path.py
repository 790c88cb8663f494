"""The sparse path equals the plain reference in every value and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from unmix.coder import reference, sparse
from unmix.coder.activations.selection import BatchTopKSelector, _likely_border, top_lowest
from unmix.coder.sparse_coder import SparseCoder

from .largest import Largest
from .makers import ACTIVATIONS, cases, make_coder, make_input


@pytest.fixture(autouse=True, scope="module")
def _small_tiles() -> None:
    """16 rows a tile, the least there is, so that tiles cut the batches of these tests."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sparse, "TILE_BYTES", 1)
    yield  # pyright: ignore[reportReturnType]
    patch.undo()


def value_and_gradients(coder: SparseCoder, x: Tensor, fast: bool) -> dict[str, Tensor]:
    """Codes, output, and gradients of a random weighing of both, by name."""
    x = x.clone().requires_grad_()
    if fast:
        out = coder(x)
        out.codes.check()
        dense, y = out.codes.dense(), out.reconstruction
    else:
        dense = reference.encode_dense(coder, x)
        y = reference.decode_dense(coder, dense, x)
    generator = torch.Generator().manual_seed(7)
    on_codes, on_output = (torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (dense, y))
    parameters = {name: p for name, p in coder.named_parameters() if p.requires_grad}
    loss = (dense * on_codes).sum() + (y * on_output).sum()
    inputs = [x, *parameters.values()]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    named = zip(["x", *parameters], gradients, inputs, strict=True)
    found = {f"grad {name}": torch.zeros_like(p) if g is None else g for name, g, p in named}
    return {"codes": dense.detach(), "output": y.detach(), **found}


def assert_same(coder: SparseCoder, x: Tensor) -> None:
    """Fast path and reference, name by name."""
    fast, plain = value_and_gradients(coder, x, True), value_and_gradients(coder, x, False)
    assert fast.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=150, deadline=None)
@given(cases())
def test_values_and_gradients_equal_the_reference(case: Callable[[], tuple[SparseCoder, Tensor]]) -> None:
    """Every activation × gate space × normalisation × pre-bias × skip, over shapes, ties, zeros and tiles."""
    assert_same(*case())


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gate_space", ["raw", "decoder_norm"])
def test_each_activation_over_several_tiles(name: str, gate_space: str) -> None:
    """Not left to chance: 100 rows are seven tiles, and the transposed weights of a foreign file are strided."""
    coder = make_coder(name, 8, 24, 3, gate_space=gate_space, skip=True)
    for key in ("W_enc", "W_dec"):
        weight = getattr(coder, key)
        setattr(coder, key, torch.nn.Parameter(weight.detach().T.contiguous().T))
        assert not getattr(coder, key).is_contiguous()
    x = make_input(100, 8, "normal")
    assert_same(coder, x)
    assert_same(coder, x.T.contiguous().T)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "topk-after", "batchtopk"])
def test_a_decoder_row_of_zeros_changes_no_selection_rule(name: str) -> None:
    """In the decoder's space its gate is 0; relu codes do not ask."""
    coder = make_coder(name, 4, 6, 2, gate_space="decoder_norm")
    with torch.no_grad():
        coder.W_dec[2] = 0
    assert_same(coder, make_input(20, 4, "normal"))


def by_hand(gate: Tensor, k: int) -> list[list[int]]:
    """The k best of each row by (value descending, id ascending), in plain Python."""
    rows = [sorted(range(len(row)), key=lambda i, r=row: (-r[i], i))[:k] for row in gate.tolist()]
    return [sorted(row) for row in rows]


@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_ties_go_to_the_lowest_id(k: int) -> None:
    """Rows of few distinct values, all equal, all zero; against plain Python."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.randint(0, 3, (50, 7), generator=generator).double()
    gate[0], gate[1] = 1.0, 0.0
    gate[2] = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 1.0])
    assert top_lowest(gate, k).tolist() == by_hand(gate, k)
    many = torch.randint(0, 3, (50, 300), generator=generator).double()
    assert top_lowest(many, k).tolist() == by_hand(many, k)


def test_not_a_number_counts_as_the_largest() -> None:
    """So that it reaches the loss and stops the training, instead of breaking the selection."""
    nan = float("nan")
    gate = torch.tensor([[1.0, nan, 1.0, 1.0], [nan, nan, nan, 0.0], [0.0, 1.0, 2.0, nan]])
    assert top_lowest(gate, 2).tolist()[0] == [0, 1]
    assert all(len(set(row)) == 2 for row in top_lowest(gate, 2).tolist())


@pytest.mark.parametrize("tile", [1, 3, 16, 100])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("whole", [False, True])
def test_batch_selection_does_not_depend_on_tiles(tile: int, k: int, whole: bool) -> None:
    """The k·rows best positive entries of the batch; among equals the first in (token, latent) order."""
    gate = make_input(50, 6, "whole" if whole else "normal")
    flat = gate.flatten().tolist()
    best = sorted((i for i, g in enumerate(flat) if g > 0), key=lambda i: (-flat[i], i))[: 50 * k]
    selector = BatchTopKSelector(k, 50)
    kept = [selector.tile(part * 10, part) for part in gate.split(tile)]
    indices, offsets, values = selector.finish(kept, gate)
    rows = torch.arange(50).repeat_interleave(offsets.diff())
    assert (rows * 6 + indices).tolist() == sorted(best)
    assert values.tolist() == [10 * flat[i] for i in sorted(best)]
    assert offsets.shape == (51,)


def test_a_wrong_guess_of_the_border_costs_time_only() -> None:
    """The sample of every third entry meets all the largest values, so that too few entries exceed the guess."""
    gate = torch.zeros(400, 400, dtype=torch.float64)
    flat = gate.view(-1)
    flat[1:15001:3] = torch.arange(5000.0, dtype=torch.float64) / 5000 + 1
    flat[:1050:3] = 10.0
    assert _likely_border(flat, 800) == 10.0
    selector = BatchTopKSelector(2, 400)
    kept = [selector.tile(gate, gate)]
    indices, offsets, values = selector.finish(kept, gate)
    rows = torch.arange(400).repeat_interleave(offsets.diff())
    best = flat.sort(descending=True, stable=True).indices[:800].sort().values
    assert torch.equal(rows * 400 + indices, best)
    assert torch.equal(values, flat[best])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Wider than bfloat16 can count to: latent ids must not pass through the weights' dtype."""
    coder = make_coder(name, 4, 600 if name != "identity" else 20, 3).to(dtype)
    x = make_input(20, 4, "normal").to(dtype)
    out = coder(x)
    out.codes.check()
    assert out.reconstruction.dtype == out.codes.values.dtype == dtype
    tolerance = {torch.bfloat16: 2e-1, torch.float16: 3e-2, torch.float32: 1e-4}[dtype]
    decoded = reference.decode_dense(coder, out.codes.dense(), x)
    torch.testing.assert_close(out.reconstruction, decoded, rtol=tolerance, atol=10 * tolerance)
    out.reconstruction.sum().backward()
    assert coder.W_enc.grad is not None
    assert bool(torch.isfinite(coder.W_enc.grad).all())


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
def test_nothing_dense_is_made_beyond_a_tile(name: str) -> None:
    """Forward and backward hold no `[tokens, latents]` tensor; the largest one is the tile being scored."""
    rows, F, d = 400, 256, 4
    coder = make_coder(name, d, F, 2)
    with torch.no_grad():
        coder.b_enc -= 8  # few latents fire, as in a trained coder
    x = make_input(rows, d, "normal").requires_grad_()
    with Largest() as seen:
        out = coder(x)
        out.reconstruction.sum().backward()
    assert out.codes.nnz < rows * F // 16
    assert max(16 * F, 2 * out.codes.nnz) < rows * F // 4
    assert seen.numel <= max(16 * F, 2 * out.codes.nnz)


def test_every_row_is_scored_once() -> None:
    """Tiles of any size, down to one for the whole batch."""
    x = make_input(50, 4, "normal")
    coder = make_coder("topk-after", 4, 12, 3)
    patch = pytest.MonkeyPatch()
    results: list[Tensor] = []
    for size in (1, 20 * 12 * 8, 10**9):
        patch.setattr(sparse, "TILE_BYTES", size)
        results.append(coder(x).reconstruction.detach())
    patch.undo()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)
