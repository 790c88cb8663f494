"""`train_on`: sparse coders on the hooks of any module, from any loader of inputs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmix.coder.config import CoderConfig
from unmix.coder.native import load_native
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.atomic import sweep
from unmix.core.config import build, parse_count, semantic_dict, semantic_hash
from unmix.core.errors import ConfigError
from unmix.core.lock import folder_lock
from unmix.core.manifest import MANIFEST
from unmix.core.policy import InputPolicy
from unmix.core.seeds import slug
from unmix.lm.load import load_model
from unmix.lm.model import LanguageModel
from unmix.train.changes import claim
from unmix.train.config import CoderSpec, OptimConfig
from unmix.train.feeds import HookFeed
from unmix.train.module_rows import RowReader, at_rest
from unmix.train.row_store import BUDGET, PairSource, Store, collect, open_store
from unmix.train.trainer import GroupTrainer, Job

NOTE = "train_on.json"
Place = str | tuple[str, ...]
"""A hook, or several that one coder reads (or writes) side by side."""
_EVERY_ROW = InputPolicy(bos="none", skip_first=0)


@dataclass(frozen=True)
class _Work:
    """One coder to be trained: the hooks as they were written, the result's name, and what is wanted there."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    name: str
    coder: CoderSpec | CoderConfig


def train_on(
    module: nn.Module,
    loader: Iterable[Any],
    *,
    hook: Place | Sequence[Place],
    write: Place | Sequence[Place] | None = None,
    coder: CoderSpec | CoderConfig | Mapping[str, Any] | None = None,
    train: OptimConfig | Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Tensor] | None = None,
    dim: int | Mapping[str, int] | None = None,
    tokens: int | str | None = None,
    budget: int = BUDGET,
    seed: int | None = None,
    device: str | torch.device | None = None,
) -> SparseCoder | dict[Place, SparseCoder]:
    """Train a coder on what flows through `hook` of any module; several hooks give `{hook: coder}`.

    `hook` is a module path (`layers.1`: its output; `layers.1@in`: its input) or, in a Hugging Face model, any hook
    name. A tuple of hooks is one coder that reads (and writes) all of them side by side, a crosscoder; a list is
    several coders. `write` makes a transcoder: what flows there is predicted. `loader` gives batches: a tensor is the
    one argument of the module, a tuple or list its positional arguments, a dict its keywords; other batches (labels
    beside the input, say) go through `inputs(batch)` first. Every position of the activation except the feature
    dimension `dim` (default: the last; images must say which) is one row; `mask(batch)`, a bool for every row,
    leaves some out.

    The module runs once over the loader, in evaluation mode and up to the last hook, and the rows are kept: in
    memory, or under `folder`. With `tokens` that many rows are taken, the loader being read again if need be; at most
    `budget` bytes are kept. Training reads the rows in a seeded order, for `train.epochs` passes. With a `folder` the
    same call goes on where an earlier one was killed, bit for bit, and gives the coders that are done;
    `folder/coders/NAME` holds them. The loader itself is not compared: another one needs another folder.

    Raises `ModelError` (no such hook, with the nearest names; a module that never ran), `ConfigError` (fields that do
    not fit, batches that the module does not take), `DataError` (empty loader, rows that change width, too few of
    them), `ResumeError` (a folder of other settings) and `NonFiniteError`.
    """
    if isinstance(loader, Tensor):
        raise ConfigError("the loader is one tensor; give batches of it, e.g. inputs.split(256)")
    lm = load_model(module, device=device)
    optim = _optim(train, seed)
    work = _work(hook, write, coder)
    limit = _count(tokens)
    specs = tuple(dict.fromkeys(spec for one in work for spec in (*one.reads, *one.writes)))
    reader = RowReader(lm, specs, dim, inputs, mask)
    pairs = [(one.reads[0], other) for one in work for other in (*one.reads, *one.writes)]
    with ExitStack() as stack:
        if folder is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unmix-")))
            optim = optim.model_copy(update={"checkpoint_every": 2**62})  # nothing will resume from it
        else:
            place = Path(folder).expanduser()
            stack.enter_context(folder_lock(place))
            claim(place, NOTE, _facts(lm, reader, work, optim, dim, limit, budget, loader))
            if all((place / "coders" / one.name / MANIFEST).is_file() for one in work):
                return _shown(hook, work, {w.name: load_native(place / "coders" / w.name) for w in work})
        store = _rows(place, folder is not None, lm, reader, loader, pairs, limit, budget)
        trained = _train(place, lm, reader, work, optim, store)
        if folder is not None:
            for name, one in trained.items():
                sweep(place / "coders" / name)
                one.save(place / "coders" / name)
            shutil.rmtree(place / "training" / "checkpoint", ignore_errors=True)
    return _shown(hook, work, trained)


