"""Closed forms: values and straight-through gradients that are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmix.coder.activations import ACTIVATIONS, make_activation
from unmix.coder.config import BatchTopK, JumpReLU
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError

from .makers import make_coder, make_input


def one_token(coder: SparseCoder, z: list[float], scale: float = 1.0) -> Tensor:
    """Make `coder` (d_in = 1) see the pre-activations `z` for the input 1; decoder norms are `scale`."""
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor(z, dtype=torch.float64)[:, None])
        coder.b_enc.zero_()
        coder.W_dec.fill_(scale)
    return torch.ones(1, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("topk-after", [3, 0, 0, 2]), ("topk-before", [3, 0, 0, 2]), ("topk-none", [3, 0, 0, 2]),
        ("topk-magnitude", [3, -4, 0, 0]), ("batchtopk", [3, 0, 0, 2]), ("relu", [3, 0, 1, 2]),
        ("identity", [3, -4, 1, 2]), ("batchtopk-eval", [3, 0, 1, 2]), ("jumprelu", [3, 0, 0, 2]),
        ("jumprelu-max", [3, 0, 0, 2]), ("groupmax", [3, 0, 0, 2]),
    ],
)  # fmt: skip
def test_codes_of_four_known_pre_activations(name: str, expected: list[float]) -> None:
    """z = (3, −4, 1, 2), k = 2; θ = 1 for jumprelu (1 is not above 1), 0.5 for batchtopk at inference."""
    coder = make_coder(name, 1, 4, 2, pre_bias="none")
    x = one_token(coder, [3, -4, 1, 2])
    if name == "jumprelu":
        with torch.no_grad():
            coder.extra()["threshold"].fill_(1.0)
    codes = coder.encode(x)
    codes.check()
    assert codes.dense().tolist() == [expected]


def test_a_token_below_every_threshold_keeps_its_best_where_it_is_positive() -> None:
    """OpenSAE: θ = 9 cuts everything, and the row's 3 stays; a row of negatives stays empty."""
    coder = make_coder("jumprelu-max", 1, 4, 2, pre_bias="none")
    x = one_token(coder, [3, -4, 1, 2])
    with torch.no_grad():
        coder.extra()["threshold"].fill_(9.0)
    assert coder.encode(x).dense().tolist() == [[3, 0, 0, 0]]
    assert coder.encode(one_token(coder, [-3, -4, -1, -2])).nnz == 0


def test_gated_codes_by_hand() -> None:
    """Scores (3, −4, 1, 2), gate bias −1.5, r_mag = log 2, b_mag = −5: π > 0 at 3 and 2, magnitudes 1 and −1 → 0."""
    coder = make_coder("gated", 1, 4, 2, pre_bias="none")
    x = one_token(coder, [3, -4, 1, 2])
    with torch.no_grad():
        coder.b_enc.fill_(-1.5)
        coder.extra()["r_mag"].fill_(torch.tensor(2.0, dtype=torch.float64).log())
        coder.extra()["b_mag"].fill_(-5.0)
    codes = coder.encode(x)
    torch.testing.assert_close(codes.dense(), torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64))
    assert codes.nnz == 1


@pytest.mark.parametrize(("name", "nnz"), [("topk-after", 3), ("topk-before", 3), ("batchtopk", 1), ("relu", 1)])
def test_negative_pre_activations_are_never_codes(name: str, nnz: int) -> None:
    """Where fewer than k are positive, top-k keeps explicit zeros (k entries a row), the others keep nothing."""
    coder = make_coder(name, 1, 4, 3, pre_bias="none")
    codes = coder.encode(one_token(coder, [-1, 5, -2, -3]))
    assert codes.dense().tolist() == [[0, 5, 0, 0]]
    assert (codes.nnz, codes.uniform_k) == (nnz, 3 if nnz == 3 else None)


