"""The trainer over a mesh: the loop is the parent's, rank 0 alone writes and shows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.train.feeds import Feed
from unmix.train.guard import FaultError
from unmix.train.learner import Learner
from unmix.train.objectives import Step
from unmix.train.parallel.checkpoint import MeshCheckpoints
from unmix.train.parallel.checks import require_on_mesh
from unmix.train.parallel.learner import ShardLearner
from unmix.train.parallel.mesh import Mesh
from unmix.train.parallel.shard import whole_coder
from unmix.train.source import ActivationSource
from unmix.train.timing import Clock
from unmix.train.trackers import Tracker
from unmix.train.trainer import GroupTrainer, Job


class ShareFeed:
    """This rank's share of every batch of a feed. Batches are consecutive rows of one order, so shares are too."""

    def __init__(self, feed: Feed, mesh: Mesh) -> None:
        self.feed, self.mesh = feed, mesh

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return self.feed.n_rows

    def sample(self, coder: CoderConfig) -> ActivationSource:
        """Rows that first weights are set by: the same on every rank."""
        return self.feed.sample(coder)

    def steps(self, index: int, size: int, learners: Mapping[str, Learner]) -> Iterator[dict[str, Step]]:
        """The share of the batch of `size` rows of step `index`."""
        mesh = self.mesh
        return self.feed.steps(index * mesh.data + mesh.data_index, size // mesh.data, learners)


class MeshTrainer(GroupTrainer):
    """Trains the slices of several coders on one stream, as `GroupTrainer` does whole ones."""

    def __init__(
        self,
        jobs: Mapping[str, Job],
        feed: Feed,
        folder: Path,
        key: str,
        mesh: Mesh,
        *,
        clock: Clock | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """`folder` must be seen by all ranks. `ConfigError` for what is not trained on a mesh."""
        for name, job in jobs.items():
            require_on_mesh(name, job.coder, job.config, mesh.data, mesh.dictionary)
        self.mesh, self.shared = mesh, folder
        # What the parent writes beside the checkpoint is rank 0's to keep; the others' goes with their process.
        self._scratch = None if mesh.first else tempfile.TemporaryDirectory()
        own = folder if self._scratch is None else Path(self._scratch.name)
        trackers = trackers if mesh.first else ()
        super().__init__(jobs, ShareFeed(feed, mesh), own, key, clock=clock, trackers=trackers)
        for name, watch in self._watches.items():
            watch.n_latents = jobs[name].coder.n_latents

    def begin(self) -> dict[str, Learner]:
        """This rank's slices as the checkpoint left them, or fresh ones."""
        own = self.checkpoints
        self.checkpoints = MeshCheckpoints(self.shared / "checkpoint", self.key, own.settings, own.keep, self.mesh)
        found = self.checkpoints.load()
        learners: dict[str, Learner] = {}
        for name, job in self.jobs.items():
            if found is None:
                source = self.feed.sample(job.coder)
                learners[name] = ShardLearner.first(job.coder, source, job.config, self.steps, self.mesh)
            else:
                learners[name] = ShardLearner.again(found[name], job.coder, job.config, self.steps, self.mesh)
        return learners

    def _kept_step(self, faults: Mapping[str, FaultError], places: Mapping[str, list[dict[str, int]]]) -> str:
        """Nothing is kept: no rank has the whole of it."""
        return ""

    def stopping(self, asked: bool) -> bool:
        """Whether any rank was told to stop."""
        word = torch.tensor([asked], dtype=torch.int64, device=self.mesh.device)
        return bool(self.mesh.max_(word, "all"))

    def run(self) -> dict[str, SparseCoder]:
        """Train to the end; rank 0 returns the whole coders in evaluation mode, the others none."""
        super().run()
        found = {
            name: whole_coder(learner.coder, self.jobs[name].coder, self.mesh)
            for name, learner in self.learners.items()
        }
        if self._scratch is not None:
            self._scratch.cleanup()
        self.mesh.agree(None)
        return {name: coder for name, coder in found.items() if coder is not None}
