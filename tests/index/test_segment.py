"""A segment on disk: what the writer refuses, and that a broken file never reads as postings that cannot be."""

from __future__ import annotations

import errno
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from index.postings import as_part, make_rows
from unmix.core.errors import CorruptError, DataError, MachineError
from unmix.core.manifest import read_manifest, verify_folder
from unmix.index.layout import POSITIONS, VALUES
from unmix.index.part import Part
from unmix.index.reading import Rows, read_rows
from unmix.index.segment import BLOCKS, SEGMENT_KIND, SegmentReader, SegmentWriter

BASE, TOKENS = 2**33, 3000
SHARES = (0.5, 0, 0.001, 0.1, 1.0, 0)
FILES = (BLOCKS, POSITIONS, VALUES)


def part(seed: int = 0, shares: tuple[float, ...] = SHARES) -> Part:
    local = as_part(make_rows(seed, TOKENS, shares))
    return Part(local.counts, local.positions + BASE, local.values)


def write(folder: Path, whole: Part, cuts: list[int] | None = None) -> SegmentReader:
    """The part, handed over in runs of latents."""
    ends = np.append(0, np.cumsum(whole.counts))
    bounds = [0, *(cuts or []), len(whole.counts)]
    with SegmentWriter(folder, BASE, TOKENS, len(whole.counts)) as writer:
        for first, last in pairwise(bounds):
            run = slice(ends[first], ends[last])
            writer.write(first, Part(whole.counts[first:last], whole.positions[run], whole.values[run]))
    return reopen(folder, len(whole.counts))


def reopen(folder: Path, n_latents: int = len(SHARES)) -> SegmentReader:
    return SegmentReader(folder, BASE, TOKENS, n_latents)


def read_all(segment: SegmentReader) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = [Rows.of([segment], latent) for latent in range(segment.n_latents)]
    return [row.read(row.whole()) for row in rows]


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, len(SHARES)), max_size=4).map(sorted), seed=st.integers(0, 99))
def test_runs_of_latents_leave_no_trace(cuts: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("segment")
    whole = part(seed)
    write(folder / "one", whole)
    segment = write(folder / "many", whole, cuts)
    for name in (*FILES, "manifest.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "many" / name).read_bytes()
    read = read_rows(segment, 0, len(SHARES), np.asarray(segment.maxima))
    np.testing.assert_array_equal(read.counts, whole.counts)
    np.testing.assert_array_equal(read.positions, whole.positions)
    np.testing.assert_allclose(read.values, whole.values, rtol=2**-10)
    np.testing.assert_array_equal(read.values, np.concatenate([values for _, values in read_all(segment)]))
    np.testing.assert_array_equal(read.positions, np.concatenate([positions for positions, _ in read_all(segment)]))


def test_its_manifest_says_what_it_is(tmp_path: Path) -> None:
    whole = part()
    write(tmp_path / "s", whole)
    manifest = read_manifest(tmp_path / "s", SEGMENT_KIND)
    assert {name: manifest[name] for name in ("base", "tokens", "n_latents", "postings")} == {
        "base": BASE, "tokens": TOKENS, "n_latents": 6, "postings": len(whole.positions),
    }  # fmt: skip
    assert set(manifest["files"]) == set(FILES) == {f.name for f in (tmp_path / "s").iterdir()} - {"manifest.json"}
    (tmp_path / "s" / BLOCKS).write_bytes(b"\0" * (tmp_path / "s" / BLOCKS).stat().st_size)
    assert [problem.path.name for problem in verify_folder(tmp_path / "s")] == [BLOCKS]


def test_latents_that_no_run_holds_never_fire(tmp_path: Path) -> None:
    one = Part(np.array([2]), np.array([BASE, BASE + TOKENS - 1]), np.array([1, -2], np.float32))
    with SegmentWriter(tmp_path / "s", BASE, TOKENS, 9) as writer:
        writer.write(3, one)
        writer.write(6, one)
    segment = reopen(tmp_path / "s", 9)
    assert segment.counts().tolist() == [0, 0, 0, 2, 0, 0, 2, 0, 0]
    for latent in (3, 6):
        positions, values = read_all(segment)[latent]
        assert positions.tolist() == one.positions.tolist() and values.tolist() == [1, -2]
    with SegmentWriter(tmp_path / "none", BASE, TOKENS, 4):
        pass
    assert [len(positions) for positions, _ in read_all(reopen(tmp_path / "none", 4))] == [0] * 4


@pytest.mark.parametrize(
    "first,positions,message",
    [
        (0, [5], r"got latents 0 to 1, expected a run from 1 on, up to 3"),
        (3, [5], r"got latents 3 to 4, expected a run from 1 on, up to 3"),
        (1, [5, 5], r"latent 1 has position 15, expected ascending positions from 10 to 109"),
        (2, [7, 5], r"latent 2 has position 15, expected ascending"),
        (1, [-1], r"latent 1 has position 9, expected ascending"),
        (1, [100], r"latent 1 has position 110, expected ascending"),
    ],
)
def test_postings_that_do_not_fit_are_refused(tmp_path: Path, first: int, positions: list[int], message: str) -> None:
    good = Part(np.array([1]), np.array([10]), np.ones(1, np.float32))
    bad = Part(np.array([len(positions)]), np.array(positions) + 10, np.ones(len(positions), np.float32))
    with pytest.raises(DataError, match=message), SegmentWriter(tmp_path / "s", 10, 100, 3) as writer:
        writer.write(0, good)
        writer.write(first, bad)
    assert not (tmp_path / "s/manifest.json").exists()


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("unmix.index.segment.write_raw", full)
    with pytest.raises(MachineError, match=r"cannot write .*: the disk is full"):
        write(tmp_path / "s", part())
    assert not (tmp_path / "s/manifest.json").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1, None])
