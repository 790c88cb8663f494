"""Sources by description: plain JSON that any process, today or when an index is mended, can open again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, did_you_mean
from unmix.core.progress import log
from unmix.data.config import ROLES
from unmix.data.shards import TokenShards
from unmix.formats import load_all
from unmix.index.batch import IndexBatch
from unmix.index.sources.base import Source
from unmix.index.sources.live import LiveSource
from unmix.index.sources.served import ServedSource, vllm_engine
from unmix.index.sources.stored import StoreSource
from unmix.lm.load import load_model
from unmix.lm.model import LanguageModel
from unmix.train.session import at_hooks, hub_name, require_hooks
from unmix.train.store import LiveStore, permuted

SEPARATOR = "="


@dataclass(frozen=True)
class ModelAt:
    """A language model by place."""

    name: str
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def load(self) -> LanguageModel:
        """Load it; errors as `load_model`."""
        return load_model(
            hub_name(self.name), dtype=self.dtype, device=self.device, revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip


@dataclass(frozen=True)
class CoderAt:
    """Where a coder lies."""

    place: str
    name: str
    """Its name there."""
    format: str | None = None
    hook: str | None = None
    """Read here, where its files do not say."""


@dataclass(frozen=True)
class Named:
    """Coders under the names that they have in an index, and where each lies."""

    coders: dict[str, SparseCoder] = field(default_factory=dict[str, SparseCoder])
    places: dict[str, CoderAt] = field(default_factory=dict[str, CoderAt])


def absolute(place: str) -> str:
    """A local path from the root, so that other processes find it; addresses as they are."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.exists() else place


def open_coders(words: Sequence[str], format: str | None = None, hook: str | None = None) -> Named:
    """Coders of places, each written `PLACE` or `NAME=PLACE`; every coder of a place that holds several.

    `ConfigError` for two of one name, or a hook said of several; otherwise errors as `load_all`.
    """
    found = Named()
    for word in words:
        given, place = _split(word)
        inside = load_all(place, format)
        for own, coder in inside.items():
            name = (own if given is None else given) if len(inside) == 1 else (f"{given}/{own}" if given else own)
            if name in found.coders:
                raise ConfigError(f"--coder: two coders are called {name!r}; say --coder NAME={place}")
            found.coders[name] = coder
            found.places[name] = CoderAt(absolute(place), own, format, hook)
    if hook is not None:
        if len(found.coders) > 1:
            raise ConfigError(f"--hook {hook}: is said of one coder, and there are {len(found.coders)}")
        found.coders.update({name: at_hooks(coder, (hook,)) for name, coder in found.coders.items()})
    for name, coder in found.coders.items():
        require_hooks(name, coder.config.reads)
    return found


def _split(word: str) -> tuple[str | None, str]:
    name, separator, place = word.partition(SEPARATOR)
    plain = separator and name and "/" not in name and ":" not in name and not Path(word).expanduser().exists()
    return (name, place) if plain else (None, word)


def reopen_coders(places: Mapping[str, CoderAt]) -> dict[str, SparseCoder]:
    """The coders again; each place is opened once. `ConfigError` where one is not there any more."""
    opened: dict[tuple[str, str | None], Mapping[str, SparseCoder]] = {}
    found: dict[str, SparseCoder] = {}
    for name, at in places.items():
        key = (at.place, at.format)
        if key not in opened:
            opened[key] = load_all(*key)
        if at.name not in opened[key]:
            raise ConfigError(f"{at.place}: coder {at.name!r} is gone. {did_you_mean(at.name, opened[key])}")
        coder = opened[key][at.name]
        found[name] = coder if at.hook is None else at_hooks(coder, (at.hook,))
    return found


def open_source(recipe: Mapping[str, Any]) -> Source:
    """The source that a recipe describes; `ConfigError` for one of an unknown kind."""
    kinds: dict[str, Callable[[Mapping[str, Any]], Source]] = {
        "live": _open_live, "store": _open_store, "served": _open_served,
    }  # fmt: skip
    kind = recipe.get("kind")
    if kind not in kinds:
        raise ConfigError(f"what this index was built from is {kind!r}, which this version cannot open")
    return kinds[str(kind)](recipe)


def _open_live(recipe: Mapping[str, Any]) -> LiveSource:
    speakers = recipe.get("speakers")
    return LiveSource(
        ModelAt(**recipe["model"]).load(),
        TokenShards.open(recipe["tokens"]),
        reopen_coders({name: CoderAt(**at) for name, at in recipe["coders"].items()}),
        batch=recipe["batch"],
        speakers=None if speakers is None else tuple(speakers),
    )


