"""Opening, addressing, and every kind of damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from index.oracle import make_stream, write
from unmix.core.errors import ConfigError, CorruptError
from unmix.index import build, open_index
from unmix.index.reader import LatentIndex


@pytest.fixture
def index(tmp_path: Path) -> LatentIndex:
    return write(tmp_path / "i", make_stream(1), vocab=list("abcdefg"), meta={"tokenizer": "t", "coders": {"a": "h"}})


def test_addressing(index: LatentIndex, tmp_path: Path) -> None:
    assert index.names == ["a"] and len(index["a"]) == index["a"].n_latents == 5
    assert index[2].id == index["a"][2].id == index["a"][np.int64(2)].id == 2
    assert [latent.id for latent in index["a"]] == [0, 1, 2, 3, 4]
    assert index.meta == {"tokenizer": "t", "coders": {"a": "h"}}
    assert index["a"].n_tokens == index.n_tokens == 24 * 12
    assert "latent 2 of 'a'" in repr(index[2]) and "288 tokens" in repr(index) and "5 latents" in repr(index["a"])
    two = write(tmp_path / "two", make_stream(2, names=("layers.3", "layers.10")))
    with pytest.raises(ConfigError, match=r"indexes 2 coders; name one of layers\.3, layers\.10"):
        two[0]
    with pytest.raises(ConfigError, match=r"no coder 'layer\.3' in .*two\. Did you mean 'layers\.3'"):
        two["layer.3"]


MANY_FILES = """
import resource, sys
from unmix.index import open_index
resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
index = open_index(sys.argv[1])
print(len(index.description.segments), sum(len(index[name][0].top(1)) for name in index.names))
"""


def test_more_segments_than_files_may_be_open(tmp_path: Path) -> None:
    """Every map holds its file open: the process's own limit is raised as far as the system lets it."""
    names = ("a", "b", "c")
    write(tmp_path / "i", make_stream(3, names=names), segment_tokens=24)
    words = [sys.executable, "-c", MANY_FILES, str(tmp_path / "i")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    segments, shown = map(int, done.stdout.split())
    assert segments * len(names) * 2 > 40 and shown > 0


@pytest.mark.parametrize("latent", [-1, 5, 10**12])
def test_unknown_latents(index: LatentIndex, latent: int) -> None:
    with pytest.raises(ConfigError, match=rf"no latent {latent} in 'a': it has latents 0 to 4"):
        index[latent]


def test_token_strings(index: LatentIndex) -> None:
    assert index.token_strings([0, 6, 7, -1]) == ["a", "g", "<7>", "<-1>"]
    assert index.token_strings(np.array([3])) == ["d"]


def test_a_flipped_bit_anywhere_is_found_and_named(index: LatentIndex) -> None:
    assert index.verify() == build.verify(index.folder) == []
    names = sorted(f.relative_to(index.folder).as_posix() for f in index.folder.rglob("*") if f.is_file())
    assert {"tokens.bin", "a/segment-00000/blocks.bin", "a/statistics/sum.bin", "index.json"} <= set(names)
    # The root lists its own files, and of a segment its manifest only, which lists the rest.
    listed = set(json.loads((index.folder / "manifest.json").read_text())["files"])
    inner = json.loads((index.folder / "a/segment-00000/manifest.json").read_text())["files"]
    assert {"manifest.json"} | listed | {f"a/segment-00000/{name}" for name in inner} == set(names)
    assert not listed & {f"a/segment-00000/{name}" for name in inner}
    for name in names:
        if name == "manifest.json":
            continue
        path = index.folder / name
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 0x10
        path.write_bytes(bad)
        problems = build.verify(index.folder)
        assert problems and problems[0].path == path, name
        assert path.name == "manifest.json" or (len(problems) == 1 and "sha256" in str(problems[0]))
        path.write_bytes(good)


def test_missing_and_short_files_are_named_on_opening(index: LatentIndex) -> None:
    for path in sorted(f for f in index.folder.rglob("*") if f.is_file()):
        if path == index.folder / "manifest.json":
            continue
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        with pytest.raises(CorruptError, match=rf"{path}: found {len(good) - 1} bytes, expected {len(good)} bytes"):
            open_index(index.folder)
        path.unlink()
        with pytest.raises(CorruptError, match=f"{path}: found no file"):
            open_index(index.folder)
        path.write_bytes(good)
    open_index(index.folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "index", "schema": 1}', "\xff"])
def test_a_broken_manifest(index: LatentIndex, text: str) -> None:
    (index.folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        open_index(index.folder)


def test_no_index_at_all(tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CorruptError, match=r"manifest\.json: missing, so .* is not a whole index folder"):
            open_index(place)
        with pytest.raises(CorruptError, match=r"manifest\.json: missing"):
            build.verify(place)


@pytest.mark.parametrize("change", [{"schema": 99}, {"coders": 3}, {"roles": None}, {"extra": 1}])
def test_a_description_of_another_version(index: LatentIndex, change: dict[str, object]) -> None:
    path = index.folder / "index.json"
    tree = json.loads(path.read_text()) | change
    path.write_text(json.dumps(tree))
    manifest = json.loads((index.folder / "manifest.json").read_text())
    manifest["files"]["index.json"]["bytes"] = path.stat().st_size
    (index.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match=r"index\.json: "):
        open_index(index.folder)


def test_the_hash_is_of_the_content(index: LatentIndex, tmp_path: Path) -> None:
    same = write(tmp_path / "same", make_stream(1), vocab=list("abcdefg"), meta=index.meta, batch=2)
    other = write(tmp_path / "other", make_stream(1), vocab=list("abcdefG"), meta=index.meta)
    assert index.hash == same.hash != other.hash
    assert len(index.hash) == 16


def test_arrays_cannot_be_written_through(index: LatentIndex) -> None:
    for array in (index.tokens, index.documents, index["a"].max):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
