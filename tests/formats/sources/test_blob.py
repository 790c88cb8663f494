"""Plain addresses: resumed, checked, whole or absent."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from formats.sources.standin import Answer, Hub, running
from unmix.core.errors import CorruptError, FormatError, ServiceError
from unmix.formats.sources import blob
from unmix.formats.sources.blob import fetch, hub_place, parse


class Blobs(Answer):
    """Serves the files below `root` at their paths, with an ETag that changes with the content."""

    def answer(self) -> None:
        path = self.server.root / self.path.partition("?")[0].lstrip("/")
        if self.server.status:
            self.reply(self.server.status, b"")
        elif not path.is_file():
            self.reply(404, b"")
        else:
            data = path.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            if self.headers.get("If-Range", tag) != tag:
                del self.headers["Range"]
            self.serve(data, {"ETag": tag}, path.name)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tmp_path / "blobs")
    server.RequestHandlerClass = Blobs
    (tmp_path / "blobs" / "sae").mkdir(parents=True)
    (tmp_path / "blobs" / "sae" / "6.pt").write_bytes(bytes(range(256)) * 1000)
    monkeypatch.setattr(blob, "_CHUNK", 1000)
    with running(server):
        yield server


def digest(store: Hub) -> str:
    return hashlib.sha256((store.root / "sae" / "6.pt").read_bytes()).hexdigest()


def halves(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "unmix-cache" / "files").rglob("*.part*"))


def test_a_file_is_fetched_once_and_kept(store, tmp_path):
    found = fetch(f"{store.url}/sae/6.pt")
    assert found.path.name == "6.pt" and found.path.stat().st_size == 256_000
    assert found.origin == {
        "scheme": "https", "place": f"{store.url}/sae/6.pt", "url": f"{store.url}/sae/6.pt", "sha256": digest(store),
    }  # fmt: skip
    store.status = 500
    assert fetch(f"{store.url}/sae/6.pt").path == found.path
    assert store.fetched == ["6.pt"] and halves(tmp_path) == []


def test_a_dropped_connection_is_gone_on_with(store):
    store.cut_after, store.cuts = 100_000, 2
    found = fetch(f"{store.url}/sae/6.pt#sha256={digest(store)}&size=256000")
    assert found.path.read_bytes() == (store.root / "sae" / "6.pt").read_bytes()
    assert store.ranges == ["bytes=100000-", "bytes=200000-"]


def test_a_later_process_goes_on_where_one_was_killed(store, tmp_path):
    store.cut_after, store.cuts = 100_000, 1

    def killed(_seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{store.url}/sae/6.pt")
    assert halves(tmp_path) == ["6.pt.part", "6.pt.part.json"]
    fetch(f"{store.url}/sae/6.pt")
    assert store.ranges == ["bytes=100000-"] and halves(tmp_path) == []


def test_half_of_an_older_version_is_thrown_away(store):
    store.cut_after, store.cuts = 100_000, 1
    original = store.root / "sae" / "6.pt"

    def changed(_seconds: float) -> None:
        original.write_bytes(b"new" * 90_000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", changed)
        assert fetch(f"{store.url}/sae/6.pt").path.read_bytes() == b"new" * 90_000


def test_a_download_that_gives_up_says_how_far_it_came(store, tmp_path):
    store.cut_after, store.cuts = 0, 99
    with pytest.raises(ServiceError, match=r"broke off after 0 bytes .* the same command goes on from there") as caught:
        fetch(f"{store.url}/sae/6.pt")
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "unmix-cache").rglob("6.pt"))


@pytest.mark.parametrize(
    ("fragment", "match"),
    [
        ("sha256=" + "0" * 64, r"6\.pt: SHA-256 is [0-9a-f]{64}, expected 0{64} \(published for http"),
        ("size=7", r"6\.pt: 256,000 bytes, expected 7 \(published for http"),
    ],
)
def test_other_bytes_than_the_published_ones_are_refused(store, tmp_path, fragment, match):
    with pytest.raises(CorruptError, match=match):
        fetch(f"{store.url}/sae/6.pt#{fragment}")
    assert not list((tmp_path / "unmix-cache").rglob("6.pt*"))


def test_without_a_published_hash_the_first_fetch_is_the_measure(store):
    path = fetch(f"{store.url}/sae/6.pt").path
    path.write_bytes(b"\0" * 256_000)
    with pytest.raises(CorruptError, match=r"changed since it was fetched from .* Delete the file to fetch it again"):
        fetch(f"{store.url}/sae/6.pt")
    path.unlink()
    assert fetch(f"{store.url}/sae/6.pt").origin["sha256"] == digest(store)


@pytest.mark.parametrize(
    ("status", "error"), [(404, FormatError), (403, FormatError), (418, FormatError), (503, ServiceError)]
)
def test_what_the_server_says(store, status, error):
    store.status = status
    with pytest.raises(error, match=str(status)):
        fetch(f"{store.url}/sae/6.pt")


def test_a_server_that_is_not_there():
    with pytest.raises(ServiceError, match="broke off after 0 bytes"):
        fetch("http://127.0.0.1:9/x.pt")


def test_offline(store, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ServiceError, match=r"not in the cache, and the network may not be used"):
        fetch(f"{store.url}/sae/6.pt")


def test_two_at_once_fetch_it_once(store):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(f"{store.url}/sae/6.pt").path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and store.fetched == ["6.pt"]


def test_a_key_in_the_address_is_not_recorded(store, tmp_path):
    found = fetch(f"{store.url}/sae/6.pt?sig=SECRET")
    assert "SECRET" not in str(found)
    written = [p.read_text() for p in (tmp_path / "unmix-cache").rglob("*.json")]
    assert written and not any("SECRET" in text for text in written)
    with pytest.raises(FormatError) as caught:
        fetch(f"{store.url}/sae/7.pt?sig=SECRET")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("https://host/", "names no file"),
        ("http://host/x.pt", r"use https, or add #sha256=HEX"),
        ("https://host/x.pt#md5=1", "only sha256=HEX and size=BYTES are understood, found md5"),
        ("https://host/x.pt#sha256=12", "64 hexadecimal digits"),
        ("https://host/x.pt#size=big", "size must be a number of bytes, found 'big'"),
        ("https://me:word@host/x.pt", "with a user or password"),
    ],
)
def test_addresses_that_are_refused(text, match):
    with pytest.raises(FormatError, match=match) as caught:
        parse(text)
    assert "word@" not in str(caught.value)


def test_pages_of_the_hub_are_hub_places():
    page = "https://huggingface.co/google/gemma-scope-2b-pt-res"
    assert hub_place(page) == "hf://google/gemma-scope-2b-pt-res"
    assert hub_place(f"{page}/tree/main/layer_20/width_16k") == "hf://google/gemma-scope-2b-pt-res/layer_20/width_16k"
    assert hub_place(f"{page}/blob/refs%2Fpr%2F1/a.npz") == "hf://google/gemma-scope-2b-pt-res@refs%2Fpr%2F1/a.npz"
    assert hub_place("https://example.org/google/x/resolve/main/a.npz") is None


def test_a_page_of_the_hub_is_fetched_from_the_hub(hub):
    found = fetch("https://huggingface.co/me/coders/tree/main/layer_1/wide")
    assert found.origin["scheme"] == "hf" and (found.path / "config.json").is_file()
