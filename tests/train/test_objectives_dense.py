"""Every architecture × every term: the sparse path against the dense formula, value and gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coder.largest import Largest
from coder.makers import make_coder, make_input
from unmix.coder import sparse
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.train.checkpoint import TrainState
from unmix.train.config import OptimConfig
from unmix.train.learner import Learner
from unmix.train.objectives import make_term, total
from unmix.train.objectives.specs import AnyTerm, AuxKSpec, GateSpec, L0Spec, L1Spec, MseSpec, MultiTopKSpec

from .dense_terms import FORMULAS, Dense

F, D = 12, 6
VARIANCE = 2.5
PROGRESS = 0.3
KINDS = (
    "topk-after", "topk-before", "topk-none", "topk-magnitude", "batchtopk", "groupmax", "relu", "jumprelu",
    "jumprelu-max", "gated",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "autoencoder": {"skip": False},
    "transcoder": {"d_out": 4, "writes": ("out",), "pre_bias": "none"},
    "skip transcoder": {"d_out": 4, "writes": ("out",), "pre_bias": "own", "skip": True},
    "crosscoder": {"reads": ("a", "b"), "write_widths": (2, 4), "gate_space": "decoder_norm_sum"},
    "several writes": {"d_out": 5, "writes": ("c", "d"), "write_widths": (2, 3), "pre_bias": "none"},
}
COMMON: tuple[AnyTerm, ...] = (
    MseSpec(), MseSpec(prefixes=(1, 5)), MseSpec(prefixes=(4,), reduce="mean"), L1Spec(), L1Spec(norms=False),
    L1Spec(p=1.0, p_end=0.5), AuxKSpec(), AuxKSpec(k=2),
)  # fmt: skip


def specs_of(name: str) -> tuple[AnyTerm, ...]:
    """The terms that a kind may be trained with."""
    kind = name.partition("-")[0]
    more: dict[str, tuple[AnyTerm, ...]] = {
        "topk": (MultiTopKSpec(factor=100), MultiTopKSpec(factor=2)),
        "batchtopk": (MultiTopKSpec(factor=100), MultiTopKSpec(factor=2)),
        "relu": (L0Spec(form="tanh"),),
        "gated": (GateSpec(), GateSpec(sparsity=0.7, sparsity_warmup=0.5), L0Spec(form="tanh", scale=2.0)),
        "jumprelu": (L0Spec(), L0Spec(form="quadratic", target=3.0), L0Spec(form="tanh")),
    }
    found = more.get(kind, ())
    return (*COMMON, *(found[2:] if name == "jumprelu-max" else found))


def learner_of(coder: SparseCoder, specs: tuple[AnyTerm, ...], dead: list[int]) -> Learner:
    """As the trainer would hold it, 30 of 100 steps done and some latents dead."""
    config = OptimConfig(objective=specs, dead_after=10)
    counts = torch.zeros(coder.n_latents, dtype=torch.int64)
    counts[dead] = 10
    terms = [make_term(spec, coder.config) for spec in specs]
    return Learner(coder, TrainState(30, counts, VARIANCE), config, terms, 100)


def assert_as_the_formula(coder: SparseCoder, x: Tensor, specs: tuple[AnyTerm, ...], dead: list[int]) -> None:
    """Loss and every gradient, that of the input included, to 1e-8 of the largest."""
    config = coder.config
    raw = make_input(len(x), config.width_out, "normal", seed=9)
    learner = learner_of(coder, specs, dead)
    x = x.clone().requires_grad_()
    batch = learner.forward(x, x if config.reads == config.writes else raw)
    target = None if config.reads == config.writes else batch.target
    fast, _ = total(learner.terms, batch)
    dense = Dense.of(coder, x, target, variance=VARIANCE, dead=dead, progress=PROGRESS)
    plain = sum((spec.weight * FORMULAS[spec.term](spec, dense) for spec in specs), x.new_zeros(()))
    torch.testing.assert_close(fast, plain, rtol=1e-8, atol=1e-10)
    named = {name: p for name, p in coder.named_parameters() if p.requires_grad}
    if bool(x.any()) or config.normalise.kind == "none":  # a norm of nothing has no slope
        named["x"] = x
    found, wanted = (
        torch.autograd.grad(loss + 0 * sum(p.sum() for p in named.values()), list(named.values()), retain_graph=True)
        for loss in (fast, plain)
    )
    for name, ours, theirs in zip(named, found, wanted, strict=True):
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(
            ours, theirs, rtol=1e-8, atol=1e-8 * max(scale, 1e-3), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(autouse=True, scope="module")
def _small_tiles() -> None:
    """16 rows a tile, so that tiles cut the batches of these tests."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sparse, "TILE_BYTES", 1)
    yield  # pyright: ignore[reportReturnType]
    patch.undo()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KINDS)
def test_every_architecture_with_every_term(name: str, shape: str) -> None:
    """Not left to chance; each term alone, so that one cannot hide another."""
    for spec in specs_of(name):
        coder = make_coder(name, D, F, 3, **{"gate_space": "decoder_norm", **SHAPES[shape]})
        with torch.no_grad():
            coder.W_dec[::4] *= 4  # norms that change which latents are best
        assert_as_the_formula(coder, make_input(40, D, "normal"), (spec,), [0, 1, 3, 4, 5, 7, 9])


