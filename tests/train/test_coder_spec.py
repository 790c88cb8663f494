"""What a run file may say of a coder and its training: defaults, and clear words where fields do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unmix.coder.config import BatchTopK, CoderConfig, GroupMax, JumpReLU, TopK
from unmix.coder.encoder import AffineEncoder
from unmix.core.config import build
from unmix.core.errors import ConfigError
from unmix.core.policy import InputPolicy
from unmix.train.annealing import KAnnealing
from unmix.train.checkpoint import TrainState
from unmix.train.config import CoderSpec, OptimConfig, holds_unit_norm, objective_of
from unmix.train.initialise import initialise
from unmix.train.learner import Learner
from unmix.train.objectives import make_term
from unmix.train.objectives.specs import L1Spec, MseSpec
from unmix.train.source import TensorSource
from unmix.train.spaces import inner_target

from .toys import coder_config, planted


def built(reads: Any = "a", writes: Any = "a", d_in: Any = 8, d_out: Any = 8, **fields: Any) -> CoderConfig:
    """The config of a coder between hooks of these widths."""
    spec = build(CoderSpec, {"hook": reads, "write": None if writes == reads else writes, "k": 4, **fields})
    return spec.build(reads, writes, d_in, d_out, InputPolicy(), None)


def learner_of(coder: CoderConfig, steps: int = 100, done: int = 0, **fields: Any) -> Learner:
    """Ready to train in memory."""
    config = OptimConfig(**fields)
    terms = [make_term(spec, coder) for spec in objective_of(coder.activation.kind, config)]
    source = TensorSource(planted(200, coder.d_in, 12, 2)[0])
    model, variance = initialise(coder, source, config)
    return Learner(
        model, TrainState(done, torch.zeros(coder.n_latents, dtype=torch.int64), variance), config, terms, steps
    )


def test_every_kind_can_be_asked_for() -> None:
    """With its own fields alone."""
    assert built(activation="topk", relu="none").activation == TopK(k=4, relu="none")
    assert built(activation="batchtopk").activation == BatchTopK(k=4)
    assert built(activation="groupmax").activation == GroupMax(k=4)
    found = built(activation="jumprelu", k=32, threshold=0.5).activation
    assert found == JumpReLU(initial_threshold=0.5, bandwidth=1.0)
    assert {built(activation=kind, k=32).activation.kind for kind in ("gated", "relu")} == {"gated", "relu"}


def test_a_crosscoder() -> None:
    """Its inputs side by side, standardised, and picked by the sum of its parts' norms."""
    config = built(("a", "b"), ("a", "b"), (8, 8), (8, 8), expansion=4)
    assert (config.d_in, config.d_out, config.n_latents, config.parts()) == (16, 16, 32, (8, 8))
    assert (config.gate_space, config.normalise.kind, config.pre_bias) == ("decoder_norm_sum", "standardise", "tied")
    assert built(("a", "b"), ("a", "b"), (8, 8), (8, 8), activation="relu", k=32).gate_space == "raw"
    uneven = built(("a", "b"), ("a", "b"), (8, 4), (8, 4), normalise={"kind": "none"})
    assert (uneven.write_widths, uneven.normalise.kind) == ((8, 4), "none")


