"""What is written is what was given: against a dense oracle, whatever the batches, the budget and the segments."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from index.oracle import ArrayCodes, Stream, feed, make_stream, streams, write
from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError, DataError, MachineError, NonFiniteError, ResumeError
from unmix.core.manifest import read_manifest
from unmix.data.config import ROLES
from unmix.index.reader import open_index
from unmix.index.writer import IndexWriter


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def one_batch(tokens: int = 2, context: int = 3, latents: int = 4) -> dict[str, Any]:
    dense = np.zeros((tokens * context, latents), np.float32)
    dense[1, 2] = 1.5
    shape = (tokens, context)
    return {
        "tokens": np.zeros(shape, np.int64), "roles": np.zeros(tokens, np.uint8),
        "documents": np.zeros(shape, np.int32), "mask": np.ones(shape, bool),
        "codes": {"a": ArrayCodes.from_dense(dense)},
    }  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(stream=streams, batch=st.integers(1, 8), budget=st.sampled_from([1, 2000, 2**31]))
def test_postings_are_the_unmasked_non_zeros(
    stream: Stream, batch: int, budget: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index = write(tmp_path_factory.mktemp("index") / "i", stream, batch, budget_bytes=budget)
    dense = stream.counted("a")
    role_of = np.repeat(stream.roles, stream.context)
    for latent in range(dense.shape[-1]):
        truth = dense[..., latent].reshape(-1)
        positions, values = index["a"][latent].postings()
        assert positions.dtype == np.uint64 and values.dtype == np.float32
        np.testing.assert_array_equal(positions, np.flatnonzero(truth))
        true = truth[truth != 0].astype(np.float64)
        scale = np.abs(true).max(initial=0)
        error = np.abs(values - true)
        assert (error <= 2**-10 * np.abs(true) + 2**-38 * scale).all()
        assert (np.sign(values) == np.sign(true)).all()
        assert np.abs(values).max(initial=0) == np.float32(scale) == np.float32(index["a"][latent].max)
        for i, role in enumerate(ROLES):
            np.testing.assert_array_equal(
                index["a"][latent].postings(role)[0], np.flatnonzero((truth != 0) & (role_of == i))
            )


def test_tokens_documents_masks_and_roles_come_back(tmp_path: Path) -> None:
    stream = make_stream(1, n_contexts=11, context=13)
    index = write(tmp_path / "i", stream)
    np.testing.assert_array_equal(index.tokens, stream.tokens)
    np.testing.assert_array_equal(index.documents, stream.documents)
    np.testing.assert_array_equal(index.mask(np.arange(11)), stream.mask)
    for i, role in enumerate(ROLES):
        np.testing.assert_array_equal(index.contexts_of(role), np.flatnonzero(stream.roles == i))
    both = np.flatnonzero(np.isin(stream.roles, [2, 3]))
    np.testing.assert_array_equal(index.contexts_of(("score", "explain")), both)


@pytest.mark.parametrize("size,dtype", [(65536, np.uint16), (65537, np.uint32), (None, np.uint32)])
def test_token_ids_take_sixteen_bits_where_they_fit(tmp_path: Path, size: int | None, dtype: type) -> None:
    stream = make_stream(2)
    stream.tokens[0, 0] = 65535
    index = write(tmp_path / "i", stream, vocab_size=size)
    assert index.tokens.dtype == dtype
    assert index.tokens[0, 0] == 65535


@settings(max_examples=8, deadline=None)
@given(stream=streams)
def test_batches_and_budget_leave_no_trace_in_any_byte(
    stream: Stream, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("index")
    one = write(folder / "one", stream, batch=1000)
    many = write(folder / "many", stream, batch=1, budget_bytes=1)
    assert files(folder / "one") == files(folder / "many")
    assert one.hash == many.hash


def test_a_tiny_budget_really_spills(tmp_path: Path) -> None:
    stream = make_stream(3)
    with IndexWriter(tmp_path / "i", {"a": 5}, stream.context, budget_bytes=1) as writer:
        feed(writer, stream, batch=2)
        spills = list(next(tmp_path.glob(".i.*.tmp")).glob(".runs/00000/a/run-*"))
        count = len(spills)
        local = np.concatenate([np.fromfile(spill / "positions.bin", np.uint32) for spill in spills])
    assert count == len(stream.tokens) // 2
    assert local.max() < len(stream.tokens) * stream.context
    assert not list((tmp_path / "i").rglob(".runs"))


@settings(max_examples=8, deadline=None)
@given(stream=streams, batch=st.integers(1, 30), budget=st.sampled_from([1, 2000, 2**31]))
def test_shards_inside_batches_and_across_them(
    stream: Stream, batch: int, budget: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What a shard's u32 positions count from moves on, so that they last past 2^32 positions."""
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmix.index.plan.SHARD_TOKENS", 40)
        patch.setattr("unmix.index.plan.LEAST_TOKENS", 100)
        cut = write(folder / "cut", stream, batch, budget_bytes=budget)
        again = write(folder / "again", stream, 3)
    one = write(folder / "one", stream, 1000)
    assert cut.hash == again.hash
    expected = len(stream.tokens) * stream.context / 130
    assert len(cut.description.segments) >= expected or len(one.tokens) <= 3
    for latent in range(stream.codes["a"].shape[-1]):
        for left, right in zip(one["a"][latent].postings(), cut["a"][latent].postings(), strict=True):
            np.testing.assert_array_equal(left, right)
    for field, array in one["a"].stats.items():
        np.testing.assert_array_equal(cut["a"].stats[field], array, err_msg=field)


