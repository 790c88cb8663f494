"""`build`: resumes, refuses, replaces; whatever the batches, the budget and the parts, the same bytes."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import unmix.index.space as space
from index.builds import asked, changed_codes, make_source, opens, small_cut, tree
from index.oracle import make_stream, write
from unmix.core.errors import ConfigError, DataError, MachineError, ResumeError
from unmix.index.batch import IndexBatch
from unmix.index.building import build
from unmix.index.claims import BuildLock
from unmix.index.reader import open_index
from unmix.index.shards import building_folder
from unmix.index.sources.arrays import ArraySource
from unmix.index.writer import IndexWriter


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_cut(monkeypatch)


@pytest.mark.parametrize(("batch", "budget"), [(1, 1), (5, 3000), (24, 2**31)])
def test_neither_batches_nor_the_budget_change_a_byte(
    tmp_path: Path, reference: dict[str, bytes], batch: int, budget: int
) -> None:
    index = build(tmp_path / "i", partial(make_source, batch=batch), budget_bytes=budget)
    assert index is not None and index.verify() == []
    assert len(index.description.segments) == 3
    assert tree(tmp_path / "i") == reference
    assert [p.name for p in tmp_path.iterdir()] == ["i"]


def test_it_is_what_the_writer_writes(tmp_path: Path, reference: dict[str, bytes]) -> None:
    source = make_source()
    with IndexWriter(
        tmp_path / "w", source.latents, source.context, {"model": "tiny"}, vocab=source.vocab, slices=source.slices
    ) as writer:
        for batch in source.batches(0, source.n_contexts):
            writer.add(batch.tokens, batch.roles, batch.documents, batch.mask, batch.codes, batch.slices)
    written = tree(tmp_path / "w")
    assert written.keys() == reference.keys()
    differing = {name for name in written if written[name] != reference[name]}
    assert differing == {"index.json", "manifest.json"}  # `meta` says what a build was built of


def test_a_failed_build_goes_on_where_it_was(tmp_path: Path, reference: dict[str, bytes]) -> None:
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match="the model fell over"):
        build(tmp_path / "i", opens(log, fail_at=14))
    assert asked(log) == [0, 4, 8, 12]
    assert not (tmp_path / "i").exists()
    build(tmp_path / "i", opens(log))
    assert asked(log) == [12, 16, 20]
    assert tree(tmp_path / "i") == reference
    build(tmp_path / "i", opens(log))
    assert asked(log) == []
    build(tmp_path / "i", opens(log), restart=True)
    assert asked(log) == [0, 4, 8, 12, 16, 20]
    assert tree(tmp_path / "i") == reference
    assert [p.name for p in tmp_path.iterdir()] == ["i"]


@pytest.mark.parametrize(
    "place", ["shards/00002/tokens.bin", "groups/00000/a/values.bin", "shards/00002/manifest.json"]
)
def test_a_broken_shard_or_group_is_made_again(tmp_path: Path, reference: dict[str, bytes], place: str) -> None:
    log = tmp_path / "log"
    with pytest.raises(RuntimeError):
        build(tmp_path / "i", opens(log, fail_at=14))
    asked(log)
    file = building_folder(tmp_path / "i") / place
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    build(tmp_path / "i", opens(log))
    assert asked(log) == ([0, 4, 12, 16, 20] if "groups" in place else [8, 12, 16, 20])
    assert tree(tmp_path / "i") == reference


def test_other_inputs_are_refused_and_named(tmp_path: Path, reference: dict[str, bytes]) -> None:
    log = tmp_path / "log"
    with pytest.raises(RuntimeError):
        build(tmp_path / "i", opens(log, fail_at=14))
    other = changed_codes(make_source(), "layers.1/out")
    old, new = (s.inputs["coders"]["layers.1/out"] for s in (make_source(), other))
    with pytest.raises(
        ResumeError,
        match=rf"\.i\.building: was begun with other inputs: coder 'layers.1/out' changed: {old} → {new}. Give the "
        r"same ones to go on, or begin anew with restart=True \(--restart\)",
    ):
        build(tmp_path / "i", lambda: other)
    index = build(tmp_path / "i", lambda: other, restart=True)
    assert index is not None and tree(tmp_path / "i") != reference
    build(tmp_path / "i", make_source)  # an older index of other inputs is replaced when the new one is whole
    assert tree(tmp_path / "i") == reference


def test_parts_in_one_folder_end_in_the_index(tmp_path: Path, reference: dict[str, bytes]) -> None:
    log = tmp_path / "log"
    assert build(tmp_path / "i", opens(log), part=(1, 3)) is None
    assert asked(log) == [4, 16]
    assert build(tmp_path / "i", opens(log), part=(2, 3)) is None
    assert build(tmp_path / "i", opens(log), part=(2, 3)) is None
    assert asked(log) == [8, 20]
    assert build(tmp_path / "i", opens(log), part=(0, 3)) is not None
    assert tree(tmp_path / "i") == reference
    assert build(tmp_path / "i", opens(log), part=(0, 3)) is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i", "log"]


def test_one_builder_at_a_place_but_any_number_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmix.index.claims.PATIENCE", 0.1)
    building = building_folder(tmp_path / "i")
    with BuildLock(building) as other:
        assert other.alone()
        for part in (None, (0, 2)):
            with pytest.raises(ResumeError, match=rf"another process \(pid {os.getpid()}\) is building this index"):
                build(tmp_path / "i", make_source, part=part)
        other.share()
        with pytest.raises(ResumeError, match="is building this index"):
            build(tmp_path / "i", make_source)
        assert build(tmp_path / "i", make_source, part=(0, 2)) is None
        assert build(tmp_path / "i", make_source, part=(1, 2)) is None  # the other part will end it
    assert build(tmp_path / "i", make_source, part=(1, 2)) is not None


def test_a_place_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no index; choose another folder"):
        build(tmp_path, make_source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_bytes": 0}, "budget_bytes is 0, expected at least 1"),
        ({"workers": 0}, "workers is 0, expected at least 1"),
        ({"engine": "rya"}, "unknown engine 'rya'. Did you mean 'ray'?"),
        ({"part": (3, 3)}, "part is 3/3, expected 0/3 to 2/3"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tmp_path / "i", make_source, **options)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


class Short(ArraySource):
    """Gives one context less than it was asked for."""

    def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
        yield from super().batches(first, last - 1)


def test_a_source_that_gives_too_little(tmp_path: Path) -> None:
    plain = make_source()
    short = Short(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
    with pytest.raises(DataError, match="the source gave 3 contexts for 0 to 4, expected 4"):
        build(tmp_path / "i", lambda: short)


@pytest.mark.parametrize("module", ["intake", "runs", "segment", "derive", "sealing"])
def test_a_full_disk_leaves_the_older_index_and_what_was_built(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    write(tmp_path / "i", make_stream(5))
    before = tree(tmp_path / "i")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        name = "write_manifest" if module == "sealing" else "write_raw"
        patch.setattr(f"unmix.index.{module}.{name}", full)
        with pytest.raises(MachineError, match=r"cannot write .*: the disk is full"):
            build(tmp_path / "i", make_source)
    assert tree(tmp_path / "i") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".i.building", "i"]
    build(tmp_path / "i", make_source)
    assert tree(tmp_path / "i") == reference


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = type("Usage", (), {"free": 5000})
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        MachineError,
        match=r"the index needs about \d+\.\d kB for 288 tokens at L0 a 1\.\d+, layers\.1/out .*, but only",
    ):
        build(tmp_path / "i", make_source)
    usage.free = 10**6
    monkeypatch.setattr(space, "CLOSE", 0.001)
    with caplog.at_level("WARNING"):
        build(tmp_path / "i", make_source)
    assert "1.0 MB are free: that is close" in caplog.text


def test_an_estimate_is_near_what_a_build_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    real = space.check_space

    def check(building: Path, need: space.Estimate) -> None:
        nonlocal most
        most = need.bytes
        real(building, need)

    monkeypatch.setattr("unmix.index.working.check_space", check)
    index = build(tmp_path / "i", make_source)
    assert index is not None
    postings = sum(int(coder.figures.firings.sum()) for coder in index.coders.values())
    assert most == pytest.approx(2 * 288 * (2 + 4 + 1 / 8 + 1) + postings * (6 + 8 * 0.5), rel=0.25)


def test_batches_may_be_views_that_change_later(tmp_path: Path, reference: dict[str, bytes]) -> None:
    """What a batch holds is copied before the next one is asked for."""

    class Reusing(ArraySource):
        def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
            for batch in super().batches(first, last):
                mine = {
                    name: type(c)(c.indices.copy(), c.values.copy(), c.offsets, c.n_latents)  # type: ignore[attr-defined]
                    for name, c in batch.codes.items()
                }
                yield IndexBatch(batch.tokens, batch.roles, batch.documents, batch.mask, mine, batch.slices)
                for codes in mine.values():
                    codes.values[:] = np.nan
                    codes.indices[:] = 0

    plain = make_source()
    source = Reusing(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
    build(tmp_path / "i", lambda: source)
    assert tree(tmp_path / "i") == reference


def test_meta_may_change_between_two_calls(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RuntimeError):
        build(tmp_path / "i", opens(log, fail_at=14))
    index = build(tmp_path / "i", lambda: dataclasses.replace(make_source(), meta={"said": "later"}))
    assert index is not None and index.meta["said"] == "later" and asked(log) == [0, 4, 8, 12]
    assert open_index(tmp_path / "i").meta["build"]["key"]


def test_a_shard_of_another_build_is_made_again(tmp_path: Path, reference: dict[str, bytes]) -> None:
    """The key decides, not that something whole lies there."""
    log = tmp_path / "log"
    for name, seed in (("i", 1), ("other", 2)):
        with pytest.raises(RuntimeError):
            build(tmp_path / name, opens(log, fail_at=14, seed=seed))
    here, there = (building_folder(tmp_path / name) / "shards/00002" for name in ("i", "other"))
    shutil.rmtree(here)
    shutil.copytree(there, here)
    asked(log)
    build(tmp_path / "i", opens(log))
    assert asked(log) == [8, 12, 16, 20]
    assert tree(tmp_path / "i") == reference


def test_asking_again_for_a_whole_index_leaves_another_build_alone(tmp_path: Path) -> None:
    """Hours of another coder's shards at the same place are not thrown away by a look at what is finished."""
    log = tmp_path / "log"
    build(tmp_path / "i", make_source)
    with pytest.raises(RuntimeError):
        build(tmp_path / "i", opens(log, fail_at=14, seed=2))
    assert asked(log) == [0, 4, 8, 12]
    assert build(tmp_path / "i", make_source) is not None
    build(tmp_path / "i", opens(log, seed=2))
    assert asked(log) == [12, 16, 20]