def test_a_transcoder_to_several_hooks() -> None:
    """One read: a layer of a cross-layer transcoder."""
    config = built("a", ("b", "c"), 8, (8, 6), skip=True)
    assert (config.reads, config.writes, config.d_in, config.d_out) == (("a",), ("b", "c"), 8, 14)
    assert (config.gate_space, config.normalise.kind, config.pre_bias, config.skip) == ("raw", "none", "none", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "gated", "k": 3}, "k belongs to topk, batchtopk and groupmax; activation is 'gated'"),
        ({"activation": "topk", "threshold": 0.5}, "threshold belongs to jumprelu; activation is 'topk'"),
        ({"activation": "groupmax", "k": None}, "activation 'groupmax' needs k"),
        ({"n_latents": 16, "k": 17}, "k is 17, larger than n_latents = 16"),
        ({"hook": ["a", "a"]}, "hook needs one hook at least, and each once; found ['a', 'a']"),
        ({"hook": []}, "hook needs one hook at least, and each once; found []"),
        ({"write": "b", "normalise": {"kind": "standardise"}}, "normalise 'standardise' is of coders that write what"),
        ({"gate_space": "decoder_norm_sum"}, "gate_space 'decoder_norm_sum' adds the norms of several writes"),
        ({"activation": "gate"}, "activation: Input should be 'topk', 'batchtopk', 'groupmax', 'jumprelu', 'gated'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(fields: dict[str, Any], message: str) -> None:
    """Before any model is loaded."""
    with pytest.raises(ConfigError) as error:
        build(CoderSpec, {"hook": "a", **fields})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_l0": 20}, "target_l0 needs sparsity, the weight of its penalty"),
        ({"k_anneal": 0.3}, "k_anneal needs k_start"),
        ({"objective": [{"term": "mse"}], "prefixes": [4]}, "prefixes is a field of the objective's own term"),
        ({"objective": [{"term": "mse", "prefixes": [4, 4]}]}, "prefixes must be positive and ascending, found [4, 4]"),
        ({"objective": [{"term": "mse", "reduce": "mean"}]}, "reduce belongs to prefixes, and there are none"),
        ({"objective": [{"term": "l1", "p_end": 1.5}]}, "p_end is 1.5, p is 1: annealing makes p smaller"),
        ({"objective": [{"term": "l0", "target": 5}]}, "target belongs to form: quadratic, which needs it"),
        ({"objective": [{"term": "l0", "start": 0.5, "stop": 0.5}]}, "start is 0.5, stop 0.5: the term"),
    ],
)  # fmt: skip
def test_objectives_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    """Fields of the training and of its terms."""
    with pytest.raises(ConfigError) as error:
        build(OptimConfig, fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "fields", "names"),
    [
        ("topk", {"prefixes": (4, 8)}, ["mse", "auxk"]),
        ("gated", {"sparsity": 0.1}, ["mse", "auxk", "gate"]),
        ("gated", {}, ["mse", "auxk", "gate"]),
        ("groupmax", {"auxk": 0}, ["mse"]),
        ("jumprelu", {"sparsity": 1.0, "target_l0": 20}, ["mse", "auxk", "l0"]),
    ],
)
def test_default_objectives(kind: str, fields: dict[str, Any], names: list[str]) -> None:
    """Of the kinds and fields that are not in `test_objectives.py`."""
    config = OptimConfig(**fields)
    specs = objective_of(kind, config)
    assert [spec.term for spec in specs] == names
    first, last = specs[0], specs[-1]
    assert isinstance(first, MseSpec)
    assert first.prefixes == config.prefixes
    if last.term == "l0":
        assert (last.form, last.target, last.warmup) == ("quadratic", 20, 0.05)
    if last.term == "gate":
        assert (last.sparsity, last.sparsity_warmup, last.weight) == (config.sparsity, 0.05, 1.0)


def test_penalties_of_other_kinds_are_refused() -> None:
    """Rather than ignored."""
    with pytest.raises(ConfigError, match=r"sparsity is 0\.1, but groupmax coders have no penalty"):
        objective_of("groupmax", OptimConfig(sparsity=0.1))
    with pytest.raises(ConfigError, match="target_l0 belongs to jumprelu coders, and this one is relu"):
        objective_of("relu", OptimConfig(sparsity=0.1, target_l0=5))


def test_unit_norm_is_off_where_a_penalty_holds_norms() -> None:
    """And as it is said, where it is said."""
    on = {kind: holds_unit_norm(kind, OptimConfig(sparsity=0.1)) for kind in ("relu", "gated", "jumprelu")}
    assert on == {"relu": False, "gated": True, "jumprelu": True}
    assert holds_unit_norm("topk", OptimConfig())
    assert holds_unit_norm("relu", OptimConfig())
    assert holds_unit_norm("relu", OptimConfig(objective=(MseSpec(), L1Spec(norms=False))))
    assert holds_unit_norm("relu", OptimConfig(sparsity=0.1, unit_norm=True))
    assert not holds_unit_norm("topk", OptimConfig(unit_norm=False))


