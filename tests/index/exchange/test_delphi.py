"""delphi's caches: what delphi itself wrote, what unmix writes, and broken ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from index.differences.simulated import write_index
from index.oracle import make_stream, write
from unmix.cli._index_export import command as export
from unmix.cli._index_import import command as import_
from unmix.core.errors import ConfigError, CorruptError, FormatError, MachineError, NonFiniteError
from unmix.index.exchange import DelphiSource, delphi_writing, read_delphi, write_delphi
from unmix.index.reader import CoderIndex, LatentIndex, open_index

CACHES = Path(__file__).parent.parent / "fixtures" / "delphi"


def dense(folder: Path, rows: int, context: int, latents: int) -> np.ndarray:
    """A hook's values [rows, context, latents], read off its files with safetensors' own reader."""
    found = np.zeros((rows, context, latents), np.float32)
    for path in folder.glob("*.safetensors"):
        stored, first = load_file(path), int(path.stem.split("_")[0])
        row, position, latent = stored["locations"].astype(np.int64).T
        found[row, position, latent + first] = stored["activations"]
    return found


def of_index(coder: CoderIndex, context: int) -> np.ndarray:
    """The same of a coder of an index."""
    found = np.zeros((len(coder), coder.n_tokens), np.float32)
    for latent in coder:
        positions, values = latent.postings()
        found[latent.id, positions.astype(np.int64)] = values
    return found.T.reshape(-1, context, len(coder))


def of_batches(source: DelphiSource, name: str) -> np.ndarray:
    """The same of a source, batch by batch."""
    parts: list[np.ndarray] = []
    for batch in source.batches():
        codes = batch.codes[name]
        part = np.zeros((batch.tokens.size, codes.n_latents), np.float32)
        part[np.repeat(np.arange(batch.tokens.size), np.diff(codes.offsets)), codes.indices] = codes.values
        parts.append(part.reshape(*batch.tokens.shape, -1))
    return np.concatenate(parts)


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """Rewrite the first file of a hook of a copied cache."""
    path = min((folder / "latents").glob("*/0_*.safetensors"))
    stored = load_file(path)
    edit(stored)
    save_file(stored, path)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A copy of the cache with tokens."""
    return Path(shutil.copytree(CACHES / "new", tmp_path / "cache"))


@pytest.mark.parametrize("place", ["new", "new/latents"])
def test_a_cache_that_delphi_wrote(place: str, tmp_path: Path) -> None:
    """Every hook, every token and every activation, exactly: float16 values are kept as they are."""
    index = read_delphi(CACHES / place, tmp_path / "index")
    assert index.names == ["layers.0", "layers.1"]
    tokens = load_file(CACHES / "new/latents/layers.0/0_6.safetensors")["tokens"]
    assert (index.tokens == tokens).all()
    for name in index.names:
        assert len(index[name]) == 21
        expected = dense(CACHES / "new" / "latents" / name, 10, 12, 21)
        assert (expected != 0).sum() > 100
        np.testing.assert_array_equal(of_index(index[name], 12), expected)
    assert index.meta["delphi"]["layers.1"]["dataset_repo"] == "made-up"
    assert index.verify() == []


def test_one_hook_may_be_read_alone(tmp_path: Path) -> None:
    index = read_delphi(CACHES / "new" / "latents" / "layers.1", tmp_path / "index")
    assert index.names == ["layers.1"]


def test_an_old_cache_needs_tokens(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"old: an old cache without tokens, .* \(--tokens FILE\.npy\)"):
        read_delphi(CACHES / "old", tmp_path / "index")
    tokens = load_file(CACHES / "new/latents/layers.0/0_6.safetensors")["tokens"]
    index = read_delphi(CACHES / "old", tmp_path / "index", tokens=tokens)
    expected = dense(CACHES / "new" / "latents" / "layers.1", 10, 12, 21)
    np.testing.assert_array_equal(of_index(index["layers.1"], 12), expected)
    with pytest.raises(ConfigError, match="holds its own tokens"):
        read_delphi(CACHES / "new", tmp_path / "other", tokens=tokens)
    with pytest.raises(ConfigError, match=r"tokens are float32 \[3\], expected integers"):
        DelphiSource(CACHES / "old", tokens=np.zeros(3, np.float32))


