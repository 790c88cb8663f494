"""`hf://` places against a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from unmix.coder.config import CoderConfig, ReLU
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import FormatError, ServiceError
from unmix.formats import hub
from unmix.formats.hub import download, parse
from unmix.formats.place import Place

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files below `root` as the repository `me/coders`; counts what is fetched."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.broken = False
        self.gated = False
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server.broken:
            self.reply(500, b"down")
        elif self.server.gated:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not path.removeprefix("/api/models").startswith("/me/coders"):
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/me/coders/tree/"):
            self.tree(path.removeprefix("/api/models/me/coders/tree/"))
        else:
            self.file(path.removeprefix("/me/coders/resolve/"))

    def tree(self, rest: str) -> None:
        revision, _, inside = rest.partition("/")
        folder = self.server.root / inside
        if revision not in ("main", COMMIT):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif not folder.is_dir():
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            entries = [
                {"type": "directory" if f.is_dir() else "file", "oid": "0" * 40, "size": f.stat().st_size,
                 "path": f.relative_to(self.server.root).as_posix()}
                for f in sorted(folder.iterdir())
            ]  # fmt: skip
            self.reply(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def file(self, rest: str) -> None:
        path = self.server.root / rest.partition("/")[2]
        if not path.is_file():
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        if self.command == "GET":
            self.server.fetched.append(rest.partition("/")[2])
        etag = hashlib.sha256(data).hexdigest()
        self.reply(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits 23 s before it gives up
    root = tmp_path / "repo"
    coder().save(root / "layer_1" / "wide")
    (root / "layer_1" / "wide" / "weights.bin").write_bytes(b"huge")
    (root / "layer_1" / "wide" / "deeper").mkdir()
    (root / "README.md").write_text("hello")
    running = Hub(root)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def coder() -> SparseCoder:
    return SparseCoder(CoderConfig(reads=("a",), d_in=4, n_latents=6, activation=ReLU()), seed=5).eval()


def test_parts_of_a_place():
    place = parse("hf://google/gemma-scope@v1/layer_20/width_16k")
    assert (place.repo, place.revision, place.path) == ("google/gemma-scope", "v1", "layer_20/width_16k")
    assert parse("hf://a/b").path == "" and parse("hf://a/b/").revision is None
    with pytest.raises(FormatError, match="expected hf://owner/repo/path"):
        parse("hf://onlyowner")


def test_a_folder_is_fetched_and_nothing_else(server):
    from unmix.formats.native import NativeFormat

    place = Place(download("hf://me/coders/layer_1/wide", endpoint=server.url))
    assert sorted(server.fetched) == [
        f"layer_1/wide/{name}" for name in ("coder.safetensors", "config.json", "manifest.json")
    ]
    loaded = NativeFormat().load(place)
    assert torch.equal(loaded.W_dec, coder().W_dec)


def test_load_reads_from_the_hub(server, monkeypatch):
    from unmix.formats import load

    real = hub.download
    monkeypatch.setattr("unmix.formats.loading.download", lambda text: real(text, endpoint=server.url))
    assert load("hf://me/coders/layer_1/wide").hash() == coder().hash()
    assert load("hf://me/coders/layer_1/wide/config.json").hash() == coder().hash()


def test_what_is_not_there(server):
    with pytest.raises(FormatError, match=r"holds only folders; name one of them: layer_1"):
        download("hf://me/coders", endpoint=server.url)
    with pytest.raises(FormatError, match=r"not found on the hub \(RepositoryNotFoundError"):
        download("hf://me/others/x", endpoint=server.url)
    with pytest.raises(FormatError, match="RevisionNotFoundError"):
        download("hf://me/coders@v9/layer_1", endpoint=server.url)
    with pytest.raises(FormatError, match="not found on the hub"):
        download("hf://me/coders/layer_2", endpoint=server.url)
    with pytest.raises(FormatError, match=r"no such file; layer_1/wide holds coder.safetensors, config.json"):
        download("hf://me/coders/layer_1/wide/other.json", endpoint=server.url)
    server.gated = True
    with pytest.raises(FormatError, match="asks for its licence to be accepted"):
        download("hf://me/coders/layer_1/wide", endpoint=server.url)


def test_a_hub_that_does_not_answer(server):
    server.broken = True
    with pytest.raises(ServiceError, match="the hub does not answer") as caught:
        download("hf://me/coders/layer_1/wide", endpoint=server.url)
    assert caught.value.exit_code == 3
    with pytest.raises(ServiceError, match="the hub does not answer"):
        download("hf://me/coders/layer_1/wide", endpoint="http://127.0.0.1:9")


def test_the_cache_serves_when_the_hub_does_not(server, caplog):
    first = download("hf://me/coders/layer_1/wide", endpoint=server.url)
    server.broken = True
    assert download("hf://me/coders/layer_1/wide", endpoint=server.url) == first
    assert "using the copy in the cache" in caplog.text
