"""Coders on the Hugging Face hub: `hf://owner/repo[@revision]/path/to/folder-or-file`.

Only what the coder needs is fetched, into the hub's own cache and all of it from one commit; never the repository.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

from unmix.core.atomic import disk_fault
from unmix.core.errors import FormatError, MachineError, ServiceError
from unmix.core.progress import Task, task
from unmix.formats.sources.base import Fetched, suggest
from unmix.formats.sources.choosing import PARTS, SUFFIXES, Entry, is_weights, names_a_file, of_folder, with_companions
from unmix.formats.sources.records import read_note, write_note

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("unmix")

SCHEME = "hf://"
_PLACE = re.compile(r"^hf://([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.*))?$")
LIMIT_GB = 20.0
"""More than this is not fetched by itself; `UNMIX_FETCH_LIMIT_GB` overrides it."""
SAY_FROM_MB = 100.0
"""From this size on, a fetch is announced."""
_DEPTH = 4
"""How many folders below a place are looked into for coders."""


@dataclass(frozen=True)
class HubPlace:
    """A folder or file in a repository; `path` is empty for its root, `revision` None for the default branch."""

    repo: str
    path: str
    revision: str | None


def parse(text: str) -> HubPlace:
    """`hf://owner/repo[@revision]/path` in parts; `FormatError` where it is not that.

    A revision is a branch, a tag or a commit; a slash in its name is written `%2F`.
    """
    match = _PLACE.match(text)
    if match is None:
        raise FormatError(f"{text}: expected {SCHEME}owner/repo/path or {SCHEME}owner/repo@revision/path")
    return HubPlace(match[1], (match[3] or "").strip("/"), unquote(match[2]) if match[2] else None)


def fetch(text: str, *, below: bool = False, endpoint: str | None = None) -> Fetched:
    """A place on the hub, fetched where the cache lacks it; with `below`, the folders under it too.

    A folder comes with its own files only; a file with the small settings and statistics beside it. Raises
    `FormatError` where the repository, revision or path does not exist, needs a licence accepted, holds only folders
    or is larger than `LIMIT_GB`; `ServiceError` where the hub does not answer and nothing whole is in the cache.
    """
    from huggingface_hub import HfApi, constants

    place = parse(text)
    if constants.HF_HUB_OFFLINE:
        found = _from_cache(place, text, below)
        if found is None:
            raise ServiceError(f"{text}: not in the cache, and the hub may not be asked (HF_HUB_OFFLINE is set)")
        return found
    with _plain_errors(place, text):
        try:
            return _fetch(HfApi(endpoint=endpoint), place, text, below)
        except Exception as error:
            found = _from_cache(place, text, below) if _is_outage(error) else None
            if found is None:
                raise
            log.warning("%s: the hub does not answer; using the copy in the cache", text)
            return found


def subfolders(text: str, *, endpoint: str | None = None) -> list[str]:
    """Names of the folders right inside a place on the hub. Errors as `fetch`."""
    from huggingface_hub import HfApi

    place = parse(text)
    with _plain_errors(place, text):
        return _Listing(HfApi(endpoint=endpoint), place).existing(place.path, text)[1]


def _fetch(api: HfApi, place: HubPlace, text: str, below: bool) -> Fetched:
    info = api.model_info(place.repo, revision=place.revision, expand=["sha"])
    commit, repo = str(info.sha), info.id
    if repo != place.repo:
        log.warning("%s: %s is called %s now", text, place.repo, repo)
    there = replace(place, repo=repo, revision=commit)
    files = _needed(api, there, text, below)
    _check_size(files, place, text)
    paths = _download(api, there, files)
    # Every file of a commit lies at its own path below one folder: the snapshot.
    path = Path(str(paths[0]).removesuffix(files[0].path)) / place.path
    origin = {"scheme": "hf", "place": text, "repo": repo, "revision": commit, "path": place.path}
    write_note(_key(place, below), path, paths, origin)
    return Fetched(path, origin)


def _needed(api: HfApi, place: HubPlace, text: str, below: bool) -> list[Entry]:
    """The files to fetch. `FormatError` where there are none, naming what is there instead."""
    listing = _Listing(api, place)
    if names_a_file(place.path):
        folder, name = Entry(place.path, 0).folder, Entry(place.path, 0).name
        files, folders = listing.existing(folder, text)
        chosen = next((f for f in files if f.path == place.path), None)
        if chosen is not None:
            return with_companions(files, chosen)
        # Some folders are named like files: jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs/v5_32k_layer_0.pt
        if name not in folders:
            options = [f.name for f in files if f.name.endswith(SUFFIXES)] + folders
            hint = suggest(name, options) if options else "It holds no coder's files."
            raise FormatError(f"{text}: {folder or 'the root'} has no file of that name. {hint}")
    files, folders = listing.existing(place.path, text, below)
    chosen_files = [f for f in files if f.name.endswith(SUFFIXES)] if below else of_folder(files, place.path)
    if not any(is_weights(f.name) for f in chosen_files):
        _nothing(text, folders)
    return chosen_files


def _nothing(text: str, folders: Sequence[str]) -> NoReturn:
    if not folders:
        raise FormatError(f"{text}: holds no files that a coder could be in")
    shown = ", ".join(folders[:12]) + (", …" if len(folders) > 12 else "")
    raise FormatError(f"{text}: holds only folders; name one of them, or use load_all: {shown}")


class _Listing:
    """Files and folders of a repository at one commit."""

    def __init__(self, api: HfApi, place: HubPlace) -> None:
        self.api, self.place = api, place

    def existing(self, folder: str, text: str, below: bool = False) -> tuple[list[Entry], list[str]]:
        """As `of`; `FormatError` naming the nearest folders where there is no such folder."""
        try:
            return self.of(folder, below)
        except FileNotFoundError as error:
            raise FormatError(f"{text}: {self.nearest(folder)}") from error

    def of(self, folder: str, below: bool) -> tuple[list[Entry], list[str]]:
        """Files in a folder (and down to `_DEPTH` below it), names of folders in it. `FileNotFoundError`."""
        from huggingface_hub import RepoFolder
        from huggingface_hub.errors import EntryNotFoundError

        try:
            tree = list(
                self.api.list_repo_tree(self.place.repo, folder or None, recursive=below, revision=self.place.revision)
            )
        except EntryNotFoundError as error:
            raise FileNotFoundError(folder) from error
        depth = len(PurePosixPath(folder).parts)
        near = [e for e in tree if len(PurePosixPath(e.path).parts) <= depth + 1 + _DEPTH]
        files = [Entry(e.path, e.size) for e in near if not isinstance(e, RepoFolder)]
        direct = [e for e in tree if isinstance(e, RepoFolder) and Entry(e.path, 0).folder == folder]
        if not below:
            for entry in direct:
                if Entry(entry.path, 0).name in PARTS:
                    files += self.of(entry.path, below=False)[0]
        return files, [Entry(e.path, 0).name for e in direct]

    def nearest(self, folder: str) -> str:
        """In words: the deepest part of `folder` that exists, and what it holds that is most like the rest."""
        parts = PurePosixPath(folder).parts
        for depth in range(len(parts) - 1, -1, -1):
            parent = "/".join(parts[:depth])
            try:
                _, folders = self.of(parent, below=False)
            except FileNotFoundError:
                continue
            where = parent or "the root"
            hint = suggest(parts[depth], folders) if folders else "It holds no folders."
            return f"{where} of {self.place.repo} has no folder {parts[depth]!r}. {hint}"
        return f"{self.place.repo} has no folder {folder!r}"


def _check_size(files: Sequence[Entry], place: HubPlace, text: str) -> None:
    said = os.environ.get("UNMIX_FETCH_LIMIT_GB", LIMIT_GB)
    try:
        limit = float(said)
    except ValueError as error:
        raise FormatError(f"UNMIX_FETCH_LIMIT_GB must be a number, found {said!r}") from error
    total = sum(f.size for f in files) / 1e9
    if total > limit:
        raise FormatError(
            f"{text}: {len(files)} files, {total:,.1f} GB, more than the limit of {limit:g} GB. Name a folder or file "
            f"in it, raise UNMIX_FETCH_LIMIT_GB, or fetch it with `hf download {place.repo}` and load that folder"
        )


def _download(api: HfApi, place: HubPlace, files: Sequence[Entry]) -> list[Path]:
    total = sum(f.size for f in files) / 1e6
    if total >= SAY_FROM_MB:
        log.info("fetching %d files, %s MB, from %s", len(files), f"{total:,.0f}", place.repo)
    paths: list[Path] = []
    with task("fetch", total, "MB") as shown:
        bar: dict[str, Any] = {}
        if "tqdm_class" in inspect.signature(api.hf_hub_download).parameters:  # absent before huggingface-hub 1.4
            bar["tqdm_class"] = _bar(shown)
        for file in files:
            before = shown.done
            paths.append(Path(api.hf_hub_download(place.repo, file.path, revision=place.revision, **bar)))
            shown.advance(max(file.size / 1e6 - (shown.done - before), 0), note=file.name)
    return paths


def _bar(shown: Task) -> type[Any]:
    """The hub's bar, drawn as ours."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            shown.advance((n or 0) / 1e6)
            return None

    return Bar


