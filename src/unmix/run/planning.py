"""A run file as `unmix plan` reckons with it: sizes of its coders, its mesh, its text. No model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from unmix.core.errors import ConfigError
from unmix.run.config import Member, RunConfig
from unmix.train.config import PICKING, holds_unit_norm, objective_of
from unmix.train.objectives.specs import AuxKSpec
from unmix.train.plan import DEVICES, Layout, Plan, Shape, make_plan, smallest_mesh


def plan_run(config: RunConfig) -> Plan:
    """The plan of a run. `ConfigError` where a size is said nowhere, or the mesh and the cards do not go together."""
    members = config.members()
    width = _width(config)
    shapes = [shape_of(member, width, config.plan.l0) for member in members.values()]
    first = next(iter(members.values())).train
    layout = _layout(config, shapes, first.batch)
    hooks = {hook for member in members.values() for hook in (*member.spec.reads, *member.spec.writes)}
    cached = width * len(hooks) if config.capture.cache == "disk" else 0
    tokens = float(config.data.tokens)
    epochs = first.epochs if first.tokens is None else first.tokens / tokens
    return make_plan(shapes, layout, config.plan, tokens, epochs, cached)


def shape_of(member: Member, width: int, expected: float | None) -> Shape:
    """One coder's sizes, every hook being `width` wide. `ConfigError` where neither it nor `expected` says its L0."""
    spec, train = member.spec, member.train
    d_in, d_out = width * len(spec.reads), width * len(spec.writes)
    l0 = float(spec.k or 0) if spec.activation in PICKING else train.target_l0 or expected
    if l0 is None:
        raise ConfigError(f"plan: the L0 of {member.name} ({spec.activation}) is known after training; give --l0")
    aux = next((term for term in objective_of(spec.activation, train) if isinstance(term, AuxKSpec)), None)
    same = spec.reads == spec.writes
    return Shape(
        member.name, d_in, d_out, spec.latents(width), spec.activation, l0, train.optimiser, same,
        spec.pre_bias == "own", spec.skip, holds_unit_norm(spec.activation, train),
        0 if aux is None else aux.k or max(1, d_in // 2),
    )  # fmt: skip


def _layout(config: RunConfig, shapes: list[Shape], batch: int) -> Layout:
    plan, parallel = config.plan, config.parallel
    if parallel.coders > 1:
        raise ConfigError("plan: teams (parallel.coders) are planned one by one: a run file with the coders of one")
    if parallel.data is None and "dictionary" not in parallel.model_fields_set:
        return smallest_mesh(shapes, batch, plan)
    data = parallel.data or max(1, plan.gpus // parallel.dictionary)
    if data * parallel.dictionary != plan.gpus:
        raise ConfigError(
            f"plan: a mesh of data {data} × dictionary {parallel.dictionary} needs {data * parallel.dictionary} cards, "
            f"--gpus says {plan.gpus}"
        )
    return Layout(data, parallel.dictionary, plan.per_node, DEVICES[plan.gpu], batch)


def _width(config: RunConfig) -> int:
    """Width of the hooks: as said, or of the model's residual stream by a `config.json` beside its weights."""
    if config.plan.width is not None:
        return config.plan.width
    path = Path(config.model.name).expanduser() / "config.json"
    if path.is_file():
        facts = json.loads(path.read_text(encoding="utf-8"))
        for name in ("hidden_size", "n_embd", "d_model"):
            if isinstance(facts.get(name), int):
                return facts[name]
    raise ConfigError(f"plan: nothing here says how wide the hooks of {config.model.name} are; give --width")
