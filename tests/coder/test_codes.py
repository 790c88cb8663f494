"""The one layout of codes: CSR, ascending latents in a row, explicit zeros and signs kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from unmix.coder.codes import Codes, offsets_of

settings.register_profile("coder", deadline=None, max_examples=60)
settings.load_profile("coder")


@st.composite
def dense_tensors(draw: st.DrawFn) -> Tensor:
    """[*leading, n_latents] of small whole numbers, half of them zero."""
    shape = (*draw(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)), draw(st.integers(1, 6)))
    elements = st.sampled_from([0.0, 0.0, 0.0, 1.0, -2.0, 3.5])
    return torch.from_numpy(draw(arrays("float64", shape, elements=elements)))


@given(dense_tensors())
def test_dense_and_back(dense: Tensor) -> None:
    """Nothing is lost, nothing is added, the layout's promises hold."""
    codes = Codes.from_dense(dense)
    codes.check()
    assert torch.equal(codes.dense(), dense)
    assert (codes.leading, codes.n_latents) == (tuple(dense.shape[:-1]), dense.shape[-1])
    assert (codes.indices.dtype, codes.offsets.dtype) == (torch.int32, torch.int64)
    flat = dense.reshape(-1, dense.shape[-1])
    assert torch.equal(codes.l0(), (flat != 0).sum(-1))
    assert codes.rows == flat.shape[0]
    assert codes.nnz == int((flat != 0).sum())


@given(dense_tensors(), st.data())
def test_rows_can_be_selected_in_any_order_and_more_than_once(dense: Tensor, data: st.DataObject) -> None:
    """By ids (negative ones count from the end) and by mask; one leading dimension comes back."""
    codes = Codes.from_dense(dense)
    flat = dense.reshape(-1, dense.shape[-1])
    n = codes.rows
    ids = torch.tensor(data.draw(st.lists(st.integers(-n, n - 1), max_size=6) if n else st.just([])), dtype=torch.int64)
    chosen = codes.select(ids)
    chosen.check()
    assert torch.equal(chosen.dense(), flat[ids])
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    kept = codes.select(mask.reshape(dense.shape[:-1]))
    kept.check()
    assert torch.equal(kept.dense(), flat[mask])
    assert kept.leading == (int(mask.sum()),)


@given(dense_tensors(), st.data())
def test_entries_can_be_kept_one_by_one(dense: Tensor, data: st.DataObject) -> None:
    """`keep` drops entries, never rows."""
    codes = Codes.from_dense(dense)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=codes.nnz, max_size=codes.nnz)), dtype=torch.bool)
    kept = codes.keep(mask)
    kept.check()
    expected = dense.clone()
    expected[dense != 0] = torch.where(mask, dense[dense != 0], 0.0)
    assert torch.equal(kept.dense(), expected)