def test_several_final_segments_read_as_one(tmp_path: Path) -> None:
    stream = make_stream(4, names=("a", "b"))
    one = write(tmp_path / "one", stream, batch=1)
    many = write(tmp_path / "many", stream, batch=1, segment_tokens=3 * stream.context)
    assert len(many.description.segments) == 8 and len(one.description.segments) == 1
    assert sorted(p.name for p in (tmp_path / "many/a").glob("segment-*"))[-1] == "segment-00007"
    manifest = read_manifest(tmp_path / "many/a/segment-00007", "segment")
    assert (manifest["base"], manifest["tokens"]) == (7 * 3 * stream.context, 3 * stream.context)
    for name in ("a", "b"):
        for field, array in one[name].stats.items():
            np.testing.assert_array_equal(many[name].stats[field], array, err_msg=field)
        for i in range(5):
            for left, right in zip(one[name][i].postings(), many[name][i].postings(), strict=True):
                np.testing.assert_array_equal(left, right)


def test_coders_are_kept_apart_and_named_folders_are_safe(tmp_path: Path) -> None:
    stream = make_stream(5, names=("layers.3/out", "b"))
    index = write(tmp_path / "i", stream)
    assert (tmp_path / "i/layers.3-out").is_dir()
    assert index.names == ["layers.3/out", "b"]
    for name in index.names:
        np.testing.assert_array_equal(index[name].figures.firings, (stream.counted(name) != 0).sum(axis=(0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_real_codes_with_explicit_zeros(tmp_path: Path, dtype: torch.dtype) -> None:
    indices = torch.tensor([[3, 1], [0, 3], [1, 2], [2, 0]])
    values = torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, -0.25], [4.0, 3.0]], dtype=dtype, requires_grad=True)
    codes = Codes.from_topk(indices, values, 4, (2, 2))
    batch = one_batch(2, 2) | {"codes": {"a": codes}}
    with IndexWriter(tmp_path / "i", {"a": 4}, 2) as writer:
        writer.add(**batch)
    index = open_index(tmp_path / "i")
    expected = [([1, 3], [0.5, 3.0]), ([], []), ([2, 3], [-0.25, 4.0]), ([0, 1], [1.0, 2.0])]
    for i, (positions, true) in enumerate(expected):
        found, read = index[i].postings()
        assert found.tolist() == positions
        np.testing.assert_allclose(read, true, rtol=2**-10)


