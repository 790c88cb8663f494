"""One file at a plain address: `https://host/path/file[#sha256=HEX&size=BYTES]`.

Fetched into `$UNMIX_CACHE/files`, resumed where a download broke off, visible only when whole. The SHA-256 is checked
against the published one, or, where none was published, against the one of the first fetch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from unmix.core.atomic import disk_errors, fsync_folder, sha256_file, write_json
from unmix.core.errors import CorruptError, FormatError, ServiceError
from unmix.core.progress import task
from unmix.formats.sources.base import Fetched, cache_folder

if TYPE_CHECKING:
    import httpx

_CHUNK = 1 << 20
_TRIES = 5
"""Requests for one file that may break off one after another, without one new byte, before it is given up."""
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_HUB_PAGE = re.compile(r"^/([\w.-]+/[\w.-]+)(?:/(?:blob|tree|resolve|raw)/([^/]+)(?:/(.*))?)?$")


@dataclass(frozen=True)
class Address:
    """Where a file is, and what is known of its bytes."""

    url: str
    sha256: str | None = None
    size: int | None = None

    @property
    def shown(self) -> str:
        """The address for messages and records: a query, which may hold a signature or a key, is left out."""
        return self.url.partition("?")[0]

    @property
    def name(self) -> str:
        """The file's own name."""
        return unquote(PurePosixPath(urlsplit(self.url).path).name)


def parse(text: str) -> Address:
    """An address in parts. `FormatError` where it names no file, or is neither https nor pinned by a hash."""
    parts, shown = urlsplit(text), text.partition("?")[0]
    facts = dict(parse_qsl(parts.fragment, keep_blank_values=True))
    sha256, size = facts.pop("sha256", None), facts.pop("size", None)
    if facts:
        raise FormatError(f"{shown}: after # only sha256=HEX and size=BYTES are understood, found {', '.join(facts)}")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise FormatError(f"{shown}: sha256 must be 64 hexadecimal digits")
    if size is not None and not size.isdigit():
        raise FormatError(f"{shown}: size must be a number of bytes, found {size!r}")
    if parts.username or parts.password:
        raise FormatError("an address with a user or password in it is not fetched: it would end up in logs and caches")
    if parts.scheme == "http" and sha256 is None and parts.hostname not in _LOOPBACK:
        raise FormatError(f"{shown}: anybody on the way can change what http brings; use https, or add #sha256=HEX")
    if not PurePosixPath(parts.path).name:
        raise FormatError(f"{shown}: names no file")
    url = urlunsplit((parts.scheme, parts.netloc, parts.path, parts.query, ""))
    return Address(url, sha256.lower() if sha256 else None, int(size) if size else None)


def hub_place(text: str) -> str | None:
    """The `hf://` place that a page of huggingface.co shows, for addresses copied from the browser; else None."""
    parts = urlsplit(text)
    match = _HUB_PAGE.match(parts.path.rstrip("/"))
    if parts.hostname not in ("huggingface.co", "hf.co") or match is None:
        return None
    revision = f"@{quote(unquote(match[2]), safe='')}" if match[2] and match[2] != "main" else ""
    return f"hf://{match[1]}{revision}/{unquote(match[3] or '')}".rstrip("/")


def fetch(text: str, *, below: bool = False) -> Fetched:
    """The file at an address, from the cache where it was fetched before. `below` changes nothing: it is one file.

    Raises `FormatError` (not found, refused, not an address), `CorruptError` where the bytes are not the published
    ones, `ServiceError` where the server does not answer, and `MachineError` where the disk refuses.
    """
    page = hub_place(text)
    if page is not None:
        from unmix.formats.sources import hub

        return hub.fetch(page, below=below)
    address = parse(text)
    folder = cache_folder("files") / hashlib.sha256(address.url.encode()).hexdigest()[:16]
    path, note = folder / address.name, folder / f".{address.name}.origin.json"
    if not path.is_file():
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
            raise ServiceError(
                f"{address.shown}: not in the cache, and the network may not be used (HF_HUB_OFFLINE is set)"
            )
        with disk_errors(path), _alone(folder):
            if not path.is_file():
                note.unlink(missing_ok=True)
                _download(address, path)
    digest = _checked(address, path, note)
    return Fetched(path, {"scheme": "https", "place": address.shown, "url": address.shown, "sha256": digest})


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Hold `folder` while inside: a second process waits, and then finds the file instead of writing into its half."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _checked(address: Address, path: Path, note: Path) -> str:
    """The SHA-256 of a cached file, after comparing it with what was published and what came the first time."""
    digest, size = sha256_file(path), path.stat().st_size
    _compare(address, digest, size, str(path))
    if note.is_file():
        first: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if first.get("sha256") != digest:
            raise CorruptError(
                f"{path}: changed since it was fetched from {address.shown} (SHA-256 {digest[:12]}…, then "
                f"{str(first.get('sha256'))[:12]}…). Delete the file to fetch it again"
            )
    else:
        write_json(note, {"url": address.shown, "sha256": digest, "size": size, "published": bool(address.sha256)})
    return digest