@st.composite
def topk_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Unordered distinct latent ids and values (zeros and signs among them)."""
    rows, n, k = draw(st.integers(0, 5)), draw(st.integers(1, 7)), 0
    k = draw(st.integers(1, n))
    ids = [draw(st.permutations(range(n)))[:k] for _ in range(rows)]
    values = draw(arrays("float64", (rows, k), elements=st.sampled_from([0.0, 1.5, -1.0, 2.0])))
    return torch.tensor(ids, dtype=torch.int64).reshape(rows, k), torch.from_numpy(values), n


@given(topk_pairs())
def test_topk_pairs_are_put_in_order(pairs: tuple[Tensor, Tensor, int]) -> None:
    """k entries a row, explicit zeros included, as a view; `nonzero` drops the zeros."""
    ids, values, n = pairs
    codes = Codes.from_topk(ids, values, n)
    codes.check()
    expected = torch.zeros(ids.shape[0], n, dtype=torch.float64).scatter(1, ids, values)
    assert torch.equal(codes.dense(), expected)
    assert codes.nnz == ids.numel()
    view_ids, view_values = codes.topk_view()
    assert view_values.data_ptr() == codes.values.data_ptr()
    assert view_ids.shape == ids.shape
    assert torch.equal(view_ids.long(), ids.sort(-1).values)
    bare = codes.nonzero()
    bare.check()
    assert bare.nnz == int((values != 0).sum())
    assert torch.equal(bare.dense(), expected)
    assert torch.equal(codes.l0(), bare.l0())


def example() -> Codes:
    """Two tokens of 5 latents: {1: 2, 4: -1} and {0: 0 (explicit), 1: 3}."""
    return Codes.from_topk(torch.tensor([[4, 1], [0, 1]]), torch.tensor([[-1.0, 2.0], [0.0, 3.0]]), 5)


def test_one_row() -> None:
    """By number, from the end too; no row beyond the last."""
    codes = example()
    assert [part.tolist() for part in codes.row(0)] == [[1, 4], [2.0, -1.0]]
    assert [part.tolist() for part in codes.row(-1)] == [[0, 1], [0.0, 3.0]]
    for i in (2, -3):
        with pytest.raises(IndexError):
            codes.row(i)
    assert codes.token_rows().tolist() == [0, 0, 1, 1]
    assert codes.l0().tolist() == [2, 1]


def test_a_view_needs_rows_of_one_length() -> None:
    """After `nonzero` they differ."""
    with pytest.raises(ValueError, match="rows differ in length"):
        example().nonzero().topk_view()


def test_context_follows_its_rows() -> None:
    """Selection, detaching and moving take it along, whatever the leading dimensions."""
    mean = torch.arange(4.0).reshape(2, 2, 1).requires_grad_()
    codes = replace(
        Codes.from_dense(torch.eye(4).reshape(2, 2, 4)), context={"mean": mean, "skip": torch.ones(2, 2, 3)}
    )
    chosen = codes.select(torch.tensor([3, 0]))
    assert chosen.context["mean"].tolist() == [[3.0], [0.0]]
    assert chosen.context["skip"].shape == (2, 3)
    assert not codes.detach().context["mean"].requires_grad
    assert codes.to("cpu").context["mean"].shape == (2, 2, 1)
    empty = codes.select(torch.tensor([], dtype=torch.int64))
    assert empty.context["skip"].shape == (0, 3)
    assert empty.select(torch.tensor([], dtype=torch.int64)).context["skip"].shape == (0, 3)


def test_gradients_flow_through_dense() -> None:
    """Each value receives the gradient of its place."""
    values = torch.tensor([[2.0, -1.0]], requires_grad=True)
    codes = Codes.from_topk(torch.tensor([[3, 1]]), values, 4)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    (codes.dense() * weights).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1000.0, 10.0]]
    doubled = codes.with_values(codes.values * 2)
    assert torch.equal(doubled.dense(), codes.dense() * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leading": (3,)}, r"leading \(3,\) does not hold 2 rows"),
        ({"offsets": torch.tensor([0, 2, 3])}, r"offsets run from 0 to 3, expected 0 to 4"),
        ({"offsets": torch.tensor([1, 2, 4])}, r"offsets run from 1 to 4, expected 0 to 4"),
        ({"offsets": torch.tensor([0, 5, 4])}, r"offsets fall"),
        ({"offsets": torch.tensor([0, 1, 4])}, r"a row does not hold uniform_k = 2 entries"),
        ({"indices": torch.tensor([1, 5, 0, 1], dtype=torch.int32)}, r"a latent id lies outside 0 to 4"),
        ({"indices": torch.tensor([-1, 4, 0, 1], dtype=torch.int32)}, r"a latent id lies outside 0 to 4"),
        ({"indices": torch.tensor([4, 1, 0, 1], dtype=torch.int32)}, r"not strictly ascending inside each row"),
        ({"indices": torch.tensor([1, 1, 0, 1], dtype=torch.int32)}, r"not strictly ascending inside each row"),
    ],
)
def test_foreign_codes_that_break_the_layout_are_told_apart(changes: dict[str, object], message: str) -> None:
    """One message for each promise."""
    example().check()
    with pytest.raises(ValueError, match=message):
        replace(example(), **changes).check()


def test_a_mask_must_fit() -> None:
    """Too short a mask would silently drop the last rows."""
    with pytest.raises(ValueError, match=r"^a mask of 1 entries cannot select from 2 rows$"):
        example().select(torch.tensor([True]))
    with pytest.raises(IndexError):
        example().select(torch.tensor([2]))


def test_offsets() -> None:
    """int64, one more than rows."""
    assert offsets_of(torch.tensor([2, 0, 3])).tolist() == [0, 2, 2, 5]