def test_extreme_values_stay_firings_of_their_sign(tmp_path: Path) -> None:
    dense = np.zeros((6, 3), np.float32)
    dense[:, 0] = [1.0, 1e-30, -1e-30, 3e38, -3e38, 2e-7]
    dense[:, 1] = [1e-45, -1e-45, 1e-40, 3e-45, 0, 0]
    batch = one_batch(2, 3, 3) | {"codes": {"a": ArrayCodes.from_dense(dense)}}
    with IndexWriter(tmp_path / "i", {"a": 3}, 3) as writer:
        writer.add(**batch)
    index = open_index(tmp_path / "i")
    np.testing.assert_array_equal(np.sign(index[0].postings()[1]), np.sign(dense[:, 0]))
    np.testing.assert_array_equal(np.sign(index[1].postings()[1]), np.sign(dense[:4, 1]))
    assert index[0].max == np.float32(3e38)


def test_a_coder_wider_than_sixteen_bits(tmp_path: Path) -> None:
    n, rng = 200_000, np.random.default_rng(0)
    ids = np.sort(rng.integers(0, n, (40, 8)), axis=1).astype(np.int32)
    ids[:, 0], ids[:, 1] = 3, 3 + 2**16  # the same low sixteen bits
    ids = np.sort(ids, axis=1)
    ids[:, 2:] += np.arange(2, 8)  # distinct inside a row
    codes = ArrayCodes(ids.reshape(-1), np.arange(1, 321, dtype=np.float32), np.arange(41) * 8, n + 8)
    batch = one_batch(10, 4) | {"codes": {"a": codes}}
    with IndexWriter(tmp_path / "i", {"a": n + 8}, 4) as writer:
        writer.add(**batch)
    index = open_index(tmp_path / "i")
    np.testing.assert_array_equal(index[3].postings()[0], np.arange(40))
    np.testing.assert_allclose(index[3].postings()[1], np.arange(40) * 8 + 1, rtol=2**-10)
    np.testing.assert_array_equal(np.flatnonzero(index["a"].alive), np.unique(ids))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"tokens": np.zeros((2, 4), int)}, r"tokens is \[2, 4\], expected \[2, 3\]"),
        ({"roles": np.array([0, 4], np.uint8)}, r"role 4 is out of range: it must be 0 or more and below 4"),
        ({"tokens": np.full((2, 3), 9)}, "token id 9 is out of range: it must be 0 or more and below 9"),
        ({"documents": np.full((2, 3), -1)}, "document id -1 is out of range"),
        ({"mask": np.ones((2, 3), bool)[:1]}, r"mask is \[1, 3\], expected \[2, 3\]"),
        ({"codes": {"b": one_batch()["codes"]["a"]}}, r"codes were given for the coders \['b'\], expected \['a'\]"),
        ({"codes": {"a": ArrayCodes.from_dense(np.ones((6, 5)))}}, "codes of 'a' have 5 latents, expected 4"),
        ({"codes": {"a": ArrayCodes.from_dense(np.ones((5, 4)))}}, "have 5 rows, 20 indices and 20 values, expected 6"),
        (
            {"codes": {"a": ArrayCodes(np.array([4]), np.ones(1), np.array([0, 1, 1, 1, 1, 1, 1]), 4)}},
            "latent id of 'a' 4 is out of range",
        ),
        (
            {"codes": {"a": ArrayCodes(np.array([1, 2, 1]), np.ones(3), np.array([0, 0, 3, 3, 3, 3, 3]), 4)}},
            "latent 1 of 'a' comes twice at position 1",
        ),
        (
            {"codes": {"a": ArrayCodes(np.array([1]), np.ones(1), np.array([0, 1, 0, 1, 1, 1, 1]), 4)}},
            "offsets must start at 0 and never fall",
        ),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_refused_whole(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with IndexWriter(tmp_path / "i", {"a": 4}, 3, vocab_size=9) as writer:
        with pytest.raises((ConfigError, Exception), match=message) as caught:
            writer.add(**(one_batch() | change))
        assert isinstance(caught.value, ConfigError)
        assert writer.n_tokens == 0
        writer.add(**one_batch())
    assert open_index(tmp_path / "i")[2].postings()[0].tolist() == [1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_non_finite_values_never_enter(tmp_path: Path, value: float) -> None:
    codes = ArrayCodes(np.array([2]), np.array([value]), np.array([0, 0, 1, 1, 1, 1, 1]), 4)
    masked = np.ones((2, 3), bool)
    masked[0, 1] = False
    with IndexWriter(tmp_path / "i", {"a": 4}, 3) as writer:
        with pytest.raises(NonFiniteError, match="latent 2 of 'a' at position 1: the value is"):
            writer.add(**(one_batch() | {"codes": {"a": codes}}))
        writer.add(**(one_batch() | {"codes": {"a": codes}, "mask": masked}))  # masked: ignored
    assert not open_index(tmp_path / "i")["a"].alive.any()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"latents": {}}, "an index needs at least one coder"),
        ({"latents": {"a": 0}}, "coder 'a' has 0 latents, expected at least 1"),
        ({"latents": {"tokens.bin": 3}}, "coder name 'tokens.bin' is taken by a file of the index"),
        (
            {"latents": {"slice-speaker.bin": 3}, "slices": {"speaker": ["user"]}},
            "coder name 'slice-speaker.bin' is taken by a file of the index",
        ),
        ({"latents": {"a/b": 3, "a b": 3}}, "coders 'a/b' and 'a b' would share the folder 'a-b'; rename one"),
        ({"context": 0}, "context is 0, expected at least 1"),
        ({"budget_bytes": 0}, "budget_bytes is 0, expected at least 1"),
        ({"segment_tokens": 2**33}, r"segment_tokens is 8589934592, expected 3 \(one context\) to 2\^32"),
        ({"roles": ["a", "a"]}, r"roles are \['a', 'a'\], expected 1 to 256 different names"),
        ({"meta": {"x": {1, 2}}}, "index meta must be plain JSON values"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IndexWriter(tmp_path / "i", **({"latents": {"a": 3}, "context": 3} | arguments))
    assert not list(tmp_path.iterdir())


def test_an_empty_stream_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no contexts were added"), IndexWriter(tmp_path / "i", {"a": 3}, 3):
        pass
    assert not list(tmp_path.iterdir())


def test_an_exception_leaves_the_old_index_and_nothing_else(tmp_path: Path) -> None:
    stream = make_stream(6)
    before = write(tmp_path / "i", stream).hash
    with (
        pytest.raises(ZeroDivisionError),
        IndexWriter(tmp_path / "i", {"a": 5}, stream.context, budget_bytes=1) as writer,
    ):
        feed(writer, stream)
        raise ZeroDivisionError
    assert open_index(tmp_path / "i").hash == before
    assert [p.name for p in tmp_path.iterdir()] == ["i"]
    with pytest.raises(ConfigError, match="this index writer is closed"):
        writer.add(**one_batch())


def test_a_failure_while_closing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr("unmix.index.sealing.write_manifest", broken)
    with pytest.raises(MachineError, match="the disk is full"):
        write(tmp_path / "i", make_stream(7))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["intake", "runs", "segment", "derive"])
