"""Postings in order of position come back latent by latent, however they were cut into batches, blocks and runs."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmix.index.layout import CoderEntry, IndexMeta, Segment, segment_folder
from unmix.index.merge import merge_runs
from unmix.index.runs import Run, RunBuffer, spans, stable_order, weave
from unmix.index.segment import SegmentReader
from unmix.index.store import PostingStore


def postings(seed: int, n: int, n_latents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random ones in order of position, no latent twice at a position."""
    rng = np.random.default_rng(seed)
    keys = np.unique(rng.integers(0, 50 * n_latents, n))
    return keys % n_latents, (keys // n_latents).astype(np.uint32), rng.normal(size=len(keys)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(0, 400), n_latents=st.sampled_from([1, 3, 40, 70_000]),
    block=st.integers(1, 100), batch=st.integers(1, 100), often=st.integers(1, 5),
)  # fmt: skip
def test_a_run_is_the_sorted_postings(
    seed: int, n: int, n_latents: int, block: int, batch: int, often: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    latents, positions, values = postings(seed, n, n_latents)
    folder = tmp_path_factory.mktemp("runs")
    buffer, runs, base = RunBuffer(n_latents, block), list[Run](), 1000
    for i, start in enumerate(range(0, len(latents), batch)):
        part = slice(start, start + batch)
        buffer.add(latents[part], positions[part], values[part])
        if i % often == often - 1:
            buffer.write(folder / str(len(runs)))
            runs.append(Run(folder / str(len(runs)), base, n_latents))
    if not buffer.empty:
        buffer.write(folder / str(len(runs)))
        runs.append(Run(folder / str(len(runs)), base, n_latents))
    assert buffer.empty
    counts = np.bincount(latents, minlength=n_latents)
    if runs:
        np.testing.assert_array_equal(np.sum([np.diff(run.offsets()) for run in runs], axis=0), counts)
    merge_runs(folder / "segment", Segment(base, 50), runs, n_latents, budget_bytes=seed % 2**20 + 1)
    segment = SegmentReader(folder / "segment", base, 50, n_latents)
    np.testing.assert_array_equal(segment.counts(), counts)
    index = IndexMeta((), 1, 0, "", (), {}, (Segment(base, 50),), {})
    shutil.move(folder / "segment", folder / segment_folder(0))
    store = PostingStore(folder, index, CoderEntry("", n_latents))
    for latent in np.unique(latents)[:40]:
        found, read = store.read(int(latent))
        np.testing.assert_array_equal(found, positions[latents == latent].astype(np.int64) + base)
        np.testing.assert_allclose(read, values[latents == latent], rtol=2**-10, atol=1e-8)


@given(seed=st.integers(0, 2**32 - 1), runs=st.integers(1, 5), n_latents=st.integers(1, 9))
def test_weaving_keeps_the_order_of_runs_inside_each_latent(seed: int, runs: int, n_latents: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, (runs, n_latents))
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    expected: list[list[tuple[int, float]]] = [[] for _ in range(n_latents)]
    for run in range(runs):
        positions, values = np.arange(counts[run].sum()) + 100 * run, rng.random(counts[run].sum())
        parts.append((positions, values))
        for latent, (start, size) in enumerate(zip(np.cumsum(counts[run]) - counts[run], counts[run], strict=True)):
            expected[latent] += list(zip(positions[start : start + size], values[start : start + size], strict=True))
    positions, values = weave(counts, parts)
    assert list(zip(positions, values, strict=True)) == [pair for latent in expected for pair in latent]


def test_the_stable_order_of_wide_coders() -> None:
    latents = np.random.default_rng(0).integers(0, 200_000, 5000).astype(np.uint32)
    np.testing.assert_array_equal(stable_order(latents, 200_000), np.argsort(latents, kind="stable"))


@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=50), postings=st.integers(1, 40))
def test_spans_cover_the_latents_and_keep_to_their_size(counts: list[int], postings: int) -> None:
    found = list(spans(np.array(counts), 3, postings))
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])] and found[-1][1] == len(counts)
    assert all(sum(counts[first:last]) <= postings or last == first + 1 for first, last in found)


def test_the_buffer_says_what_it_holds() -> None:
    buffer = RunBuffer(100, 10)
    assert buffer.bytes == 120 and buffer.empty
    buffer.add(np.arange(25), np.arange(25), np.ones(25, np.float32))
    assert buffer.bytes == 120 + 2 * (10 * 8 + 101 * 4) and not buffer.empty


def test_many_runs_need_no_open_file_each(tmp_path: Path) -> None:
    """A small budget makes thousands of runs; a process may open about a thousand files."""
    runs: list[Run] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for i in range(150):
        buffer = RunBuffer(3, 4)
        buffer.add(np.arange(3), np.full(3, i), np.ones(3, np.float32))
        buffer.write(tmp_path / str(i))
        runs.append(Run(tmp_path / str(i), 0, 3))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 50, hard))
    try:
        merge_runs(tmp_path / "segment", Segment(0, 150), runs, 3, 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert SegmentReader(tmp_path / "segment", 0, 150, 3).counts().tolist() == [150] * 3
