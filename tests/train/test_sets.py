"""A set of coders whose writes add up is trained on the error of the sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unmix.coder.coder_set import CoderSet
from unmix.coder.config import CoderConfig, ReLU
from unmix.core.errors import ConfigError
from unmix.train.config import OptimConfig
from unmix.train.sets import Hooks, SetFeed
from unmix.train.source import ActivationSource, TensorSource
from unmix.train.trainer import GroupTrainer, Job

from .toys import planted

D = 8
LAYERS = 3


def stream(rows: int = 600) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What three MLPs read, and what they answer: the second and third lean on what the first one read."""
    x = {f"in{i}": planted(rows, D, 12, 2, seed=i)[0] for i in range(LAYERS)}
    maps = [torch.randn(D, D, generator=torch.Generator().manual_seed(9 + i)) / D**0.5 for i in range(LAYERS)]
    y = {
        f"out{i}": sum((x[f"in{j}"] @ maps[j] for j in range(i + 1)), torch.zeros(())) * 10**i + i
        for i in range(LAYERS)
    }
    return x, y


def cross_layer(**changes: Any) -> dict[str, CoderConfig]:
    """Coder i reads layer i and writes every layer from there on."""
    jump = {"kind": "jumprelu", "initial_threshold": 0.05, "bandwidth": 0.5}
    fields: dict[str, Any] = {"d_in": D, "n_latents": 24, "activation": jump, "pre_bias": "none"}
    found: dict[str, CoderConfig] = {}
    for i in range(LAYERS):
        writes = tuple(f"out{j}" for j in range(i, LAYERS))
        own = {**fields, "name": f"layer{i}", "reads": (f"in{i}",), "writes": writes, "d_out": D * len(writes)}
        found[f"layer{i}"] = CoderConfig(**{**own, **changes})
    return found


def sources_of(coders: dict[str, CoderConfig]) -> dict[Hooks, ActivationSource]:
    """One stream, the same rows in the same order for all."""
    x, y = stream()
    return {
        (c.reads, c.writes): TensorSource(x[c.reads[0]], torch.cat([y[hook] for hook in c.writes], dim=-1))
        for c in coders.values()
    }


def trainer_of(coders: dict[str, CoderConfig], folder: Path, **optim: Any) -> GroupTrainer:
    """A hundred rows a step."""
    config = OptimConfig(
        **{"batch": 100, "tokens": 30_000, "lr": 1e-2, "log_every": 100, "checkpoint_every": 1000, **optim}
    )
    feed = SetFeed(coders, sources_of(coders))
    return GroupTrainer({name: Job(c, config) for name, c in coders.items()}, feed, folder, "key")


def test_the_shares_add_up_to_the_error_of_the_sums(tmp_path: Path) -> None:
    """Value and gradients: against the decoded set, hook by hook, by plain autograd."""
    coders = cross_layer()
    trainer = trainer_of(coders, tmp_path)
    learners = trainer.learners
    (steps,) = trainer.feed.steps(3, 100, learners)
    shares = [learners[name].loss(step) for name, step in steps.items()]
    found = sum((loss for loss, _ in shares), torch.zeros(()))
    x, y = stream()
    rows = [step.x / step.coder.config.input_scale for step in steps.values()]
    joint = CoderSet({name: learner.coder for name, learner in learners.items()})
    written = joint.decode(joint.encode({f"in{i}": rows[i] for i in range(LAYERS)}))
    ids = [int((x["in0"] - row).square().sum(-1).argmin()) for row in rows[0]]
    wanted = torch.zeros(())
    for hook, value in written.items():
        spread = (y[hook] - y[hook].mean(0)).square().sum(-1).mean()
        wanted = wanted + (y[hook][ids] - value).square().sum(-1).mean() / spread / LAYERS
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    parameters = [p for learner in learners.values() for p in learner.coder.parameters()]
    ours = torch.autograd.grad(found, parameters)
    for one, other in zip(ours, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max() + 1))


def test_first_biases_add_up_to_the_centre(tmp_path: Path) -> None:
    """A hook that three coders write is not three times its mean."""
    trainer = trainer_of(cross_layer(), tmp_path)
    _, y = stream()
    for i in range(LAYERS):
        written = torch.zeros(D)
        for learner in trainer.learners.values():
            config = learner.coder.config
            if f"out{i}" in config.writes:
                parts = (learner.coder.b_dec.detach() * config.output_scale).split(D)
                written = written + parts[config.writes.index(f"out{i}")]
        assert float((written - y[f"out{i}"].mean(0)).norm() / y[f"out{i}"].std(0).norm()) < 0.5


def test_a_cross_layer_transcoder_learns(tmp_path: Path) -> None:
    """With a penalty and auxk of each coder's own; the result is saved as a set."""
    trainer = trainer_of(cross_layer(), tmp_path, sparsity=1e-4, dead_after=2000)
    shares = [sum(m.fvu for m in trainer.group_step().values()) for _ in range(trainer.steps - 1)]
    assert shares[-1] < 0.5 * shares[0]
    trained = trainer.run()
    together = CoderSet(trained)
    together.save(tmp_path / "set")
    assert set(together.widths) == {"out0", "out1", "out2"}


@pytest.mark.parametrize("kind", ["topk", "gated"])
def test_terms_that_decode_again_count_what_the_others_write(kind: str, tmp_path: Path) -> None:
    """With all of the dictionary as its prefix, or as its wider codes, the loss is the joint one."""
    activation = {"kind": kind, "k": 24} if kind == "topk" else {"kind": kind}
    coders = cross_layer(activation=activation)
    spec = {"term": "multi_topk", "weight": 1.0} if kind == "topk" else {"term": "gate"}
    trainer = trainer_of(coders, tmp_path, objective=({"term": "mse"}, spec))
    (steps,) = trainer.feed.steps(0, 100, trainer.learners)
    for name, step in steps.items():
        _, values = trainer.learners[name].loss(step)
        assert values[spec["term"]] == pytest.approx(values["mse"], rel=1e-3)


def test_coders_that_cannot_be_a_set() -> None:
    """Said before anything is read."""
    coders = cross_layer()
    with pytest.raises(ConfigError, match=r"layer0: normalises each token .layer_norm.; a set.s writes add up"):
        SetFeed(cross_layer(normalise={"kind": "layer_norm"}), sources_of(coders))
    same = {"a": CoderConfig(reads=("in0",), d_in=D, n_latents=4, activation=ReLU())}
    with pytest.raises(ConfigError, match="a: reads and writes in0; coders of a set write to other hooks"):
        SetFeed(same, {})
    other = {**coders, "odd": coders["layer2"].model_copy(update={"d_out": 4})}
    with pytest.raises(ConfigError, match="odd: writes 4 values to out2, another coder of the set 8"):
        SetFeed(other, sources_of(coders))
