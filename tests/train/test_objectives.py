"""Every term of the loss against its plain dense formula, in value and gradient, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coder.makers import make_coder, make_input
from unmix.coder import reference
from unmix.coder.sparse import sparse_decode
from unmix.coder.sparse_coder import SparseCoder
from unmix.train.config import OptimConfig
from unmix.train.objectives import Step, Term, total
from unmix.train.objectives.auxk import AuxK
from unmix.train.objectives.l0 import L0
from unmix.train.objectives.l1 import L1
from unmix.train.objectives.mse import MSE
from unmix.train.objectives.specs import AuxKSpec, L0Spec, L1Spec, MseSpec
from unmix.train.trainer import make_terms

from .toys import coder_config

VARIANCE = 2.5


def make_step(coder: SparseCoder, x: Tensor, dead: list[int] | None = None) -> Step:
    """The step that the trainer would make of `x` as input and target."""
    s, _ = coder.prepare(x)
    codes = coder.encoder.codes(coder, s, None)
    y = sparse_decode(codes.values, coder.W_dec, codes.indices, codes.offsets) + coder.b_dec
    return Step(coder, s, s, codes, y, VARIANCE, torch.tensor(dead or [], dtype=torch.int64))


def gradients(value: Tensor, coder: SparseCoder) -> dict[str, Tensor]:
    """Of every trained parameter, zero where the value does not depend on it."""
    named = {name: p for name, p in coder.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def assert_equal_in_value_and_gradients(term: Term, coder: SparseCoder, step: Step, plain: Tensor) -> None:
    """The term's scalar and gradients are those of the formula."""
    value = term(step)
    assert value.shape == ()
    torch.testing.assert_close(value, plain, rtol=1e-9, atol=1e-9)
    wanted = gradients(plain, coder)
    for name, gradient in gradients(value, coder).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def dense_codes(coder: SparseCoder, x: Tensor) -> Tensor:
    """By the plain reference."""
    return reference.encode_dense(coder, x)


@pytest.mark.parametrize("name", ["topk-after", "batchtopk", "jumprelu", "relu"])
def test_mse(name: str) -> None:
    """mean ‖x − x̂‖² / variance."""
    coder, x = make_coder(name, 5, 12, 3), make_input(30, 5, "normal")
    plain = (x - dense_codes(coder, x) @ coder.W_dec - coder.b_dec).square().sum(-1).mean() / VARIANCE
    assert_equal_in_value_and_gradients(MSE(MseSpec(), coder.config), coder, make_step(coder, x), plain)


@pytest.mark.parametrize("gate_space", ["raw", "decoder_norm"])
def test_l1(gate_space: str) -> None:
    """Mean over tokens of Σ f·‖w_dec‖; the decoder's norm learns too."""
    coder, x = make_coder("relu", 5, 12, gate_space=gate_space), make_input(30, 5, "normal")
    plain = (dense_codes(coder, x) * coder.W_dec.norm(dim=-1)).sum(-1).mean()
    assert_equal_in_value_and_gradients(L1(L1Spec(), coder.config), coder, make_step(coder, x), plain)


@pytest.mark.parametrize("pre_bias", ["none", "tied", "own"])
@pytest.mark.parametrize("gate_space", ["raw", "decoder_norm"])
def test_l0(gate_space: str, pre_bias: str) -> None:
    """Mean Σ 1[g > θ] with ∂/∂θ = −(1/ε)·1[|g − θ| < ε/2] over positive entries, and no other gradient."""
    coder, x = make_coder("jumprelu", 5, 12, gate_space=gate_space, pre_bias=pre_bias), make_input(30, 5, "normal")
    theta, bandwidth = coder.extra()["threshold"], 0.8
    bias = coder.input_bias()
    z = (x if bias is None else x - bias) @ coder.W_enc.T + coder.b_enc
    gate = z * coder.W_dec.norm(dim=-1) if gate_space == "decoder_norm" else z
    step = make_step(coder, x)
    value = L0(L0Spec(), coder.config)(step)
    torch.testing.assert_close(value, (gate > theta).double().sum(-1).mean())
    found = gradients(value, coder)
    near = ((gate - theta).abs() < bandwidth / 2) & (gate > 0)
    torch.testing.assert_close(found.pop("threshold"), -near.double().sum(0) / bandwidth / 30)
    assert not any(gradient.any() for gradient in found.values())


def auxk(coder: SparseCoder, k: int) -> AuxK:
    """The term with `k` dead latents a token."""
    return AuxK(AuxKSpec(k=k), coder.config)