def _rows(
    place: Path, keep: bool, lm: LanguageModel, reader: RowReader, loader: Iterable[Any],
    pairs: list[tuple[str, str]], limit: int | None, budget: int,
) -> Store:  # fmt: skip
    key = semantic_hash(lm.fingerprint, list(reader.hooks), limit)
    sweep(place / "rows")
    if keep and (place / "rows" / MANIFEST).is_file():
        return open_store(place / "rows", key)
    with at_rest(lm.model):
        return collect(reader, loader, pairs, limit, budget, place / "rows" if keep else None, key)


def _train(
    place: Path, lm: LanguageModel, reader: RowReader, work: list[_Work], optim: OptimConfig, store: Store
) -> dict[str, SparseCoder]:
    jobs: dict[str, Job] = {}
    sources: dict[tuple[tuple[str, ...], tuple[str, ...]], PairSource] = {}
    for one in work:
        config = _coder_config(one, lm, reader, store, optim)
        jobs[one.name] = Job(config, optim)
        sources[config.reads, config.writes] = PairSource(store, one.reads, one.writes, optim.seed)
    rows = min(source.n_rows for source in sources.values())
    if rows < optim.batch:
        raise ConfigError(
            f"the loader gave {rows} rows, fewer than one batch of {optim.batch}: give more inputs, or a smaller "
            f'train={{"batch": …}}'
        )
    key = semantic_hash([source.hash for source in sources.values()], *[job.coder for job in jobs.values()], optim)
    return GroupTrainer(jobs, HookFeed(sources), place / "training", key).run()


def _coder_config(one: _Work, lm: LanguageModel, reader: RowReader, store: Store, optim: OptimConfig) -> CoderConfig:
    """The coder's config with real hooks and widths; `ConfigError` where a given config has others."""
    reads = tuple(reader.hooks[spec].name for spec in one.reads)
    writes = tuple(reader.hooks[spec].name for spec in one.writes)
    d_in = tuple(store.rows[spec].shape[1] for spec in one.reads)
    d_out = tuple(store.rows[spec].shape[1] for spec in one.writes)
    training: dict[str, Any] = {"train": semantic_dict(optim), "rows": store.rows[one.reads[0]].shape[0]}
    if isinstance(one.coder, CoderSpec):
        return one.coder.build(reads, writes, d_in, d_out, _EVERY_ROW, lm.fingerprint, training=training)
    found = one.coder
    if (found.d_in, found.width_out) != (sum(d_in), sum(d_out)):
        raise ConfigError(
            f"coder: d_in {found.d_in} and d_out {found.width_out}, but {' + '.join(one.reads)} is {sum(d_in)} wide "
            f"and {' + '.join(one.writes)} {sum(d_out)}"
        )
    update = {
        "reads": reads, "writes": writes, "write_widths": d_out if len(set(d_out)) > 1 else (), "name": one.name,
        "model": lm.fingerprint, "training": training,
    }  # fmt: skip
    return found.model_copy(update={**update, "input_policy": _EVERY_ROW})