def _open_served(recipe: Mapping[str, Any]) -> ServedSource:
    return served(_open_live(recipe), recipe["model"]["name"])


def served(plain: LiveSource, model: str) -> ServedSource:
    """vLLM in place of the plain model, after both were compared on the first contexts.

    `MachineError` where vLLM is not installed, `CorruptError` where they differ.
    """
    engine = vllm_engine(hub_name(model), str(plain.lm.dtype).removeprefix("torch."), plain.context)
    source = ServedSource(plain, engine)
    found = source.compare()
    found.require()
    log.info("served: %d contexts compared with the plain model, off by at most %.2g", found.contexts, found.largest)
    return source


def _open_store(recipe: Mapping[str, Any]) -> StoreSource:
    """As a run's stage, but for the cache, which may be gone: the model gives the same activations again."""
    lm, shards = ModelAt(**recipe["model"]).load(), TokenShards.open(recipe["tokens"])
    contexts = permuted(np.flatnonzero(shards.roles != ROLES.index("evaluate")), recipe["seed"])
    store = LiveStore(lm, shards, contexts, tuple(recipe["hooks"]), recipe["batch"])
    coders = reopen_coders({name: CoderAt(**at) for name, at in recipe["coders"].items()})
    return StoreSource(store, shards, coders, lm.token_strings(range(lm.vocab_size)), {})


@dataclass(frozen=True)
class Known:
    """What is known of a source without its model; asked for batches, it opens the source."""

    recipe: dict[str, Any]
    latents: dict[str, int]
    context: int
    n_contexts: int
    vocab: list[str] | None
    vocab_size: int | None
    roles: tuple[str, ...]
    slices: dict[str, tuple[str, ...]]
    meta: dict[str, Any]
    inputs: dict[str, Any]

    @classmethod
    def of(cls, source: Source, recipe: dict[str, Any]) -> Known:
        """Everything but the model and the coders."""
        return cls(
            recipe, source.latents, source.context, source.n_contexts, source.vocab, source.vocab_size, source.roles,
            source.slices, source.meta, source.inputs,
        )  # fmt: skip

    def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
        """Contexts [first, last), by a source that is opened for them."""
        return open_source(self.recipe).batches(first, last)


@dataclass(frozen=True)
class Opening:
    """An `Open`: what stands ready in this process, or in others the source that the recipe describes."""

    recipe: dict[str, Any]
    ready: Source | None = None

    def __call__(self) -> Source:
        """Open it."""
        return self.ready if self.ready is not None else open_source(self.recipe)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what stands ready: a model does not travel."""
        return Opening, (self.recipe,)


def recipe_of(
    kind: str,
    model: ModelAt,
    places: Mapping[str, CoderAt],
    tokens: Path,
    batch: int,
    speakers: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """The recipe of a source of this kind."""
    return {
        "kind": kind,
        "model": asdict(model),
        "coders": {name: asdict(at) for name, at in places.items()},
        "tokens": str(tokens.resolve()),
        "batch": batch,
        "speakers": None if speakers is None else list(speakers),
    }


def kept_recipe(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe as the index at `folder` keeps it: what lies in the folder around it is said from there."""
    home = folder.resolve().parent

    def near(place: str) -> str:
        return os.path.relpath(place, home / folder.name) if Path(place).is_relative_to(home) else place

    coders = {name: {**at, "place": near(at["place"])} for name, at in recipe["coders"].items()}
    return {**recipe, "tokens": near(recipe["tokens"]), "coders": coders}


def reopen(recipe: Mapping[str, Any], folder: str | Path | None = None) -> Opening:
    """What the index at `folder` was built from, by its `meta["rebuild"]`; paths are read from there.

    `ConfigError` where there is no recipe, or the tokens are not where it says.
    """
    if "kind" not in recipe or "tokens" not in recipe:
        raise ConfigError(
            f"{folder or 'this index'}: does not say what it was built from (its codes came from a program), so "
            "nothing of it can be built again here"
        )
    home = (Path() if folder is None else Path(folder)).resolve()
    tokens = (home / recipe["tokens"]).resolve()
    if not tokens.is_dir():
        raise ConfigError(f"{tokens}: the tokens of this index are gone; without them it cannot be built again")

    def far(place: str) -> str:
        return str((home / place).resolve()) if place.startswith("..") else place

    coders = {name: {**at, "place": far(at["place"])} for name, at in recipe["coders"].items()}
    return Opening({**recipe, "tokens": str(tokens), "coders": coders})