def plain_auxk(coder: SparseCoder, x: Tensor, step: Step, dead: list[int], k: int) -> Tensor:
    """Σ‖e − ê‖² / Σ‖e − ē‖², dense: Gao et al. 2024, A.2."""
    e = (step.target - step.reconstruction).detach()
    bias = coder.input_bias()
    z = (x if bias is None else x - bias.detach()) @ coder.W_enc[dead].T + coder.b_enc[dead]
    best = z.topk(min(k, len(dead)), dim=-1)
    f = torch.zeros_like(z).scatter(-1, best.indices, best.values.relu())
    return (e - f @ coder.W_dec[dead]).square().sum() / (e - e.mean(0)).square().sum()


@pytest.mark.parametrize("pre_bias", ["none", "tied", "own"])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_auxk(k: int, pre_bias: str) -> None:
    """Dead latents explain the residual; more than there are dead is all of them."""
    coder, x = make_coder("topk-after", 5, 12, 3, pre_bias=pre_bias), make_input(30, 5, "normal")
    dead = [1, 4, 5, 10]
    step = make_step(coder, x, dead)
    assert_equal_in_value_and_gradients(auxk(coder, k), coder, step, plain_auxk(coder, x, step, dead, k))


def test_auxk_trains_the_dead_and_only_the_dead() -> None:
    """Encoder and decoder rows of dead latents; neither b_dec nor the living (the residual is detached)."""
    coder, x = make_coder("topk-after", 5, 12, 3), make_input(30, 5, "normal")
    dead = [1, 4, 5, 10]
    found = gradients(auxk(coder, 2)(make_step(coder, x, dead)), coder)
    living = [i for i in range(12) if i not in dead]
    for name in ("W_enc", "b_enc", "W_dec"):
        assert found[name][dead].any(), name
        assert not found[name][living].any(), name
    assert not found["b_dec"].any()


def test_auxk_without_anything_to_explain_is_zero() -> None:
    """No dead latent; a residual that is the same for every token."""
    coder, x = make_coder("topk-after", 5, 12, 3), make_input(30, 5, "normal")
    assert float(auxk(coder, 2)(make_step(coder, x))) == 0.0
    step = make_step(coder, x, [1, 2])
    constant = Step(coder, step.x, step.reconstruction + 1, step.codes, step.reconstruction, VARIANCE, step.dead)
    flat = auxk(coder, 2)(constant)
    assert bool(torch.isfinite(flat))
    zero = Step(coder, step.x, step.reconstruction, step.codes, step.reconstruction, VARIANCE, step.dead)
    assert float(auxk(coder, 2)(zero)) == 0.0


def test_a_loss_that_is_no_number_from_auxk_alone_is_dropped() -> None:
    """NaN → 0, as published: the main loss decides whether training can go on."""
    coder, x = make_coder("topk-after", 5, 12, 3), make_input(30, 5, "normal")
    with torch.no_grad():
        coder.W_dec[1] = 1e200
    assert auxk(coder, 2)(make_step(coder, x, [1, 2])).item() == 0.0


def test_the_total_is_the_weighted_sum() -> None:
    """Values are reported unweighted."""
    coder, x = make_coder("relu", 5, 12), make_input(30, 5, "normal")
    step = make_step(coder, x, [2, 3])
    terms: list[Term] = [
        MSE(MseSpec(), coder.config), AuxK(AuxKSpec(weight=0.25, k=2), coder.config),
        L1(L1Spec(weight=3.0), coder.config),
    ]  # fmt: skip
    loss, values = total(terms, step)
    assert list(values) == ["mse", "auxk", "l1"]
    assert loss.item() == pytest.approx(values["mse"] + 0.25 * values["auxk"] + 3.0 * values["l1"])
    assert values["l1"] == pytest.approx(L1(L1Spec(), coder.config)(step).item())


@pytest.mark.parametrize(
    ("kind", "optim", "names"),
    [
        ("topk", {}, ["mse", "auxk"]), ("topk", {"auxk": 0}, ["mse"]),
        ("relu", {"sparsity": 0.1}, ["mse", "auxk", "l1"]),
        ("jumprelu", {"sparsity": 0.1, "auxk": 0}, ["mse", "l0"]), ("jumprelu", {}, ["mse", "auxk"]),
    ],
)  # fmt: skip
def test_the_local_objective(kind: str, optim: dict[str, Any], names: list[str]) -> None:
    """A list of terms, chosen by activation and weights."""
    assert [term.name for term in make_terms(coder_config(kind), OptimConfig(**optim))] == names


def test_k_aux_defaults_to_half_the_width() -> None:
    """And may be set."""
    for config, k_aux in ((OptimConfig(), 5), (OptimConfig(k_aux=7), 7)):
        term = make_terms(coder_config(d=10), config)[1]
        assert isinstance(term, AuxK)
        assert (term.k_aux, term.spec.weight) == (k_aux, 1 / 32)