def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"unmix.index.{module}.write_raw", full)
    with pytest.raises(MachineError, match=r"cannot write .*: the disk is full"):
        write(tmp_path / "i", make_stream(7))
    assert not list(tmp_path.iterdir())


def test_two_builds_at_one_place(tmp_path: Path) -> None:
    stream = make_stream(9)
    with IndexWriter(tmp_path / "i", {"a": 5}, stream.context) as writer:
        feed(writer, stream)
        with pytest.raises(ResumeError, match=rf"another process \(pid {os.getpid()}\) is working"):
            IndexWriter(tmp_path / "i", {"a": 5}, stream.context)
    assert open_index(tmp_path / "i").verify() == []
    assert not (tmp_path / "i/.lock").exists()


def test_only_an_index_or_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no index; choose another folder"):
        IndexWriter(tmp_path, {"a": 5}, 3)
    with pytest.raises(ConfigError, match="is a file, expected a folder for the index"):
        IndexWriter(tmp_path / "thesis.txt", {"a": 5}, 3)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", make_stream(1))
    write(tmp_path / "empty", make_stream(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "thesis.txt"]


def test_a_batch_is_cut_where_a_segment_ends(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "i", {"a": 4}, 3, segment_tokens=3) as writer:
        writer.add(**one_batch())
        writer.add(**one_batch(1))
    index = open_index(tmp_path / "i")
    assert [(s.base, s.tokens) for s in index.description.segments] == [(0, 3), (3, 3), (6, 3)]
    assert index[2].postings()[0].tolist() == [1, 7]


def test_tokens_and_codes_are_enough(tmp_path: Path) -> None:
    tokens = torch.tensor([[5, 6], [7, 8]])
    codes = Codes.from_topk(torch.tensor([[3, 1], [0, 3], [1, 2], [2, 0]]), torch.ones(4, 2), 4, (2, 2))
    with IndexWriter(tmp_path / "i", {"a": 4}, 2) as writer:
        writer.add(tokens, codes=codes)
        writer.add(tokens.tolist(), codes={"a": codes})
        with pytest.raises(ConfigError, match=r"codes are missing: add\(tokens, codes=…\)"):
            writer.add(tokens)
        with pytest.raises(ConfigError, match=r"tokens is \[2\], expected \[batch, 2\]"):
            writer.add(tokens[0], codes=codes)
    index = open_index(tmp_path / "i")
    assert index.tokens.tolist() == [[5, 6], [7, 8]] * 2
    assert index.documents.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert index.contexts_of(ROLES[0]).tolist() == [0, 1, 2, 3] and index.mask(np.arange(4)).all()
    assert index[3].postings()[0].tolist() == [0, 1, 4, 5]


def test_what_is_given_is_copied(tmp_path: Path) -> None:
    stream = make_stream(11)
    codes = ArrayCodes.from_dense(stream.codes["a"].reshape(-1, 5))
    with IndexWriter(tmp_path / "i", {"a": 5}, stream.context) as writer:
        writer.add(stream.tokens, stream.roles, stream.documents, np.ones_like(stream.mask), codes)
        codes.values[:] = np.nan
        codes.indices[:] = 0
    dense = stream.codes["a"]
    np.testing.assert_array_equal(open_index(tmp_path / "i")["a"].figures.firings, (dense != 0).sum(axis=(0, 1)))


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "i", make_stream(10), vocab=[str(i) for i in range(7)])
    code = f"""
import sys
from unmix.index import open_index
index = open_index({str(tmp_path / "i")!r})
index[0].top(3); index[0].negatives("random", 3); index.stats; index.verify()
heavy = [m for m in ("torch", "transformers") if m in sys.modules]
assert not heavy, heavy
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_batch_written_in_part_ends_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else tokens of the failed batch would stand before those of the next one, and every posting after it be off."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = IndexWriter(tmp_path / "i", {"a": 4}, 3, budget_bytes=1)
    with monkeypatch.context() as patch:
        patch.setattr("unmix.index.runs.write_raw", full)
        with pytest.raises(MachineError, match="the disk is full"):
            writer.add(**one_batch())
    with pytest.raises(ConfigError, match="this index writer is closed"):
        writer.add(**one_batch())
    assert list(tmp_path.iterdir()) == []


def test_two_writers_whose_names_begin_alike(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "gpt2.large", {"a": 4}, 3) as one:
        with IndexWriter(tmp_path / "gpt2", {"a": 4}, 3) as other:
            other.add(**one_batch())
        one.add(**one_batch())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "gpt2.large"]


def test_offsets_without_sign_that_fall(tmp_path: Path) -> None:
    batch = one_batch()
    offsets = np.array([0, 1, 0, 1, 1, 1, 1], np.uint64)
    batch["codes"] = {"a": ArrayCodes(np.array([2]), np.ones(1, np.float32), offsets, 4)}
    with IndexWriter(tmp_path / "i", {"a": 4}, 3) as writer:
        with pytest.raises(ConfigError, match="offsets must start at 0 and never fall"):
            writer.add(**batch)
        writer.add(**one_batch())


def test_a_tiny_budget_does_not_make_a_table_of_all_latents_for_every_few_postings(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "i", {"a": 2**17}, 3, budget_bytes=1) as writer:
        buffer = writer._intake._buffers["a"]  # pyright: ignore[reportPrivateUsage]
        buffer.add(np.arange(2**17), np.zeros(2**17, np.int64), np.ones(2**17, np.float32))
        assert buffer.bytes < 64 * 2**17
        buffer.__init__(2**17)
        writer.add(np.zeros((1, 3), int), codes=ArrayCodes(np.empty(0, int), np.empty(0), np.zeros(4, int), 2**17))