def test_the_earliest_files_are_wide_and_may_be_in_any_order(cache: Path, tmp_path: Path) -> None:
    """Neither float16 nor uint, and entries shuffled."""
    expected = dense(cache / "latents" / "layers.0", 10, 12, 21)
    for path in (cache / "latents" / "layers.0").glob("*.safetensors"):
        stored = load_file(path)
        order = np.random.default_rng(0).permutation(len(stored["activations"]))
        stored["locations"] = stored["locations"][order].astype(np.int64)
        stored["activations"] = stored["activations"][order].astype(np.float32)
        save_file(stored, path)
    index = read_delphi(cache, tmp_path / "index")
    np.testing.assert_array_equal(of_index(index["layers.0"], 12), expected)
    np.testing.assert_array_equal(of_batches(DelphiSource(cache, batch=3), "layers.0"), expected)


def test_documents_and_roles_of_a_foreign_cache(tmp_path: Path) -> None:
    """Each row is a document; with the token that begins documents they are known; equal rows have one role."""
    rows = read_delphi(CACHES / "new", tmp_path / "rows")
    assert (rows.documents == np.arange(10)[:, None]).all()
    assert rows.roles == ("explain", "score")
    assert set(rows.store.role_of.tolist()) == {0, 1}
    token = int(rows.tokens[2, 5])
    parted = read_delphi(CACHES / "new", tmp_path / "parted", document_token=token)
    begun = np.cumsum(rows.tokens.reshape(-1) == token)
    assert (parted.documents.reshape(-1) == begun).all()
    few = DelphiSource(CACHES / "new", document_token=token, batch=3)
    assert (np.concatenate([batch.documents for batch in few.batches()]).reshape(-1) == begun).all()
    again = read_delphi(CACHES / "new", tmp_path / "again")
    assert (again.store.role_of == rows.store.role_of).all()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([2**30, 2000]))
def test_there_and_back(tmp_path_factory: pytest.TempPathFactory, seed: int, splits: int, budget: int) -> None:
    """Index → cache → index: what delphi would keep, in float16, and all that it has no place for."""
    place = tmp_path_factory.mktemp("there")
    stream = make_stream(seed, n_contexts=11, names=("a", "layers.1"))
    stream.codes.update({name: np.clip(codes, -6e4, 6e4) for name, codes in stream.codes.items()})
    index = write(place / "index", stream, vocab=list("abcdefg"))
    dropped = write_delphi(index, place / "cache", splits=splits, budget_bytes=budget)
    back = read_delphi(place / "cache", place / "back")
    for name in index.names:
        before = of_index(index[name], index.context)
        kept = np.where(np.abs(before) > 1e-5, before, 0).astype(np.float16)
        assert dropped[name] == (before != 0).sum() - (kept != 0).sum()
        np.testing.assert_array_equal(of_index(back[name], index.context), kept.astype(np.float32))
    every = np.arange(index.n_contexts)
    assert (back.tokens == index.tokens).all() and (back.documents == index.documents).all()
    assert (back.store.role_of == index.store.role_of).all() and (back.mask(every) == index.mask(every)).all()
    assert back.roles == index.roles and back.store.vocab == index.store.vocab
    assert back.description.counted == index.description.counted