def _key(place: HubPlace, below: bool) -> str:
    return f"{SCHEME}{place.repo}@{place.revision or ''}/{place.path}{'/**' if below else ''}"


def _from_cache(place: HubPlace, text: str, below: bool) -> Fetched | None:
    """What an earlier fetch left whole, or what another program left in the hub's cache."""
    note = read_note(_key(place, below)) or (None if below else read_note(_key(place, True)))
    if note is not None:
        return Fetched(note[0], {**note[1], "place": text})
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            place.repo, revision=place.revision, local_files_only=True, allow_patterns=[place.path or "*"]
        )
    except (OSError, ValueError):
        return None
    path = Path(found) / place.path
    if not (path.is_file() or (path.is_dir() and any(f.is_file() for f in path.rglob("*")))):
        return None
    return Fetched(
        path, {"scheme": "hf", "place": text, "repo": place.repo, "revision": Path(found).name, "path": place.path}
    )


def _is_outage(error: Exception) -> bool:
    """Whether the hub, or the way to it, failed; not the question."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", 0)
        return status == 429 or status >= 500
    if isinstance(error, OSError) and disk_fault(error) is not None:
        return False
    # The hub's client re-exports its HTTP library's base error (httpx or, from 2.0, httpx2) from here.
    network = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    return isinstance(error, (network, OSError, RuntimeError))


@contextmanager
def _plain_errors(place: HubPlace, text: str) -> Generator[None]:
    """One clear error for each way in which the hub says no."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise FormatError(
            f"{text}: {place.repo} asks for its licence to be accepted on the hub, and for a token (hf auth login)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FormatError(
            f"{text}: no repository {place.repo} on the hub; a private one needs a token (hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FormatError(f"{text}: {place.repo} has no branch, tag or commit {place.revision!r}") from error
    except errors.DisabledRepoError as error:
        raise FormatError(f"{text}: {place.repo} was disabled on the hub") from error
    except errors.HFValidationError as error:
        raise FormatError(f"{text}: not the name of a repository ({error})") from error
    except Exception as error:
        if _is_outage(error):
            raise ServiceError(f"{text}: the hub does not answer ({type(error).__name__}: {_first(error)})") from error
        if isinstance(error, errors.HfHubHTTPError):
            raise FormatError(
                f"{text}: the hub refuses ({_first(error)}); is the token right? (hf auth login)"
            ) from error
        if isinstance(error, OSError) and (fault := disk_fault(error)) is not None:
            raise MachineError(f"{text}: cannot be written to the hub's cache: {fault}") from error
        raise


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"