@st.composite
def cases(draw: st.DrawFn) -> Callable[[], tuple[SparseCoder, Tensor, tuple[AnyTerm, ...], list[int]]]:
    """A coder, an input, some of its terms with weights, and dead latents."""
    name = draw(st.sampled_from(KINDS))
    style = draw(st.sampled_from(["normal", "normal", "whole", "zeros"]))
    n = draw(st.integers(1, 12))
    k = draw(st.sampled_from([1, n])) if name == "groupmax" else draw(st.sampled_from([1, n, (n + 1) // 2]))
    shape = dict(SHAPES[draw(st.sampled_from(sorted(SHAPES)))])
    rules: list[dict[str, Any]] = [{}] if style == "whole" else [{}, {"kind": "layer_norm"}, {"kind": "constant_norm"}]
    spaces = ["raw", "decoder_norm", "decoder_norm_sum", "own"]
    shape |= {"gate_space": draw(st.sampled_from(spaces)), "normalise": draw(st.sampled_from(rules))}
    if "writes" not in shape:
        shape["pre_bias"] = draw(st.sampled_from(["none", "tied", "own"]))
    scale = draw(st.sampled_from([1.0, 0.5]))
    fitting = [s for s in specs_of(name) if not isinstance(s, MseSpec) or not s.prefixes or s.prefixes[-1] < n]
    chosen = draw(st.lists(st.sampled_from(range(len(fitting))), min_size=1, max_size=3, unique=True))
    weights = draw(st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=3, max_size=3))
    specs = tuple(fitting[i].model_copy(update={"weight": w}) for i, w in zip(chosen, weights, strict=False))
    specs = tuple({spec.term: spec for spec in specs}.values())
    dead = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n))
    rows = draw(st.sampled_from([1, 2, 17, 40]))
    seed = draw(st.integers(0, 1000))
    make = partial(make_coder, name, D, n, k, style != "normal", seed, input_scale=scale, output_scale=4.0, **shape)
    return lambda: (make(), make_input(rows, D, style, seed), specs, sorted(dead))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_any_mix_of_terms(case: Callable[[], tuple[SparseCoder, Tensor, tuple[AnyTerm, ...], list[int]]]) -> None:
    """Over shapes, k = 1 and k = F, ties, zeros, repeated rows, dead latents (all of them too), scales and spaces."""
    assert_as_the_formula(*case())


def test_thresholds_near_zero_learn_from_positive_entries_alone() -> None:
    """The kernel of a small θ reaches below 0, where no code can be."""
    coder = make_coder("jumprelu", D, F)
    with torch.no_grad():
        coder.extra()["threshold"].fill_(0.05)
    assert_as_the_formula(coder, make_input(40, D, "normal"), (MseSpec(), L0Spec(weight=0.5)), [])


def test_a_decoder_row_of_zeros_has_no_slope() -> None:
    """Its norm is 0, and so is what we call its derivative: nothing becomes NaN."""
    for name, spec in (("relu", L1Spec()), ("relu", L1Spec(p=0.5)), ("gated", GateSpec(sparsity=1.0))):
        coder = make_coder(name, D, F)
        with torch.no_grad():
            coder.W_dec[2] = 0
        assert_as_the_formula(coder, make_input(40, D, "normal"), (spec,), [])


def test_a_frozen_decoder_does_not_learn_from_the_gate() -> None:
    """Without its sparsity the term has gradients for the encoder alone."""
    coder, x = make_coder("gated", D, F, pre_bias="own"), make_input(40, D, "normal")
    learner = learner_of(coder, (GateSpec(),), [])
    learner.loss(learner.forward(x, x))[0].backward()
    grads = {name: p.grad is not None and bool(p.grad.any()) for name, p in coder.named_parameters()}
    assert grads == {
        "W_enc": True, "b_enc": True, "b_pre": True, "W_dec": False, "b_dec": False, "r_mag": False, "b_mag": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("relu", L0Spec(), "the term l0 belongs to jumprelu coders, input is relu"),
        ("topk-after", L0Spec(form="tanh"), "the term l0 of form tanh belongs to jumprelu, relu and gated coders"),
        ("jumprelu-max", L0Spec(), "needs thresholds that learn, and those of input .keep_max. do not"),
        ("relu", GateSpec(), "the term gate belongs to gated coders, input is relu"),
        ("groupmax", MultiTopKSpec(), "the term multi_topk belongs to topk and batchtopk coders, input is groupmax"),
        ("relu", MseSpec(prefixes=(3, 12)), "the prefix 12 is not smaller than n_latents = 12"),
    ],
)
def test_a_term_that_means_nothing_for_a_coder_is_refused(name: str, spec: AnyTerm, message: str) -> None:
    """Before anything is trained."""
    with pytest.raises(ConfigError, match=message):
        make_term(spec, make_coder(name, D, F, 3).config)


@pytest.mark.parametrize("name", ["topk-after", "batchtopk", "jumprelu", "gated"])
def test_no_term_makes_anything_dense_beyond_a_tile(name: str) -> None:
    """Value and gradients of every term at once hold no `[tokens, latents]` tensor."""
    rows, n = 400, 256
    coder = make_coder(name, 4, n, 2)
    with torch.no_grad():
        coder.b_enc -= 8  # few latents fire, as in a trained coder
    specs = tuple({spec.term: spec for spec in specs_of(name)}.values())
    learner = learner_of(coder, specs, list(range(0, n, 32)))
    x = make_input(rows, 4, "normal")
    with Largest() as seen:
        learner.loss(learner.forward(x, x))[0].backward()
    assert seen.numel <= rows * n // 4
