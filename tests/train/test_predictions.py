"""KL and CE without whole logits: the same numbers and gradients as with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unmix.train.objectives import tiles
from unmix.train.objectives.predictions import NO_TARGET, Predictions, shared
from unmix.train.objectives.tiles import LinearHead, TiledKL


def some(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, nn.Linear]:
    """`(spliced, original, targets, head)`."""
    torch.manual_seed(0)
    targets = torch.randint(0, 50, (17,))
    targets[::5] = NO_TARGET
    head = nn.Linear(6, 50).to(dtype).requires_grad_(False)
    return torch.randn(17, 6, dtype=dtype, requires_grad=True), torch.randn(17, 6, dtype=dtype), targets, head


@pytest.mark.parametrize("chunk", [1, 1000, 2**20])
@pytest.mark.parametrize("wanted", [("kl",), ("ce",), ("kl", "ce")])
def test_values_and_gradients_are_those_of_whole_logits(chunk: int, wanted: tuple[str, ...]) -> None:
    """However the rows are cut."""
    spliced, original, targets, head = some()
    made = Predictions(spliced, original, targets, head, wanted, chunk)  # pyright: ignore[reportArgumentType]
    found = {name: made.loss(name) for name in wanted}  # pyright: ignore[reportArgumentType]
    log_p, log_q = head(original).log_softmax(-1), head(spliced).log_softmax(-1)
    expected = {
        "kl": functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
        "ce": functional.cross_entropy(head(spliced), targets, ignore_index=NO_TARGET),
    }
    weights = {"kl": 2.0, "ce": 0.3}
    (grad,) = torch.autograd.grad(torch.stack([weights[n] * found[n] for n in wanted]).sum(), spliced)
    (true,) = torch.autograd.grad(torch.stack([weights[n] * expected[n] for n in wanted]).sum(), spliced)
    for name in wanted:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-12)
    torch.testing.assert_close(grad, true, rtol=1e-10, atol=1e-14)


def test_bfloat16_is_compared_in_float32() -> None:
    """The value is that of the float32 softmax of the bfloat16 logits; gradients come in bfloat16."""
    spliced, original, targets, head = some(torch.bfloat16)
    loss = Predictions(spliced, original, targets, head, ("kl",)).loss("kl")
    log_p, log_q = head(original).float().log_softmax(-1), head(spliced).float().log_softmax(-1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-6)
    loss.backward()
    assert spliced.grad is not None
    assert spliced.grad.dtype == torch.bfloat16


def test_tokens_that_a_model_rules_out_cost_nothing() -> None:
    """−inf in both, or in the original alone."""
    original = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    spliced = torch.tensor([[0.5, 0.0, -torch.inf, 0.2]], dtype=torch.float64, requires_grad=True)
    loss = Predictions(spliced, original, torch.tensor([0]), nn.Identity(), ("kl",)).loss("kl")
    p, log_q = original.softmax(-1)[0, :2], spliced.log_softmax(-1)[0, :2]
    assert loss.item() == pytest.approx((p * (p.log() - log_q)).sum().item())
    loss.backward()
    assert spliced.grad is not None
    assert bool(torch.isfinite(spliced.grad).all())


def split(head: nn.Linear, scale: float = 3.0) -> LinearHead:
    """A head that ends in a product, behind something that is not linear."""
    return LinearHead(lambda x: (scale * x).tanh(), head.weight, head.bias)


@pytest.mark.parametrize("tile", [1, 7, 25, 64])
@pytest.mark.parametrize("chunk", [1, 1000, 2**20])
def test_tiles_of_the_vocabulary_give_the_same(tile: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, however the vocabulary and the rows are cut."""
    monkeypatch.setattr(tiles, "TILE", tile)
    spliced, original, targets, linear = some()
    head = split(linear)
    loss = Predictions(spliced, original, targets, head, ("kl",), chunk).loss("kl")
    log_p, log_q = head(original).log_softmax(-1), head(spliced).log_softmax(-1)
    true = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert loss.item() == pytest.approx(true.item(), rel=1e-11)
    (grad,) = torch.autograd.grad(2 * loss, spliced)
    (expected,) = torch.autograd.grad(2 * true, spliced)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_tiles_far_apart_in_size_do_not_overflow() -> None:
    """Logits of some tiles are hundreds above those of others."""
    torch.manual_seed(0)
    weight = torch.randn(12, 4, dtype=torch.float64)
    weight[8:] *= 400
    q, p = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    value, grad = TiledKL(LinearHead(nn.Identity(), weight), torch.float64, 4)(q, p, True)
    log_p, log_q = (p @ weight.T).log_softmax(-1), (q @ weight.T).log_softmax(-1)
    torch.testing.assert_close(value, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, (log_q.exp() - log_p.exp()) @ weight, rtol=1e-10, atol=1e-12)


def test_a_tile_that_is_ruled_out_goes_by_whole_rows() -> None:
    """A bias of −inf over a whole tile: no softmax inside it, and the KL is what it is without those tokens."""
    spliced, original, targets, linear = some()
    bias = linear.bias.detach().clone()
    bias[:10] = -torch.inf
    made = Predictions(spliced, original, targets, LinearHead(nn.Identity(), linear.weight, bias), ("kl",))
    kept = [x @ linear.weight[10:].T + bias[10:] for x in (original, spliced)]
    log_p, log_q = (z.log_softmax(-1) for z in kept)
    loss = made.loss("kl")
    assert loss.item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-11)
    loss.backward()
    assert spliced.grad is not None
    assert bool(torch.isfinite(spliced.grad).all())


def test_tiles_of_a_bfloat16_head_are_softmaxed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value to float32's rounding, the gradient to bfloat16's."""
    monkeypatch.setattr(tiles, "TILE", 16)
    spliced, original, targets, linear = some(torch.bfloat16)
    head = LinearHead(nn.Identity(), linear.weight, linear.bias)
    loss = Predictions(spliced, original, targets, head, ("kl",)).loss("kl")
    # As the product and then the bias are rounded.
    log_p, log_q = ((x @ linear.weight.T + linear.bias).float().log_softmax(-1) for x in (original, spliced))
    true = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(true.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, spliced)
    (expected,) = torch.autograd.grad(true, spliced)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.float(), expected.float(), rtol=0.02, atol=2e-4)


def test_nothing_is_kept_for_a_backward_that_nobody_asks_for() -> None:
    """Rows without gradients, and none at all."""
    spliced, original, targets, linear = some()
    loss = Predictions(spliced.detach(), original, targets, split(linear), ("kl",)).loss("kl")
    assert not loss.requires_grad
    nothing = Predictions(spliced[:0], original[:0], targets[:0], split(linear), ("kl",)).loss("kl")
    assert nothing.item() == 0.0


def test_a_shared_loss_keeps_its_value() -> None:
    """And splits its gradient."""
    x = torch.tensor(3.0, requires_grad=True)
    value = shared(x * x, 2)
    assert value.item() == 9.0
    value.backward()
    assert x.grad is not None
    assert x.grad.item() == 3.0