def test_one_hook_of_ours_knows_its_documents_too(tmp_path: Path) -> None:
    """And what lies beside the cache must be of the same text."""
    stream = make_stream(4, names=("a", "b"))
    stream.codes.update({name: np.clip(codes, -100, 100) for name, codes in stream.codes.items()})
    index = write(tmp_path / "index", stream)
    write_delphi(index, tmp_path / "cache", splits=2)
    for number, place in enumerate(("latents", "latents/b")):
        back = read_delphi(tmp_path / "cache" / place, tmp_path / f"back-{number}")
        assert (back.documents == index.documents).all()
    change(tmp_path / "cache", lambda stored: stored["tokens"].__setitem__((0, 0), 99))
    with pytest.raises(FormatError, match="'unmix' and 'a' hold different tokens"):
        read_delphi(tmp_path / "cache", tmp_path / "other")


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write(tmp_path / "index", make_stream(4, density=0.02))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(delphi_writing, "LARGEST", np.inf)
    with pytest.raises(MachineError, match="the disk is full"):
        write_delphi(index, tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_slices_come_back(tmp_path: Path) -> None:
    index = write_index(tmp_path / "index", 0, np.eye(40, 5, dtype=np.int64) * 3, np.arange(40) % 2)
    write_delphi(index, tmp_path / "cache", splits=2)
    back = read_delphi(tmp_path / "cache", tmp_path / "back")
    assert back.description.slices == index.description.slices
    for name, values in index.store.slices.items():
        assert (back.store.slices[name] == values).all()


def test_what_is_written_is_delphis_layout(tmp_path: Path) -> None:
    """Names, dtypes, order and config as delphi 0.1.3 writes them; splits that hold nothing too."""
    stream = make_stream(5, n_contexts=30, n_latents=10)
    stream.codes["a"] = np.clip(stream.codes["a"], -100, 100)
    stream.codes["a"][..., 4:6] = 0
    index = write(tmp_path / "index", stream, meta={"model": {"name": "tiny"}, "source": "text"})
    write_delphi(index, tmp_path / "cache", splits=4)
    hook = tmp_path / "cache" / "latents" / "a"
    assert {path.name for path in hook.iterdir()} == {
        "0_1.safetensors", "2_4.safetensors", "5_6.safetensors", "7_9.safetensors", "config.json"
    }  # fmt: skip
    for path in hook.glob("*.safetensors"):
        stored = load_file(path)
        assert {name: array.dtype.name for name, array in stored.items()} == {
            "locations": "uint16", "activations": "float16", "tokens": "int64"
        }  # fmt: skip
        assert (stored["tokens"] == index.tokens).all()
        row, position, latent = stored["locations"].astype(np.int64).T
        assert (np.lexsort((latent, position, row)) == np.arange(len(row))).all()
    write_delphi(index, tmp_path / "little", splits=4, budget_bytes=2000)
    for path in hook.glob("*.safetensors"):
        assert (tmp_path / "little" / "latents" / "a" / path.name).read_bytes() == path.read_bytes()
    config = json.loads((hook / "config.json").read_text(encoding="utf-8"))
    made = json.loads((CACHES / "new/latents/layers.0/config.json").read_text(encoding="utf-8"))
    assert set(config) == set(made)
    assert (config["n_tokens"], config["cache_ctx_len"], config["model_name"]) == (360, 12, "tiny")


def test_many_rows_take_wide_locations(tmp_path: Path) -> None:
    """A firing in row 65536 does not fit 16 bits; where nothing fires that late, 16 bits are enough."""
    stream = make_stream(0, n_contexts=2**16 + 1, context=1, n_latents=2, density=0.01)
    stream.mask[:] = True
    stream.codes["a"][:] = 0
    stream.codes["a"][7, 0, 0] = stream.codes["a"][2**16, 0, 1] = 1.5
    index = write(tmp_path / "index", stream, batch=2**16)
    write_delphi(index, tmp_path / "cache", splits=2, tokens=False, plain=True)
    hook = tmp_path / "cache" / "latents" / "a"
    assert load_file(hook / "0_0.safetensors")["locations"].dtype == np.uint16
    late = load_file(hook / "1_1.safetensors")["locations"]
    assert late.dtype == np.uint32 and late.tolist() == [[2**16, 0, 0]]
    assert not (tmp_path / "cache" / "unmix").exists()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    stream = make_stream(1, n_latents=5)
    stream.codes["a"] = np.clip(stream.codes["a"], -100, 100)
    stream.codes["a"][0, 0, 3], stream.mask[0, 0] = 70000, True
    index = write(tmp_path / "index", stream)
    with pytest.raises(ConfigError, match=r"latent 3 of 'a' reaches 70000, and a delphi cache holds float16, 65504"):
        write_delphi(index, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"splits is 6, expected 1 to 5"):
        write_delphi(index, tmp_path / "cache", splits=6)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not empty"):
        write_delphi(index, tmp_path / "full")
    assert not (tmp_path / "cache").exists()


def test_broken_caches_say_what_is_wrong(cache: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            read_delphi(cache, tmp_path / "index")
        assert not (tmp_path / "index").exists()

    whole = load_file(cache / "latents/layers.0/0_6.safetensors")
    path = change(cache, lambda stored: stored["locations"].__setitem__((3, 0), 10))
    refused(CorruptError, r"0_6\.safetensors: entry 3 is at row, position, latent \[10, .* outside of \[10, 12, 7\]")
    save_file(whole, path)
    change(cache, lambda stored: stored["activations"].__setitem__(2, np.inf))
    refused(NonFiniteError, "the value is inf")
    save_file(whole, path)
    change(cache, lambda stored: stored.pop("activations"))
    refused(FormatError, r"found only locations, tokens, expected activations of 1 dimensions")
    save_file({**whole, "activations": whole["activations"][1:].copy()}, path)
    refused(FormatError, r"locations are \[\d+, 3\] and activations \[\d+\], expected \[n, 3\] and \[n\]")
    save_file({**whole, "tokens": whole["tokens"].reshape(-1)}, path)
    refused(FormatError, r"found \[120\], expected tokens of 2 dimensions")
    save_file({**whole, "tokens": whole["tokens"] + 1}, path)
    refused(FormatError, "'layers.0' and 'layers.1' hold different tokens")
    path.write_bytes(path.read_bytes()[:500])
    refused(CorruptError, r"0_6\.safetensors")
    path.unlink()
    refused(
        FormatError, r"7_13\.safetensors: holds latents 7 to 13, expected a file that begins at 0; is one missing\?"
    )


def test_what_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such folder"):
        read_delphi(tmp_path / "nowhere", tmp_path / "index")
    with pytest.raises(FormatError, match="holds no delphi cache"):
        read_delphi(tmp_path, tmp_path / "index")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, load_file(CACHES / "new/latents/layers.0/0_6.safetensors")["tokens"])
    assert import_([str(CACHES / "old"), str(tmp_path / "index"), "--tokens", str(tokens)]) == 0
    firings = int(open_index(tmp_path / "index")["layers.1"].figures.firings.sum())
    assert f"layers.1: {firings} postings of 21 latents over 120 tokens" in capsys.readouterr().out
    words = [str(tmp_path / "index"), str(tmp_path / "cache"), "--format", "delphi", "--splits", "3"]
    assert export([*words, "--plain", "--coder", "layers.1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "cache")
    for name in ("0_6", "7_13", "14_20"):
        ours, theirs = (
            load_file(root / "latents" / "layers.1" / f"{name}.safetensors")
            for root in (tmp_path / "cache", CACHES / "new")
        )
        assert all((ours[key] == theirs[key]).all() and ours[key].dtype == theirs[key].dtype for key in theirs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A", "B"], "--format is missing: expected delphi or parquet"),
        (["A", "B", "--format", "csv"], "--format csv: expected delphi or parquet"),
        (["A", "B", "--format", "delphi", "--rows", "windows"], "--rows is not an option of --format delphi"),
        (["A", "B", "--format", "parquet", "--plain"], "--plain is not an option of --format parquet"),
        (["A", "B", "--format", "delphi", "--tokens", "maybe"], "--tokens maybe: expected yes or no"),
        (["A", "B", "--format", "parquet", "--n", "3"], "--n is of windows: give --rows windows too"),
        (["A", "B", "--format", "parquet", "--latents", "1,x"], "--latents 1,x: expected whole numbers"),
        (["A"], "takes INDEX OUT"),
    ],
)
def test_what_export_refuses(words: list[str], message: str, tmp_path: Path) -> None:
    index = write(tmp_path / "A", make_stream(0))
    with pytest.raises(ConfigError, match=message):
        export([str(index.folder) if word == "A" else word for word in words])


def test_import_refuses_files_that_are_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("text", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"not an \.npy file"):
        import_([str(CACHES / "old"), str(tmp_path / "index"), "--tokens", str(tmp_path / "text.npy")])
    with pytest.raises(ConfigError, match="no such file"):
        import_([str(CACHES / "old"), str(tmp_path / "index"), "--tokens", str(tmp_path / "none.npy")])


def test_an_imported_index_shows_windows(tmp_path: Path) -> None:
    index: LatentIndex = read_delphi(CACHES / "new", tmp_path / "index", vocab=[f" {i}" for i in range(40)])
    latent = index["layers.0"][int(index["layers.0"].ranking("firings")[0])]
    window = latent.top(1)[0]
    assert window.peak == latent.max
    assert window.strings is not None and window.strings[0] == f" {window.tokens[0]}"