def _compare(address: Address, digest: str, size: int, shown: str) -> None:
    if address.size is not None and size != address.size:
        raise CorruptError(f"{shown}: {size:,} bytes, expected {address.size:,} (published for {address.shown})")
    if address.sha256 is not None and digest != address.sha256:
        raise CorruptError(f"{shown}: SHA-256 is {digest}, expected {address.sha256} (published for {address.shown})")


def _download(address: Address, path: Path) -> None:
    """Bring the file to `path` through `NAME.part`, which a broken download leaves to be gone on with."""
    import httpx

    part, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    left = _TRIES
    with httpx.Client(follow_redirects=True, timeout=httpx.Timeout(30.0)) as client:
        while True:
            before = part.stat().st_size if part.is_file() else 0
            try:
                _stream(client, address, part, tag)
                break
            except (httpx.TransportError, _BrokenOffError) as error:
                grown = part.is_file() and part.stat().st_size > before
                left = _TRIES if grown else left - 1
                if left == 0:
                    kept = part.stat().st_size if part.is_file() else 0
                    raise ServiceError(
                        f"{address.shown}: the download broke off after {kept:,} bytes ({error}); "
                        "the same command goes on from there"
                    ) from error
                time.sleep(2.0 ** (_TRIES - left))
            except httpx.HTTPError as error:
                raise ServiceError(f"{address.shown}: cannot be fetched ({error})") from error
    try:
        _compare(address, sha256_file(part), part.stat().st_size, path.name)
    except CorruptError:
        part.unlink()
        raise
    finally:
        tag.unlink(missing_ok=True)
    with part.open("rb+") as handle:
        os.fsync(handle.fileno())
    part.replace(path)
    fsync_folder(path.parent)


class _BrokenOffError(Exception):
    """The server stopped in the middle of the file, or answered that it is busy."""


def _stream(client: httpx.Client, address: Address, part: Path, tag: Path) -> None:
    """One request; appends to `part` where the server still has the same version of the file."""
    have = part.stat().st_size if part.is_file() else 0
    known: dict[str, Any] = json.loads(tag.read_text(encoding="utf-8")) if have and tag.is_file() else {}
    headers = {"Accept-Encoding": "identity"}
    version = known.get("version")
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": str(version)}
    with client.stream("GET", address.url, headers=headers) as response:
        if response.status_code == 416 and known.get("size") == have:
            return
        resumed = response.status_code == 206
        if not resumed:
            _check_answer(response, address)
            have = 0
            part.unlink(missing_ok=True)
            write_json(tag, {"version": _version(response), "size": _length(response)})
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise _BrokenOffError("the server sent another part than it was asked for")
        expected = have + (_length(response) or 0) if _length(response) is not None else None
        with (
            part.open("ab" if resumed else "wb") as handle,
            task("fetch", (expected or 0) / 1e6, "MB", have / 1e6) as bar,
        ):
            for chunk in response.iter_bytes(_CHUNK):
                handle.write(chunk)
                bar.advance(len(chunk) / 1e6)
    got = part.stat().st_size
    if expected is not None and got != expected:
        if got > expected:
            part.unlink()
        raise _BrokenOffError(f"{got:,} of {expected:,} bytes")


def _check_answer(response: httpx.Response, address: Address) -> None:
    status = response.status_code
    if status in (404, 410):
        raise FormatError(f"{address.shown}: no such file ({status})")
    if status in (401, 403):
        raise FormatError(f"{address.shown}: the server refuses ({status})")
    if status in (408, 416, 429) or status >= 500:
        raise _BrokenOffError(f"the server answered {status}")
    if status != 200:
        raise FormatError(f"{address.shown}: the server answered {status}")
    if response.url.scheme == "http" and address.url.startswith("https:"):
        raise FormatError(f"{address.shown}: sends on to plain http, which anybody on the way can change")


def _version(response: httpx.Response) -> str | None:
    """What tells this version of the file from others; weak tags do not."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _length(response: httpx.Response) -> int | None:
    """Bytes that the answer says it has."""
    value = response.headers.get("Content-Length")
    return int(value) if value and value.isdigit() else None
