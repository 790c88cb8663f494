"""Coders on Weights & Biases (extra `wandb`): an artifact's or a run's files.

`wandb://entity/project/name:version[/path]` is an artifact; `wandb://entity/project/run[/path]` a run's files, of which
one checkpoint is taken (`samples_*.pt` with the highest number, unless the path names another) and the settings.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unmix.core.atomic import atomic_folder, disk_errors, fsync_folder
from unmix.core.errors import FormatError, ServiceError, missing_extra
from unmix.formats.sources.base import Fetched, cache_folder, suggest
from unmix.formats.sources.choosing import SUFFIXES, Entry, is_weights, with_companions
from unmix.formats.sources.records import read_note, write_note

log = logging.getLogger("unmix")

SCHEME = "wandb://"
_PLACE = re.compile(r"^wandb://([^/:]+)/([^/:]+)/([^/:]+)(?::([^/]+))?(?:/(.*))?$")
_NUMBER = re.compile(r"(\d+)(?=\.\w+$)")


@dataclass(frozen=True)
class WandbPlace:
    """An artifact (`version` is set) or a run, and a file or folder in it."""

    entity: str
    project: str
    name: str
    version: str | None
    path: str

    @property
    def full(self) -> str:
        """`entity/project/name[:version]`, as W&B writes it."""
        version = f":{self.version}" if self.version else ""
        return f"{self.entity}/{self.project}/{self.name}{version}"


def parse(text: str) -> WandbPlace:
    """A place in parts; `FormatError` where it is not one. `…/runs/ID` as in W&B's own addresses works too."""
    match = _PLACE.match(text.replace("/runs/", "/", 1))
    if match is None:
        raise FormatError(
            f"{text}: expected {SCHEME}entity/project/run[/file] or {SCHEME}entity/project/artifact:version[/file]"
        )
    return WandbPlace(match[1], match[2], match[3], match[4], (match[5] or "").strip("/"))


def fetch(text: str, *, below: bool = False) -> Fetched:
    """The files of a coder on W&B, in `$UNMIX_CACHE/wandb`; with `below`, every checkpoint of a run.

    Raises `FormatError` (no such run, artifact or file), `ServiceError` where W&B does not answer and nothing is in
    the cache, and `MachineError` where the package is missing.
    """
    place = parse(text)
    key = f"{text}{'/**' if below else ''}"
    if os.environ.get("WANDB_MODE", "").lower() == "offline":
        return _from_note(key, text, "WANDB_MODE is offline")
    try:
        wandb = import_module("wandb")
    except ModuleNotFoundError as error:
        raise missing_extra("wandb", "wandb", f"reading {text}") from error
    try:
        with _plain_errors(wandb, place, text):
            if place.version is not None:
                return _artifact(wandb.Api(), place, text, key)
            return _run(wandb.Api(), place, text, key, below)
    except ServiceError:
        if read_note(key) is None:
            raise
        log.warning("%s: W&B does not answer; using the copy in the cache", text)
        return _from_note(key, text, "W&B does not answer")


def _from_note(key: str, text: str, reason: str) -> Fetched:
    note = read_note(key)
    if note is None:
        raise ServiceError(f"{text}: not in the cache, and {reason}")
    return Fetched(note[0], note[1])


def _artifact(api: Any, place: WandbPlace, text: str, key: str) -> Fetched:
    artifact = api.artifact(place.full)
    names = sorted(artifact.manifest.entries)
    if place.path and not any(name == place.path or name.startswith(f"{place.path}/") for name in names):
        raise FormatError(f"{text}: the artifact has no {place.path!r}. {suggest(place.path, names)}")
    # A file is read with what lies beside it, so the folder that it is in comes too.
    within = Entry(place.path, 0).folder if place.path in names else place.path
    folder = _folder(place, "-".join([place.name, artifact.version, *within.split("/")]).rstrip("-"))
    if not folder.is_dir():
        with atomic_folder(folder) as temp:
            artifact.download(root=str(temp), path_prefix=f"{within}/" if within else None, skip_cache=True)
    path = folder / place.path
    origin = _origin(place, text, str(artifact.version)) | {"digest": str(artifact.digest)}
    files = [f for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()]
    write_note(key, path, files, origin)
    return Fetched(path, origin)


