"""What a training can be refused for before a model is loaded, a text read, or a process met."""

from __future__ import annotations

import os

from unmix.coder.config import CoderConfig
from unmix.core.errors import ConfigError
from unmix.core.policy import InputPolicy
from unmix.run.config import Member, TrainConfig
from unmix.run.context import RunContext
from unmix.run.publishing import check_publishing
from unmix.train.annealing import KAnnealing
from unmix.train.parallel.checks import require_on_mesh
from unmix.train.resampling import require_resampling
from unmix.train.trackers import check_trackers
from unmix.train.trainer import make_terms

PAPER_WIDTH = 2**30
"""Width of hooks while no model is there: no size is refused for being too large, and no tensor is made."""


def check_training(context: RunContext) -> None:
    """`ConfigError` for an objective that no such coder has, or that no mesh trains; then trackers and the hub."""
    config = context.config
    for member in config.members().values():
        check_member(member, config)
    for member in config.members().values():
        check_trackers(member.train.trackers, member.train.tracking)
    check_publishing(config)


def check_member(member: Member, config: TrainConfig) -> None:
    """One coder's objective and habits, with the sizes that are known."""
    coder = paper_coder(member)
    require_objective(member, coder)
    if config.coder_set and member.train.retire:
        raise ConfigError(
            f"{member.name}: train.retire: a coder of a set cannot leave, the others are trained on its part"
        )
    if config.coder_set and member.train.resample:
        raise ConfigError(f"{member.name}: train.resample: what a coder of a set alone gets wrong is not known")
    if config.coder_set and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("coder_set: coders whose writes add up are trained by one process, without torchrun")
    data, dictionary = mesh_sizes(config)
    if data * dictionary > 1:
        require_on_mesh(member.name, coder, member.train, data, dictionary)


def require_objective(member: Member, coder: CoderConfig) -> None:
    """`ConfigError` where a term, k-annealing or resampling cannot be of this coder."""
    make_terms(coder, member.train)
    KAnnealing.of(coder, member.train)
    require_resampling(member.name, member.train)


def paper_coder(member: Member) -> CoderConfig:
    """The coder as far as the run file tells it: hooks as they are written, widths unknown."""
    spec = member.spec.model_copy(update={"name": member.name})
    groups = spec.activation == "groupmax" and spec.n_latents is None and spec.k is not None
    if groups:  # whether they come out even is seen when the width is
        spec = spec.model_copy(update={"n_latents": 1024 * (spec.k or 1)})
    widths = (PAPER_WIDTH,) * len(spec.reads), (PAPER_WIDTH,) * len(spec.writes)
    return spec.build(spec.reads, spec.writes, *widths, InputPolicy(), None)


def mesh_sizes(config: TrainConfig) -> tuple[int, int]:
    """`(data, dictionary)` of the mesh that this process is to be part of; (1, 1) without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = config.parallel
    if world == 1:
        return 1, 1
    return parallel.data or max(1, world // parallel.coders // parallel.dictionary), parallel.dictionary
