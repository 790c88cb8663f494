"""KL and CE without whole logits: the same numbers and gradients as with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unmix.train.objectives.predictions import NO_TARGET, Predictions, shared


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


def test_a_shared_loss_keeps_its_value() -> None:
    """And splits its gradient."""
    x = torch.tensor(3.0, requires_grad=True)
    value = shared(x * x, 2)
    assert value.item() == 9.0
    value.backward()
    assert x.grad is not None
    assert x.grad.item() == 3.0