def test_k_falls_geometrically() -> None:
    """From `k_start` to the coder's k over the share, then stays; the same number for the same step."""
    annealing = KAnnealing.of(coder_config("topk", n=64), OptimConfig(k_start=48, k_anneal=0.5))
    assert annealing is not None
    assert [annealing.k(done / 8) for done in range(9)] == [48, 24, 12, 6, 3, 3, 3, 3, 3]
    assert KAnnealing.of(coder_config("relu"), OptimConfig()) is None


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_learner_anneals_k(kind: str) -> None:
    """The codes have it, a resumed learner has it, and at the end the coder has its own."""
    config = coder_config(kind, n=64)
    learner = learner_of(config, steps=8, k_start=48, k_anneal=1.0, objective=(MseSpec(),))
    x, _ = planted(32, 8, 12, 2)
    seen: list[int] = []
    for _ in range(8):
        batch = learner.forward(x, x)
        seen.append(batch.codes.nnz // 32)
        loss, values = learner.loss(batch)
        loss.backward()
        learner.clip()
        learner.apply(batch, float(loss.detach()), values)
    expected = [round(3 * 16 ** (1 - done / 8)) for done in range(8)]
    assert seen == expected if kind == "topk" else all(a <= b for a, b in zip(seen, expected, strict=True))
    encoder = learner.coder.encoder
    assert isinstance(encoder, AffineEncoder)
    assert encoder.config.k == 3
    again = learner_of(config, steps=8, done=4, k_start=48, k_anneal=1.0, objective=(MseSpec(),))
    assert isinstance(again.coder.encoder, AffineEncoder)
    assert again.coder.encoder.config.k == 12


@pytest.mark.parametrize(
    ("kind", "start", "message"),
    [
        ("relu", 8, "k_start belongs to topk and batchtopk coders, input is relu"),
        ("topk", 3, "k_start is 3; input has k = 3 and 16 latents"),
        ("topk", 17, "k_start is 17; input has k = 3 and 16 latents"),
    ],
)
def test_k_that_cannot_fall(kind: str, start: int, message: str) -> None:
    """Refused before the first step."""
    with pytest.raises(ConfigError, match=message):
        KAnnealing.of(coder_config(kind), OptimConfig(k_start=start))


def test_hooks_of_a_crosscoder_weigh_the_same() -> None:
    """Whatever their units: after the first sample each has mean 0 and a mean norm of √(its width)."""
    x = torch.cat([planted(400, 8, 12, 2)[0] + 5, 1000 * planted(400, 4, 12, 2, seed=1)[0]], dim=-1)
    config = built(("a", "b"), ("a", "b"), (8, 4), (8, 4))
    coder, variance = initialise(config, TensorSource(x), OptimConfig())
    s, _ = coder.prepare(x)
    assert s.mean(0).abs().max() < 1e-4
    assert [float(part.norm(dim=-1).mean()) for part in s.split([8, 4], dim=-1)] == pytest.approx(
        [8**0.5, 2.0], rel=1e-4
    )
    assert variance == pytest.approx(float(s.square().sum(-1).mean()), rel=1e-4)
    y = coder.decode(coder.encode(x))
    assert y.shape == x.shape
    assert not coder.norm_scale.requires_grad


def test_a_transcoder_of_normed_inputs_aims_at_normed_targets() -> None:
    """constant_norm has no mean to take away."""
    config = built("a", "b", 8, 8, normalise={"kind": "constant_norm"})
    x, y = planted(20, 8, 12, 2)[0], planted(20, 8, 12, 2, seed=1)[0]
    norm = x.norm(dim=-1, keepdim=True) / 8**0.5
    torch.testing.assert_close(inner_target(config, x / norm, y, {"std": norm}), y / norm)


def test_thresholds_stay_at_or_above_zero() -> None:
    """A step that takes θ below 0 ends at 0."""
    learner = learner_of(coder_config("jumprelu", pre_bias="none"), lr=5.0, warmup=0, sparsity=0.0)
    with torch.no_grad():
        learner.coder.extra()["threshold"].fill_(0.01)
    x, _ = planted(64, 8, 12, 2)
    for _ in range(3):
        batch = learner.forward(x, x)
        loss, values = learner.loss(batch)
        loss.backward()
        learner.coder.extra()["threshold"].grad = torch.ones(16)
        learner.apply(batch, float(loss.detach()), values)
        assert float(learner.coder.extra()["threshold"].detach().min()) == 0.0


def test_fvu_is_of_the_whole_dictionary() -> None:
    """Where the mse term adds up prefixes, the figure does not."""
    learner = learner_of(coder_config(), prefixes=(4, 8))
    x, _ = planted(64, 8, 12, 2)
    batch = learner.forward(x, x)
    loss, values = learner.loss(batch)
    loss.backward()
    metrics = learner.apply(batch, float(loss.detach()), values)
    assert metrics.fvu == pytest.approx(batch.fvu())
    assert values["mse"] > 2 * metrics.fvu
