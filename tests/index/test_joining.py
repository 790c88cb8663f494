"""Parts of a build, made apart, become the index of one; indexes over different text become one over all of it."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from index.builds import changed_codes, make_source, small_cut, tree
from index.oracle import make_stream, write
from unmix.cli._index_merge import command
from unmix.core.errors import ConfigError, CorruptError, ResumeError
from unmix.index.building import build
from unmix.index.joining import join
from unmix.index.reader import open_index
from unmix.index.shards import building_folder
from unmix.index.sources.arrays import ArrayCodes, ArraySource


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_cut(monkeypatch)


def test_parts_made_on_machines_that_share_nothing(tmp_path: Path) -> None:
    build(tmp_path / "one", make_source)
    places = [tmp_path / f"machine{i}" / "i" for i in range(3)]
    for i, place in enumerate(places):
        assert build(place, partial(make_source, batch=i + 1), part=(i, 3), budget_bytes=10**i) is None
    with pytest.raises(ConfigError, match=r"2 of 6 shards are in none of the parts: 1, 4"):
        join(tmp_path / "joined", [places[0], places[2]])
    index = join(tmp_path / "joined", places)  # goes on with what the first call took
    assert index.verify() == []
    assert tree(tmp_path / "joined") == tree(tmp_path / "one")
    assert not building_folder(tmp_path / "joined").exists()
    assert all(building_folder(place).exists() for place in places)
    join(tmp_path / "again", [building_folder(place) for place in places])
    assert tree(tmp_path / "again") == tree(tmp_path / "one")
    join(places[0], places)  # at the place of a part
    assert tree(places[0]) == tree(tmp_path / "one")


def test_a_broken_shard_of_a_part_counts_as_missing(tmp_path: Path) -> None:
    for i in range(2):
        build(tmp_path / str(i), make_source, part=(i, 2))
    file = building_folder(tmp_path / "1") / "shards/00003/a/run-00000/values.bin"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(ConfigError, match="1 of 6 shards are in none of the parts: 3"):
        join(tmp_path / "joined", [tmp_path / "0", tmp_path / "1"])


def test_parts_of_different_builds(tmp_path: Path) -> None:
    build(tmp_path / "0", make_source, part=(0, 2))
    build(tmp_path / "1", lambda: changed_codes(make_source(), "a"), part=(1, 2))
    with pytest.raises(ResumeError, match="are parts of different builds: coder 'a' changed: "):
        join(tmp_path / "joined", [tmp_path / "0", tmp_path / "1"])


def test_what_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to join"):
        join(tmp_path / "i", [])
    with pytest.raises(CorruptError, match=r"manifest\.json: missing"):
        join(tmp_path / "i", [tmp_path / "nowhere"])
    build(tmp_path / "part", make_source, part=(0, 2))
    build(tmp_path / "whole", make_source)
    with pytest.raises(ConfigError, match="is part of a build, and others given are whole indexes"):
        join(tmp_path / "i", [tmp_path / "part", tmp_path / "whole"])
    write(tmp_path / "other", make_stream(1))
    with pytest.raises(ConfigError, match=r"cannot be joined: coders {'a': 5, 'layers.1/out': 5} and {'a': 5}"):
        join(tmp_path / "i", [tmp_path / "whole", tmp_path / "other"])


def cut_source(source: ArraySource, first: int, last: int) -> ArraySource:
    """Contexts [first, last) as a source of their own, documents numbered from 0."""
    rows = (first * source.context, last * source.context)
    codes = {name: c.rows(*rows) for name, c in source.codes.items() if isinstance(c, ArrayCodes)}
    part = slice(first, last)
    assert source.documents is not None and source.mask is not None and source.role_numbers is not None
    return dataclasses.replace(
        source, tokens=source.tokens[part], codes=codes, role_numbers=source.role_numbers[part],
        documents=source.documents[part] - source.documents[first, 0], mask=source.mask[part],
        slice_numbers={"speaker": source.slice_numbers["speaker"][part]},
    )  # fmt: skip


def test_indexes_over_different_text(tmp_path: Path) -> None:
    whole = make_source()
    documents = np.repeat(np.arange(24)[:, None] // 2, whole.context, axis=1)
    whole = dataclasses.replace(whole, documents=documents)
    build(tmp_path / "one", lambda: whole)
    parts = [(0, 10), (10, 12), (12, 24)]
    for i, (first, last) in enumerate(parts):
        part = cut_source(whole, first, last)
        assert build(tmp_path / str(i), lambda part=part: part) is not None
    joined = join(tmp_path / "joined", [tmp_path / str(i) for i in range(3)])
    assert joined.verify() == []
    one = open_index(tmp_path / "one")
    for name in ("tokens.bin", "documents.bin", "roles.bin", "mask.bin", "slice-speaker.bin", "vocab.json"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    for name in one.names:
        for file in (tmp_path / "one" / one.description.coders[name].folder / "statistics").iterdir():
            other = tmp_path / "joined" / file.relative_to(tmp_path / "one")
            assert other.read_bytes() == file.read_bytes(), file
        for latent in range(5):
            for left, right in zip(one[name][latent].postings(), joined[name][latent].postings(), strict=True):
                np.testing.assert_array_equal(left, right)
    assert joined.meta["model"] == "tiny" and len(joined.meta["joined"]) == 3 and "build" not in joined.meta
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    for i in range(3):
        assert open_index(tmp_path / str(i)).verify() == []  # the parts are as they were


def test_slicings_with_other_values_are_joined_by_name(tmp_path: Path) -> None:
    source = make_source()
    other = dataclasses.replace(source, slice_values={"speaker": ("tool", "thinking", "user")})
    build(tmp_path / "a", lambda: source)
    build(tmp_path / "b", lambda: other)
    joined = join(tmp_path / "joined", [tmp_path / "a", tmp_path / "b"])
    assert joined.description.slices == {"speaker": ("user", "assistant", "tool", "thinking")}
    numbers = source.slice_numbers["speaker"]
    np.testing.assert_array_equal(joined.store.slices["speaker"][:24], numbers)
    np.testing.assert_array_equal(joined.store.slices["speaker"][24:], np.array([2, 3, 0], np.uint8)[numbers])


def test_two_joins_may_be_joined_again(tmp_path: Path) -> None:
    for i in range(2):
        build(tmp_path / str(i), partial(make_source, i))
    first = join(tmp_path / "first", [tmp_path / "0", tmp_path / "1"])
    shutil.rmtree(tmp_path / "0")
    again = join(tmp_path / "again", [tmp_path / "first", tmp_path / "1"])
    assert again.n_contexts == 72 and again.verify() == []
    np.testing.assert_array_equal(again["a"].figures.firings[:3] - first["a"].figures.firings[:3],
                                  open_index(tmp_path / "1")["a"].figures.firings[:3])  # fmt: skip


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        build(tmp_path / str(i), make_source, part=(i, 2))
    assert command([str(tmp_path / "joined"), str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'joined'}: 288 tokens, coders a, layers.1/out\n"
    with pytest.raises(ConfigError, match="usage: unmix index merge OUT PART"):
        command([str(tmp_path / "joined")])
    assert command(["--help"]) == 0 and "usage: unmix index merge" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["tokens.bin", "a/segment-00001/values.bin"])
def test_a_broken_index_does_not_become_whole_by_joining(tmp_path: Path, file: str) -> None:
    for i in range(2):
        build(tmp_path / str(i), partial(make_source, i))
    path = tmp_path / "1" / file
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=rf"1: cannot be joined: .*{path.name}: found sha256"):
        join(tmp_path / "joined", [tmp_path / "0", tmp_path / "1"])
    assert not (tmp_path / "joined").exists()


def test_a_broken_shard_at_the_place_itself_counts_as_missing(tmp_path: Path) -> None:
    for i in range(2):
        build(tmp_path / "i", make_source, part=(i, 3))
    build(tmp_path / "other", make_source, part=(2, 3))
    file = building_folder(tmp_path / "i") / "shards/00003/a/run-00000/values.bin"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(ConfigError, match="1 of 6 shards are in none of the parts: 3"):
        join(tmp_path / "i", [tmp_path / "i", tmp_path / "other"])
