"""From batches to an open index, and the summary of a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from index.oracle import ArrayCodes, Stream, make_stream, write
from unmix.core.errors import CorruptError
from unmix.index import IndexBatch, build_index, stats, verify


def batches(stream: Stream, fail_after: int | None = None) -> Iterator[IndexBatch]:
    for i in range(len(stream.tokens)):
        if i == fail_after:
            raise RuntimeError("the model ran out of memory")
        part = slice(i, i + 1)
        codes = {n: ArrayCodes.from_dense(d[part].reshape(-1, d.shape[-1])) for n, d in stream.codes.items()}
        yield IndexBatch(stream.tokens[part], stream.roles[part], stream.documents[part], stream.mask[part], codes)


def test_it_builds_what_the_writer_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = make_stream(1, names=("a", "b"))
    meta = {"tokenizer": "tiny"}
    caplog.set_level(logging.INFO)
    built = build_index(
        tmp_path / "built", batches(stream), {"a": 5, "b": 5}, stream.context, meta=meta, total_tokens=288
    )
    assert built.hash == write(tmp_path / "written", stream, meta=meta).hash
    assert verify(tmp_path / "built") == []


def test_batches_that_fail_leave_nothing(tmp_path: Path) -> None:
    stream = make_stream(2)
    with pytest.raises(RuntimeError, match="out of memory"):
        build_index(tmp_path / "i", batches(stream, 7), {"a": 5}, stream.context)
    assert not list(tmp_path.iterdir())


def test_stats_are_plain_numbers_that_are_right(tmp_path: Path) -> None:
    stream = make_stream(3, names=("a", "b"))
    index = write(tmp_path / "i", stream, meta={"model": "m"})
    summary = stats(tmp_path / "i")
    assert summary == stats(index) == index.stats == json.loads(json.dumps(summary, allow_nan=False))
    assert summary["n_counted"] == stream.mask.sum()
    assert summary["roles"]["explain"] == {
        "contexts": int((stream.roles == 2).sum()),
        "counted": int(stream.mask[stream.roles == 2].sum()),
    }
    fires = stream.counted("b") != 0
    assert summary["coders"]["b"]["l0"] == fires.sum() / stream.mask.sum()
    assert summary["coders"]["b"]["alive"] == fires.any(axis=(0, 1)).sum()
    frequency = fires.sum(axis=(0, 1)) / stream.mask.sum()
    assert summary["coders"]["b"]["dense_fraction"] == {
        "0.01": (frequency > 0.01).mean(),
        "0.1": (frequency > 0.1).mean(),
    }
    assert summary["bytes"] == sum(f.stat().st_size for f in (tmp_path / "i").rglob("*") if f.is_file())
    with pytest.raises(CorruptError, match="missing"):
        stats(tmp_path / "nowhere")


def test_stats_of_a_dead_coder(tmp_path: Path) -> None:
    stream = make_stream(4)
    stream.codes["a"][:] = 0
    summary = write(tmp_path / "i", stream).stats["coders"]["a"]
    assert (summary["alive"], summary["max"], summary["frequency_median"], summary["l0"]) == (0, 0.0, 0.0, 0.0)
    assert np.isfinite(summary["alive_fraction"])
