"""Coders on the Hugging Face hub: `hf://owner/repo[@revision]/path/to/folder`.

Only the files right inside the named folder are fetched (into the hub's own cache), never the repository.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from unmix.core.errors import FormatError, ServiceError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("unmix")

SCHEME = "hf://"
_PLACE = re.compile(r"^hf://([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.*))?$")
_SUFFIXES = {".json", ".safetensors", ".npz", ".pt", ".pkl", ".gz", ".yaml", ".yml"}


@dataclass(frozen=True)
class HubPlace:
    """A folder or file in a repository; `path` is empty for its root, `revision` None for the default branch."""

    repo: str
    path: str
    revision: str | None


def parse(text: str) -> HubPlace:
    """`hf://owner/repo[@revision]/path` in parts; `FormatError` where it is not that."""
    match = _PLACE.match(text)
    if match is None:
        raise FormatError(f"{text}: expected {SCHEME}owner/repo/path or {SCHEME}owner/repo@revision/path")
    return HubPlace(match[1], (match[3] or "").strip("/"), match[2])


def download(text: str, *, endpoint: str | None = None) -> Path:
    """The local path of a place on the hub, fetched where the cache lacks it.

    Raises `FormatError` where the repository, revision or path does not exist, needs a licence accepted, or
    holds only folders (listing them), and `ServiceError` where the hub does not answer and the cache is empty.
    """
    from huggingface_hub import errors

    place = parse(text)
    missing = (
        errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError,
        errors.HFValidationError,
    )  # fmt: skip
    # The hub's client re-exports its HTTP library's base error (httpx or, from 2.0, httpx2) from here.
    network = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    try:
        return _fetch(place, text, endpoint)
    except errors.GatedRepoError as error:
        raise FormatError(
            f"{text}: {place.repo} asks for its licence to be accepted on the hub, and for a token (hf auth login)"
        ) from error
    except missing as error:
        reason = str(error).strip().splitlines()[-1]
        raise FormatError(f"{text}: not found on the hub ({type(error).__name__}: {reason})") from error
    except (network, errors.LocalEntryNotFoundError, OSError) as error:
        cached = _cached(place)
        if cached is not None:
            log.warning("%s: the hub does not answer; using the copy in the cache", text)
            return cached
        raise ServiceError(f"{text}: the hub does not answer ({type(error).__name__}: {error})") from error


def _fetch(place: HubPlace, text: str, endpoint: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    folder, names = _files(HfApi(endpoint=endpoint), place, text)
    if not names:
        raise FormatError(f"{text}: holds no files that a coder could be in")
    local = [
        hf_hub_download(place.repo, f"{folder}/{name}" if folder else name, revision=place.revision, endpoint=endpoint)
        for name in names
    ]
    chosen = PurePosixPath(place.path).name
    return Path(local[names.index(chosen)]) if folder != place.path else Path(local[0]).parent


def _files(api: HfApi, place: HubPlace, text: str) -> tuple[str, list[str]]:
    """The folder that the place names or lies in, and the names of its files."""
    from huggingface_hub import RepoFolder

    parent = str(PurePosixPath(place.path).parent) if place.path else ""
    parent = "" if parent == "." else parent
    is_file = PurePosixPath(place.path).suffix in _SUFFIXES
    folder = parent if is_file else place.path
    entries = list(api.list_repo_tree(place.repo, folder or None, revision=place.revision))
    names = [
        PurePosixPath(e.path).name
        for e in entries
        if not isinstance(e, RepoFolder) and PurePosixPath(e.path).suffix in _SUFFIXES
    ]
    if is_file and PurePosixPath(place.path).name not in names:
        raise FormatError(f"{text}: no such file; {folder or 'the root'} holds {', '.join(names) or 'none'}")
    folders = [PurePosixPath(e.path).name for e in entries if isinstance(e, RepoFolder)]
    if not names and folders:
        shown = ", ".join(folders[:12]) + (", …" if len(folders) > 12 else "")
        raise FormatError(f"{text}: holds only folders; name one of them: {shown}")
    return folder, names


def _cached(place: HubPlace) -> Path | None:
    """The place in the hub's cache, where an earlier call left it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        root = snapshot_download(place.repo, revision=place.revision, local_files_only=True)
    except (LocalEntryNotFoundError, OSError):
        return None
    path = Path(root) / place.path
    if path.is_file() or (path.is_dir() and any(f.is_file() for f in path.iterdir())):
        return path
    return None
