"""What the stages of one run share: paths, and the things that several of them load once."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmix.core.errors import ConfigError, UnmixError
from unmix.run.config import Member, RunConfig
from unmix.train.config import CoderSpec

if TYPE_CHECKING:
    import numpy as np

    from unmix.coder.coder_set import CoderSet
    from unmix.coder.sparse_coder import SparseCoder
    from unmix.data.shards import TokenShards
    from unmix.index.reader import LatentIndex
    from unmix.lm.model import LanguageModel
    from unmix.train.parallel.mesh import Mesh
    from unmix.train.store import ActivationStore, LiveStore


HASHED_WHOLE = 8 * 2**30
"""Bytes of activation cache up to which every hash is checked before use: a few seconds. Above, lengths alone."""


class RunContext:
    """One run folder while its stages are walked."""

    def __init__(self, config: RunConfig, folder: Path, keys: dict[str, str], redo: Collection[str] = ()) -> None:
        """`redo` names stages that begin anew, whatever an earlier call left of them."""
        self.redo = frozenset(redo)
        self.config, self.folder, self.keys = config, folder, keys
        self._loading = threading.Lock()
        self._lm: LanguageModel | None = None
        self.joined: Mesh | None = None
        """The mesh, once it was joined."""

    @cached_property
    def members(self) -> dict[str, Member]:
        """The run's coders by name."""
        return self.config.members()

    @property
    def coder_name(self) -> str:
        """Name of the run's only coder; `ConfigError` where it has several."""
        if len(self.members) > 1:
            raise ConfigError(f"{self.folder}: has {len(self.members)} coders ({', '.join(self.members)}); name one")
        return next(iter(self.members))

    @property
    def tokens_folder(self) -> Path:
        """Token shards."""
        return self.folder / "tokens"

    @property
    def activations_folder(self) -> Path:
        """Activation cache; gone when the run is finished, unless it is kept."""
        return self.folder / "activations"

    @cached_property
    def mesh(self) -> Mesh | None:
        """The processes that `torchrun` started, joined on first use; None for one process."""
        from unmix.run.team import join

        self.joined = join(self.config.parallel)
        return self.joined

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.mesh is None or self.mesh.first

    @property
    def retired(self) -> dict[str, dict[str, Any]]:
        """Why coders of the run left its training, by name; those are not there."""
        from unmix.train.retiring import NOTE, retired

        homes = [
            path.parent for pattern in ("*", "group-*/*") for path in self.training_folder.glob(f"{pattern}/{NOTE}")
        ]
        return {home.name: fact for home in homes if (fact := retired(home)) and home.name in self.members}

    def coder_folder(self, name: str) -> Path:
        """A trained coder; those of a set lie in the folder of the set."""
        folder = self.folder / "coders"
        return (folder / self.config.coder_set if self.config.coder_set else folder) / name

    @property
    def training_folder(self) -> Path:
        """Metrics, curves, timings and checkpoints of the training, the coders' own below their names."""
        return self.folder / "training"

    @property
    def evaluation_file(self) -> Path:
        """The evaluation's figures."""
        return self.folder / "evaluation.json"

    @property
    def index_folder(self) -> Path:
        """The latent index."""
        return self.folder / "index"

    @property
    def ledger_file(self) -> Path:
        """Explanations and scores."""
        return self.folder / "ledger.sqlite"

    @property
    def report_folder(self) -> Path:
        """The static report."""
        return self.folder / "report"

    @property
    def lm(self) -> LanguageModel:
        """The language model, loaded on first use, once, whichever thread asks first."""
        from unmix.lm.load import load_model

        spec = self.config.model
        with self._loading:
            if self._lm is None:
                self._lm = load_model(
                    spec.name,
                    dtype=None if spec.dtype == "auto" else spec.dtype,
                    device=spec.device,
                    revision=spec.revision,
                    trust_remote_code=spec.trust_remote_code,
                )
            return self._lm

    def warm(self) -> None:
        """Load the model ahead of its first use; where that fails, the first use says why."""
        with suppress(UnmixError):
            _ = self.lm

    @cached_property
    def hooks(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Canonical `(reads, writes)` of every coder. `ModelError` where a hook is unknown."""
        return {name: self._canonical(member.spec) for name, member in self.members.items()}

    def _canonical(self, spec: CoderSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(self.lm.hook(h).name for h in spec.reads), tuple(self.lm.hook(h).name for h in spec.writes)

    @cached_property
    def shards(self) -> TokenShards:
        """The token shards, every hash checked: they are small, and everything after rests on them."""
        from unmix.data.shards import TokenShards

        shards = TokenShards.open(self.tokens_folder)
        shards.verify()
        return shards

    @cached_property
    def coders(self) -> dict[str, SparseCoder]:
        """The trained coders by name, without those that left the training."""
        from unmix.coder.native import load_native

        left = self.retired
        return {name: load_native(self.coder_folder(name)) for name in self.members if name not in left}

    def coders_as_set(self) -> CoderSet:
        """The trained coders, what they write added up."""
        from unmix.coder.coder_set import CoderSet

        return CoderSet(self.coders)

    @property
    def coder(self) -> SparseCoder:
        """The run's only coder; `ConfigError` where it has several."""
        return self.coders[self.coder_name]

    @cached_property
    def index(self) -> LatentIndex:
        """The latent index."""
        from unmix.index.reader import open_index

        return open_index(self.index_folder)

    @cached_property
    def store_contexts(self) -> np.ndarray:
        """Contexts that are captured: every role but `evaluate`, in the order of a keyed permutation."""
        import numpy as np

        from unmix.data.shards import ROLES
        from unmix.train.store import permuted

        held = self.shards.roles != ROLES.index("evaluate")
        return permuted(np.flatnonzero(held), self.config.seed)

    @cached_property
    def store(self) -> ActivationStore:
        """Captured activations: the cache where it is whole, else the live model. Checked once, on first use."""
        from unmix.core.manifest import MANIFEST
        from unmix.train.store import CachedStore

        folder = self.activations_folder
        if (folder / MANIFEST).is_file():
            size = sum(path.stat().st_size for path in folder.rglob("*.bin"))
            return CachedStore(folder, deep=size <= HASHED_WHOLE)
        return self.live_store

    @cached_property
    def live_store(self) -> LiveStore:
        """Activations made by the model on demand."""
        from unmix.train.store import LiveStore

        hooks = tuple(dict.fromkeys(hook for pair in self.hooks.values() for side in pair for hook in side))
        return LiveStore(self.lm, self.shards, self.store_contexts, hooks, self.config.capture.batch)

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The evaluation's figures of every coder by name."""
        found = self.evaluation()
        if "coders" not in found:
            found = {"coders": {self.config.coder_set or self.coder_name: found}}
        return found["coders"]

    def evaluation(self) -> dict[str, Any]:
        """The evaluation's figures as they were written."""
        if not self.evaluation_file.is_file():
            raise ConfigError(f"{self.evaluation_file}: not there yet; run the stage `evaluate` first")
        result: dict[str, Any] = json.loads(self.evaluation_file.read_text(encoding="utf-8"))
        return result