def _run(api: Any, place: WandbPlace, text: str, key: str, below: bool) -> Fetched:
    run = api.run(place.full)
    files = {str(f.name): f for f in run.files()}
    wanted = choose([Entry(name, int(f.size)) for name, f in files.items()], place.path, text, below)
    folder = _folder(place, place.name)
    for entry in wanted:
        _bring(files[entry.path], entry, folder)
    origin = _origin(place, text, str(run.id))
    path = folder / (place.path or ("" if below else wanted[0].path))
    write_note(key, path, [folder / e.path for e in wanted], origin)
    return Fetched(path, origin)


def choose(files: Sequence[Entry], path: str, text: str, below: bool) -> list[Entry]:
    """The files of a run that make a coder, its checkpoint first. `FormatError` where there is none of that name."""
    mine = [f for f in files if f.name.endswith(SUFFIXES)]
    if path:
        chosen = next((f for f in mine if f.path == path), None)
        if chosen is None:
            raise FormatError(f"{text}: the run has no file {path!r}. {suggest(path, [f.path for f in mine])}")
    else:
        weights = [f for f in mine if is_weights(f.name)]
        if not weights:
            held = ", ".join(f.path for f in files) or "nothing"
            raise FormatError(f"{text}: the run saved no weights; it holds {held}")
        if below:
            return mine
        samples = [f for f in weights if f.name.startswith("samples_")] or weights
        chosen = max(samples, key=lambda f: int(m[1]) if (m := _NUMBER.search(f.name)) else -1)
    # W&B keeps its own notes beside a run's files; a run's config is the e2e trainer's final_config.yaml.
    beside = [f for f in with_companions(mine, chosen) if f != chosen and not f.name.startswith("wandb-")]
    return [chosen, *beside]


def _bring(file: Any, entry: Entry, folder: Path) -> None:
    """One file of a run into the cache, whole or not at all."""
    target = folder / entry.path
    if target.is_file() and target.stat().st_size == entry.size:
        return
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".fetching-", dir=target.parent) as temp:
            file.download(root=temp, replace=True).close()
            got = Path(temp) / entry.path
            size = got.stat().st_size
            if size != entry.size:
                raise ServiceError(f"{entry.path}: the download broke off at {size:,} of {entry.size:,} bytes")
            got.replace(target)
        fsync_folder(target.parent)


def _folder(place: WandbPlace, last: str) -> Path:
    return cache_folder("wandb") / place.entity / place.project / last


def _origin(place: WandbPlace, text: str, revision: str) -> dict[str, Any]:
    repo = f"{place.entity}/{place.project}/{place.name}"
    return {"scheme": "wandb", "place": text, "repo": repo, "revision": revision, "path": place.path}


@contextmanager
def _plain_errors(wandb: Any, place: WandbPlace, text: str) -> Generator[None]:
    """W&B's errors, told apart by what they say: it raises one class for all of them."""
    try:
        yield
    except (FormatError, ServiceError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        said = reason.lower()
        if any(word in said for word in ("not found", "could not find", "does not exist", "does not contain", "404")):
            raise FormatError(f"{text}: no {place.full} on W&B ({reason})") from error
        if any(word in said for word in ("api key", "permission", "login", "401", "403")):
            raise FormatError(f"{text}: W&B refuses ({reason}); log in with `wandb login`") from error
        if isinstance(error, (wandb.errors.Error, OSError, ValueError)):
            raise ServiceError(f"{text}: W&B does not answer ({reason})") from error
        raise