@pytest.mark.parametrize(("name", "second"), [("topk-after", 2), ("topk-before", 0)])
def test_relu_before_or_after_selection_pick_other_latents(name: str, second: int) -> None:
    """z = (−1, 5, −0.5, −2): relu after keeps the best two of z; relu before sees zeros, and the lowest id wins."""
    coder = make_coder(name, 1, 4, 2, pre_bias="none")
    codes = coder.encode(one_token(coder, [-1, 5, -0.5, -2]))
    assert sorted(codes.row(0)[0].tolist()) == sorted([1, second])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_jumprelu_gradients_are_those_of_the_formula(scale: float) -> None:
    """∂f/∂z = 1[g > θ] and ∂f/∂θ = −(θ/s)/ε · 1[|g − θ| < ε/2] with g = s·z: Rajamanoharan et al. 2024, eq. 11."""
    gate_space = "raw" if scale == 1 else "decoder_norm"
    coder = make_coder("jumprelu", 1, 6, pre_bias="none", gate_space=gate_space)
    theta, bandwidth = 2.0, 0.8
    gates = torch.tensor([1.4, 1.7, 2.0, 2.3, 2.6, -2.0], dtype=torch.float64)
    x = one_token(coder, (gates / scale).tolist(), scale)
    with torch.no_grad():
        coder.extra()["threshold"].fill_(theta)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    codes = coder.encode(x)
    (codes.dense() * weights).sum().backward()
    fired = gates > theta
    near = (gates - theta).abs() < bandwidth / 2
    assert torch.equal(codes.dense()[0] != 0, fired)
    assert coder.b_enc.grad is not None
    torch.testing.assert_close(coder.b_enc.grad, weights * fired)
    threshold = coder.extra()["threshold"]
    assert threshold.grad is not None
    torch.testing.assert_close(threshold.grad, -weights * theta / scale / bandwidth * near)


def test_jumprelu_reaches_below_the_threshold_only_while_it_learns() -> None:
    """Entries within ε/2 below θ are explicit zeros with gradients on, and absent without."""
    coder = make_coder("jumprelu", 1, 3, pre_bias="none")
    x = one_token(coder, [1.8, 2.2, 0.5])
    with torch.no_grad():
        coder.extra()["threshold"].fill_(2.0)
        assert coder.encode(x).row(0)[0].tolist() == [1]
    codes = coder.encode(x)
    assert [part.tolist() for part in codes.row(0)] == [[0, 1], [0.0, 2.2]]
    assert codes.l0().tolist() == [1]


def test_a_small_threshold_never_lets_negative_values_in() -> None:
    """θ − ε/2 below zero selects from zero on; a threshold below zero acts as zero."""
    coder = make_coder("jumprelu", 1, 3, pre_bias="none")
    x = one_token(coder, [-0.1, 0.05, 0.3])
    for theta, expected in ((0.1, [0, 0, 0.3]), (-5.0, [0, 0.05, 0.3])):
        with torch.no_grad():
            coder.extra()["threshold"].fill_(theta)
        codes = coder.encode(x)
        assert codes.dense().tolist() == [expected]
        assert codes.row(0)[0].tolist() == [1, 2]


def test_batchtopk_selects_over_the_batch_and_by_threshold_at_inference() -> None:
    """Tokens differ in how many latents they get; k·T in all, positive ones only."""
    coder = make_coder("batchtopk", 2, 3, 2, pre_bias="none")
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
        coder.b_enc.zero_()
    x = torch.tensor([[5.0, 4.0], [1.0, -1.0]], dtype=torch.float64)
    assert coder.encode(x).dense().tolist() == [[5, 10, 4], [0, 2, 0]]
    coder.eval()
    with torch.no_grad():
        coder.extra()["threshold"].fill_(4.5)
    assert coder.encode(x).dense().tolist() == [[5, 10, 0], [0, 0, 0]]


def test_an_uncalibrated_threshold_is_refused() -> None:
    """Silently keeping everything would be the published mistake."""
    coder = make_coder("batchtopk", 2, 3, 2)
    with torch.no_grad():
        coder.extra()["threshold"].fill_(-1.0)
    with pytest.raises(ConfigError, match=r"^this batchtopk coder's threshold was never calibrated: train it"):
        coder.eval().encode(make_input(3, 2, "normal"))


def test_gate_space_changes_the_selection_and_not_the_values() -> None:
    """In the decoder's space a long row wins; its code is still z."""
    coder = make_coder("topk-after", 1, 2, 1, pre_bias="none", gate_space="decoder_norm")
    x = one_token(coder, [3.0, 2.0])
    with torch.no_grad():
        coder.W_dec.copy_(torch.tensor([[1.0], [2.0]]))
    assert coder.encode(x).dense().tolist() == [[0, 2]]


def test_extra_parameters() -> None:
    """A threshold a latent is trained; the calibrated scalar is not, and starts as uncalibrated."""
    assert dict(make_coder("relu", 2, 3).named_parameters()).keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    jump = make_activation(JumpReLU(initial_threshold=0.25)).parameters(4)
    assert jump["threshold"].tolist() == [0.25] * 4
    assert make_coder("jumprelu", 2, 3).extra()["threshold"].requires_grad
    assert float(make_activation(BatchTopK(k=2)).parameters(4)["threshold"]) == -1.0
    assert not make_coder("batchtopk", 2, 3).extra()["threshold"].requires_grad


def test_every_activation_is_in_the_registry() -> None:
    """The kinds of the config's union, by their tags."""
    assert ACTIVATIONS.names() == ["topk", "batchtopk", "jumprelu", "groupmax", "gated", "relu", "identity"]
