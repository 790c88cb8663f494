"""What the sparse path would be handed: the same as it computes itself, in its own shapes and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmix.coder import sparse
from unmix.coder.activations.selection import GroupMaxSelector, Selector, ThresholdSelector, TopKSelector
from unmix.coder.kernels import dispatch, encode


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few latents are enough for the kernels."""
    monkeypatch.setattr(encode, "LEAST_SAMPLE", 2)


def pieces(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weights, bias, gate factors."""
    made = (torch.randn(3, 6), torch.randn(70, 6), torch.randn(70), torch.rand(70) + 0.5)
    return made[0].to(device), made[1].to(device), made[2].to(device), made[3].to(device)


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize(
    "selector",
    [TopKSelector(4, relu_first=True), TopKSelector(2, magnitude=True), ThresholdSelector(1.5)],
    ids=["relu", "magnitude", "threshold"],
)
def test_selection(device: str, selector: TopKSelector | ThresholdSelector) -> None:
    """`sparse_affine`'s own triple."""
    x, W, b, scale = pieces(device)
    found = dispatch.select(x, W, b, scale, selector)
    values, indices, offsets = sparse.sparse_affine(x, W, b, None, scale, selector.fresh())
    assert found is not None
    torch.testing.assert_close(found[0], values)
    assert torch.equal(found[1], indices) and torch.equal(found[2], offsets)
    assert [t.dtype for t in found] == [torch.float32, torch.int32, torch.int64]


def test_what_has_no_kernel(device: str) -> None:
    """Other selectors, and float64."""
    x, W, b, scale = pieces(device)
    other: Selector = GroupMaxSelector(2)
    assert dispatch.select(x, W, b, scale, other) is None
    assert dispatch.select(x.double(), W.double(), b.double(), None, TopKSelector(2)) is None
    ids, offsets = torch.zeros(3, dtype=torch.int32), torch.arange(4)
    assert dispatch.rows_summed(W.double(), ids, offsets, torch.ones(3).double()) is None
    assert dispatch.decode_gradients(x.double(), torch.ones(3).double(), W.double(), ids, offsets) is None
    assert dispatch.affine_gradients(torch.ones(3).double(), x.double(), 70, ids, offsets) is None


def test_gradients(device: str) -> None:
    """Of decode and affine, against the sparse path's own backward passes."""
    x, W, b, _ = pieces(device)
    x, W, b = x[:, :6].requires_grad_(), W[:9].requires_grad_(), b[:9].requires_grad_()
    values, indices, offsets = sparse.sparse_affine(x, W, b, None, None, TopKSelector(3))
    values.retain_grad()
    y = sparse.sparse_decode(values, W, indices, offsets)
    decoded = dispatch.rows_summed(W, indices, offsets, values)
    torch.testing.assert_close(decoded, y.detach())
    grad = torch.randn(3, 6, device=device)
    of_values, of_dec = torch.autograd.grad(y, (values, W), grad, retain_graph=True)
    of_x, of_enc, of_b = torch.autograd.grad(values, (x, W, b), of_values)
    found = dispatch.decode_gradients(grad, values.detach(), W.detach(), indices, offsets)
    # W is encoder and decoder here; the decode's part alone is what its own backward pass gives.
    alone = sparse.bag(W.detach(), indices, offsets, of_values)
    assert found is not None
    torch.testing.assert_close(found[0], of_values)
    torch.testing.assert_close(found[1], of_dec - of_enc)
    affine = dispatch.affine_gradients(of_values, x.detach(), 9, indices, offsets)
    assert affine is not None
    torch.testing.assert_close(affine[0], of_enc)
    torch.testing.assert_close(affine[1], of_b)
    torch.testing.assert_close(alone, of_x)