def test_a_broken_shard_of_another_part_never_enters_the_index(tmp_path: Path, reference: dict[str, bytes]) -> None:
    """The part that ends the build hashes what others made, however long ago."""
    assert build(tmp_path / "i", make_source, part=(0, 2)) is None
    file = building_folder(tmp_path / "i") / "shards/00004/a/run-00000/values.bin"
    content = bytearray(file.read_bytes())
    content[2] ^= 0x40  # a high bit of the mantissa
    file.write_bytes(content)
    for part in ((1, 2), (0, 2)):
        found = build(tmp_path / "i", make_source, part=part)
    assert found is not None and tree(tmp_path / "i") == reference


def test_what_lies_beside_an_index_is_not_replaced_with_it(tmp_path: Path) -> None:
    build(tmp_path / "i", make_source)
    (tmp_path / "i" / "plots").mkdir()
    assert build(tmp_path / "i", make_source) is not None  # it stands, so nothing is replaced
    for other in (partial(make_source, 2), make_source):
        with pytest.raises(ConfigError, match="holds 'plots', which is no part of the index there and would go with"):
            build(tmp_path / "i", other, restart=True)
    web = tmp_path / "web"
    web.mkdir()
    (web / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not empty and holds no index"):
        build(web, make_source)
    assert not building_folder(web).exists()


def test_what_others_remove_while_the_space_is_counted_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers and parts rename and remove their folders at any moment."""
    gone = tmp_path / "shards" / ".00001.x.tmp"
    for place in (gone, tmp_path / "shards" / "00000"):
        place.mkdir(parents=True)
        (place / "tokens.bin").write_bytes(bytes(100))
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path) == str(gone):
            shutil.rmtree(gone)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with pytest.raises(MachineError, match=r"needs about 106 bytes .* but only 105 bytes are free"):
        space.check_space(tmp_path, space.Estimate(1, {"a": 1.0}, 106))