def test_a_file_of_another_length_does_not_open(tmp_path: Path, name: str, change: int | None) -> None:
    write(tmp_path / "s", part())
    path = tmp_path / "s" / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:change] if change < 0 else path.read_bytes() + b"\0")
    with pytest.raises(
        CorruptError, match=rf"{name}: found (\d+ bytes|no file), (expected \d+ bytes|which do not fit)"
    ):
        reopen(tmp_path / "s")


def spoil(folder: Path, what: str, at: int | tuple[int, int], value: float) -> None:
    """Change one number of one of the arrays."""
    segment = reopen(folder)
    sizes = [24 * (segment.n_latents + 1), 4 * segment.n_latents, 4 * segment.blocks, 2 * segment.blocks]
    raw = np.fromfile(folder / (VALUES if what == "values" else BLOCKS), np.uint8)
    begin = dict(zip(("offsets", "maxima", "firsts", "peaks", "widths"), np.append(0, np.cumsum(sizes)), strict=True))
    kind = {"offsets": "u8", "maxima": "f4", "firsts": "u4", "peaks": "f2", "widths": "u1", "values": "f2"}[what]
    end = begin.get(what, 0) + (sizes[0] if what == "offsets" else (len(raw) - begin.get(what, 0)) // 4 * 4)
    array = raw[begin.get(what, 0) : end].view(kind)
    (array.reshape(-1, 3) if what == "offsets" else array)[at] = value
    raw.tofile(folder / (VALUES if what == "values" else BLOCKS))


@pytest.mark.parametrize(
    "what,at,value,message",
    [
        ("offsets", (3, 0), 2**40, r"blocks\.bin: latent [23] has postings \d+ to \d+ in blocks"),
        ("offsets", (3, 0), 0, r"blocks\.bin: latent [23] has postings"),
        ("offsets", (4, 1), 0, r"blocks\.bin: latent 3 has postings"),
        ("offsets", (4, 2), 2**64 - 1, r"blocks\.bin: latent 3 has postings"),
        ("offsets", (6, 0), 2**63, r"blocks\.bin: found \d+ bytes, which do not fit the 9223372036854775808 postings"),
        ("offsets", (6, 1), 3, r"blocks\.bin: found \d+ bytes, which do not fit the \d+ postings in 3 blocks"),
        ("widths", 13, 33, r"blocks\.bin: latent 3 has gaps of more than 32 bits"),
        ("widths", 13, 2, r"blocks\.bin: latent 3 has widths that do not add up to the bytes of its gaps"),
        ("firsts", 14, 0, r"positions\.bin: latent 3 has positions that do not ascend inside the segment"),
        ("firsts", 15, 2**32 - 1, r"positions\.bin: latent 3 has positions that do not ascend inside"),
        ("peaks", 14, 0.5, r"values\.bin: latent 3 has values whose largest is not the one in blocks\.bin"),
        ("maxima", 3, 1e-9, r"blocks\.bin: latent 3 has maximum 1e-09, which none of its blocks has"),
        ("maxima", 3, np.nan, r"blocks\.bin: latent 3 has maximum nan"),
        ("values", -3001, np.inf, r"values\.bin: latent 3 has values whose largest is not"),
        ("values", -3001, 0, r"values\.bin: latent 3 has a value of 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(
    tmp_path: Path, what: str, at: int | tuple[int, int], value: float, message: str
) -> None:
    """Latent 3 has blocks 13 to 15 of the segment (after 12 of latent 0 and 1 of latent 2); latent 4 3000 postings."""
    segment = write(tmp_path / "s", part(3))
    assert segment.offsets[3:5, 1].tolist() == [13, 16] and segment.offsets[-1, 0] - segment.offsets[4, 0] == 3000
    spoil(tmp_path / "s", what, at, value)
    with pytest.raises(CorruptError, match=message):
        read_all(reopen(tmp_path / "s"))
    with pytest.raises(CorruptError, match=message):
        segment = reopen(tmp_path / "s")
        read_rows(segment, 0, len(SHARES), np.asarray(segment.maxima))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(FILES),
    place=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    seed=st.integers(0, 3),
)
@example(name=POSITIONS, place=0.2, flip=255, seed=0)
def test_no_broken_byte_gives_postings_that_cannot_be(
    name: str, place: float, flip: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Refused, or at least ascending inside the segment with finite values other than 0 (hashes tell the rest)."""
    folder = tmp_path_factory.mktemp("broken") / "s"
    write(folder, part(seed, (0.3, 0.01, 0, 0.05)))
    content = bytearray((folder / name).read_bytes())
    content[int(place * len(content))] ^= flip
    (folder / name).write_bytes(content)
    for way in (one_by_one, together, few_blocks):
        try:
            rows = way(reopen(folder, 4))
        except CorruptError as error:
            assert str(folder) in str(error)
            continue
        for positions, values in rows:
            assert len(positions) == len(values)
            assert (np.diff(positions) > 0).all() and ((positions >= BASE) & (positions < BASE + TOKENS)).all()
            assert np.isfinite(values).all() and values.all()


def one_by_one(segment: SegmentReader) -> list[tuple[np.ndarray, np.ndarray]]:
    return read_all(segment)


def together(segment: SegmentReader) -> list[tuple[np.ndarray, np.ndarray]]:
    read = read_rows(segment, 0, segment.n_latents, np.asarray(segment.maxima))
    cuts = np.cumsum(read.counts)[:-1]
    return list(zip(np.split(read.positions, cuts), np.split(read.values, cuts), strict=True))


def few_blocks(segment: SegmentReader) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = [Rows.of([segment], latent) for latent in range(segment.n_latents)]
    begins = np.array([300, 2000]) + BASE
    return [
        row.read(pieces) for row in rows if row.spans for pieces in (row.peaking(2), row.reaching(begins, begins + 99))
    ]
