"""A run under `torchrun`: rank 0 walks the stages, the others wait for the training and take part in it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from unmix.core.errors import ConfigError
from unmix.train.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from unmix.run.config import RunConfig
    from unmix.run.context import RunContext
    from unmix.train.parallel.mesh import Mesh

TRAIN, OVER = "train", "over"
"""Words of rank 0: it is at the training, or there is nothing left to train."""


def join(config: ParallelConfig) -> Mesh | None:
    """The mesh of the processes that `torchrun` started; None for one. `ConfigError` where one is not enough."""
    from unmix.train.parallel.mesh import Mesh, Team

    team = Team.found()
    if team is None:
        asked = (config.data or 1) * config.dictionary * config.coders
        if asked > 1:
            raise ConfigError(
                f"parallel: coders {config.coders} × data {config.data or 1} × dictionary {config.dictionary} needs "
                f"{asked} processes, this is one; start it as torchrun --nproc-per-node {asked} -m unmix train …"
            )
        return None
    if team.rank == 0:
        team.say(TRAIN)
    return Mesh(team, config)


def follows() -> bool:
    """Whether another process of the team walks the run."""
    return int(os.environ.get("RANK", "0")) > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse_team(what: str) -> None:
    """`ConfigError` under `torchrun`, for what one process does."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{what} is the work of one process; start it without torchrun")


def follow(config: RunConfig) -> int:
    """Wait for rank 0 to reach the training, train with it, and end. Exit code 0."""
    from unmix.run.context import RunContext
    from unmix.run.stages import STAGES
    from unmix.run.training import train_coders
    from unmix.run.walk import stage_keys
    from unmix.train.parallel.mesh import Team

    team = Team.found()
    if team is None or config.out is None or team.hear(TRAIN, OVER) == OVER:
        return 0
    logging.getLogger("unmix").setLevel(logging.ERROR)  # rank 0 says the same
    context = RunContext(config, config.out, stage_keys(STAGES, config))
    train_coders(context)
    leave(context)
    return 0


def wait_for_all(mesh: Mesh) -> None:
    """Rank 0 waits, however long, for what every other team trains; the others say that they are done."""
    if mesh.part == 0 and mesh.first:
        for part in range(1, mesh.coders):
            mesh.team.hear(f"part {part}")
    elif mesh.first:
        mesh.team.say(f"part {mesh.part}")


def leave(context: RunContext) -> None:
    """Let the others go: those that trained, and those that never had to."""
    from unmix.train.parallel.mesh import Team

    if context.joined is not None:
        context.joined.close()
    elif (team := Team.found()) is not None:
        team.say(OVER)