def _work(
    hook: Place | Sequence[Place],
    write: Place | Sequence[Place] | None,
    coder: CoderSpec | CoderConfig | Mapping[str, Any] | None,
) -> list[_Work]:
    reads = [_hooks(hook)] if _is_one(hook) else [_hooks(one) for one in hook]
    if write is None:
        writes = reads
    else:
        writes = [_hooks(write)] * len(reads) if _is_one(write) else [_hooks(one) for one in write]
    if not reads or len(writes) != len(reads) or len(set(reads)) < len(reads):
        shown = ", ".join(" + ".join(one) for one in reads)
        raise ConfigError(
            f"hook and write must name as many places, each hook once; found {len(reads)} ({shown}) and {len(writes)}"
        )
    names = [slug("+".join(read)) for read in reads]
    if len(set(names)) < len(names):
        raise ConfigError(f"two hooks would share the name {next(n for n in names if names.count(n) > 1)!r}")
    return [_Work(r, w, name, _coder(coder, r, w, name)) for r, w, name in zip(reads, writes, names, strict=True)]


def _is_one(place: Place | Sequence[Place]) -> bool:
    """Whether it is one coder's: a hook, or a tuple of them."""
    return isinstance(place, (str, tuple))


def _hooks(place: Any) -> tuple[str, ...]:
    return (place,) if isinstance(place, str) else tuple(place)


def _label(hooks: tuple[str, ...]) -> Place:
    return hooks[0] if len(hooks) == 1 else hooks


def _coder(
    given: CoderSpec | CoderConfig | Mapping[str, Any] | None,
    reads: tuple[str, ...],
    writes: tuple[str, ...],
    name: str,
) -> CoderSpec | CoderConfig:
    """What is wanted at some hooks; the hooks come from the call, so a coder that names others is refused."""
    read, write = _label(reads), _label(writes)
    if isinstance(given, CoderConfig):
        named: dict[str, Any] = {"hook": _label(given.reads) if given.reads[0].split(".")[0] != "input" else read}
    elif isinstance(given, CoderSpec):
        named = {key: getattr(given, key) for key in ("hook", "write") if key in given.model_fields_set}
    else:
        named = {key: (given or {})[key] for key in ("hook", "write") if key in (given or {})}
    for key, wanted in (("hook", read), ("write", write)):
        if _hooks(named.get(key, wanted)) != _hooks(wanted):
            raise ConfigError(f"coder.{key} is {named[key]!r}, but the call says {wanted!r}")
    if isinstance(given, CoderConfig):
        return given
    fields = given.model_dump(exclude_unset=True) if isinstance(given, CoderSpec) else dict(given or {})
    fields |= {"hook": read, "name": name, **({"write": write} if write != read else {})}
    return build(CoderSpec, fields, source="coder")


def _optim(given: OptimConfig | Mapping[str, Any] | None, seed: int | None) -> OptimConfig:
    found = given if isinstance(given, OptimConfig) else build(OptimConfig, given or {}, source="train")
    if found.retire:
        raise ConfigError("train.retire: train_on gives every coder that it is asked for, so none may leave")
    return found if seed is None else found.model_copy(update={"seed": seed})


def _count(tokens: int | str | None) -> int | None:
    if tokens is None:
        return None
    found = parse_count(tokens)
    if not isinstance(found, int) or found < 1:
        raise ConfigError(f"tokens is {tokens!r}; expected a number of rows such as 10_000 or '1M'")
    return found


def _facts(
    lm: LanguageModel, reader: RowReader, work: list[_Work], optim: OptimConfig, dim: int | Mapping[str, int] | None,
    limit: int | None, budget: int, loader: Iterable[Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything that decides the result, the loader's content aside."""
    return {
        "module": lm.fingerprint.model_dump(mode="json"),
        "hooks": {one.name: {"read": _label(one.reads), "write": _label(one.writes)} for one in work},
        "coder": {one.name: semantic_dict(one.coder) for one in work},
        "train": semantic_dict(optim),
        "dim": dict(dim) if isinstance(dim, Mapping) else dim,
        "tokens": limit,
        "budget": budget,
        "batches": len(loader) if isinstance(loader, Sized) else None,
    }


def _shown(
    hook: Place | Sequence[Place], work: list[_Work], coders: Mapping[str, SparseCoder]
) -> SparseCoder | dict[Place, SparseCoder]:
    if _is_one(hook):
        return coders[work[0].name]
    return {_label(one.reads): coders[one.name] for one in work}
