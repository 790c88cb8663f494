"""Products on dense tiles equal the sparse path in every value and every gradient, and are taken where they pay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmix.coder import dense_path, sparse
from unmix.coder.codes import offsets_of

from .largest import Largest
from .makers import ACTIVATIONS, make_coder, make_input
from .test_fast_path import value_and_gradients


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Products everywhere, on tiles of 16 rows; lists what was computed by them."""
    called: list[str] = []

    def noting(name: str):
        plain = getattr(dense_path, name)

        def noted(*args: object) -> object:
            called.append(name)
            return plain(*args)

        return noted

    for name in ("decode", "dots", "decode_gradients", "affine_gradients"):
        monkeypatch.setattr(dense_path, name, noting(name))
    for name in ("FORWARD", "BACKWARD", "LEAST_CELLS"):
        monkeypatch.setattr(dense_path, name, -1)
    monkeypatch.setattr(dense_path, "TILE_BYTES", 1)
    return called


@pytest.mark.parametrize("gate_space", ["raw", "decoder_norm"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_equal_the_sparse_path(name: str, gate_space: str, request: pytest.FixtureRequest) -> None:
    """60 rows are three tiles, the last with a remainder; the transposed weights of a foreign file are strided."""
    coder = make_coder(name, 8, 24, 4, gate_space=gate_space, pre_bias="own")
    for key in ("W_enc", "W_dec"):
        weight = getattr(coder, key)
        setattr(coder, key, torch.nn.Parameter(weight.detach().T.contiguous().T))
    x = make_input(60, 8, "normal")
    expected = value_and_gradients(coder, x, True)
    called = request.getfixturevalue("products")
    found = value_and_gradients(coder, x, True)
    assert called == ["decode", "decode_gradients", "affine_gradients"]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 31, 40])
def test_rows_of_any_number_and_length(rows: int, products: list[str]) -> None:
    """Against one dense product; rows without entries, and an entry that is there twice."""
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(0, 5, (rows,), generator=generator)
    indices = torch.randint(0, 7, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    values = torch.randn(len(indices), generator=generator, dtype=torch.float64)
    W = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    left = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    offsets, token = offsets_of(lengths), torch.arange(rows).repeat_interleave(lengths)
    dense = torch.zeros(rows, 7, dtype=torch.float64).index_put((token, indices.long()), values, accumulate=True)
    torch.testing.assert_close(sparse.sparse_decode(values, W, indices, offsets), dense @ W, rtol=1e-12, atol=1e-12)
    found = sparse.entry_dots(left, W, indices, offsets)
    torch.testing.assert_close(found, (left @ W.T)[token, indices.long()], rtol=1e-12, atol=1e-12)
    assert products == (["decode", "dots"] if rows else [])


@pytest.mark.parametrize("which", ["values", "W_dec"])
def test_only_what_is_asked_for_has_a_gradient(which: str, products: list[str]) -> None:
    """A frozen decoder (the gate's term) or frozen codes."""
    indices, offsets = torch.tensor([0, 2, 1], dtype=torch.int32), torch.tensor([0, 2, 3])
    parts = {"values": torch.ones(3), "W_dec": torch.eye(3)}
    parts[which].requires_grad_()
    sparse.sparse_decode(parts["values"], parts["W_dec"], indices, offsets).sum().backward()
    other = parts["W_dec" if which == "values" else "values"]
    assert parts[which].grad is not None and other.grad is None


def codes_of(density: float, dtype: torch.dtype = torch.float32, rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """`(indices, offsets, table)` over 1024 latents."""
    k = round(1024 * density)
    return (
        torch.arange(k, dtype=torch.int32).repeat(rows),
        torch.arange(rows + 1) * k,
        torch.zeros(1024, 4, dtype=dtype),
    )


@pytest.mark.parametrize("crossing", [dense_path.FORWARD, dense_path.BACKWARD])
def test_products_are_taken_above_a_density(crossing: float) -> None:
    """And not for a few rows, nor in dtypes whose sums over tiles would lose digits."""
    assert dense_path.pays(*codes_of(crossing * 1.1), crossing)
    assert not dense_path.pays(*codes_of(crossing * 0.9), crossing)
    assert not dense_path.pays(*codes_of(0.5, rows=8), crossing)
    assert not dense_path.pays(*codes_of(0.5, torch.bfloat16), crossing)


def test_half_of_the_latents_firing_makes_no_dense_tensor_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the start of a training under a penalty: the largest tensors are the pairs themselves."""
    monkeypatch.setattr(sparse, "TILE_BYTES", 1)
    monkeypatch.setattr(dense_path, "TILE_BYTES", 1)
    coder = make_coder("relu", 4, 256)
    with torch.no_grad():
        coder.b_enc.copy_(-0.5 * coder.W_enc.norm(dim=-1))
    x = make_input(800, 4, "normal").requires_grad_()
    with Largest() as seen:
        out = coder(x)
        out.reconstruction.sum().backward()
    assert out.codes.nnz > dense_path.FORWARD * 800 * 256
    assert seen.numel <= out.codes.nnz < 800 * 256 // 2
