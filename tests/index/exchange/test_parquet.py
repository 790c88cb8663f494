"""Parquet: read back with pyarrow, compared with the index."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.differences.simulated import write_index
from index.oracle import ArrayCodes, make_stream, write
from unmix.cli._index_export import command
from unmix.core.errors import ConfigError, MachineError
from unmix.index.exchange import write_parquet
from unmix.index.reader import LatentIndex, open_index
from unmix.index.writer import IndexWriter

pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LatentIndex:
    """Forty documents, six latents, two slicings."""
    firings = np.random.default_rng(0).integers(0, 4, (40, 6))
    firings[:, 5] = 0
    return write_index(tmp_path_factory.mktemp("parquet") / "index", 0, firings, np.arange(40) % 2)


def read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def test_one_row_a_posting(index: LatentIndex, tmp_path: Path) -> None:
    """Every posting, in order of latent and position, with what stands at it."""
    path = tmp_path / "postings.parquet"
    n = write_parquet(index, path, group=37)
    rows = read(path)
    assert n == len(rows) == int(index["a"].figures.firings.sum())
    assert pq.ParquetFile(path).metadata.num_row_groups > n // 37 - 1
    start = 0
    for latent in index["a"]:
        positions, values = latent.postings()
        part = rows[start : start + len(positions)]
        start += len(positions)
        assert [row["context"] * 48 + row["position"] for row in part] == positions.tolist()
        assert [row["activation"] for row in part] == values.tolist()
        assert {row["latent"] for row in part} <= {latent.id}
    for row in rows[::7]:
        token = int(index.tokens[row["context"], row["position"]])
        assert (row["coder"], row["token"], row["string"]) == ("a", token, f" w{token}")
        assert row["document"] == index.documents[row["context"], row["position"]]
        assert row["role"] == ("explain", "score")[row["context"] % 2]
        assert row["label"] == ("wikipedia", "books")[row["document"] % 2]
        assert row["speaker"] == ("user" if row["position"] % 24 < 8 else "assistant")


def test_a_slicing_may_be_called_as_a_column_is(tmp_path: Path) -> None:
    stream = make_stream(2, n_contexts=3)
    names: list[str] = ["latent", "coder", "string", "activation", "position"]
    slicings = dict.fromkeys(names, ("x", "y"))
    with IndexWriter(tmp_path / "index", {"a": 5}, stream.context, slices=slicings) as writer:
        codes = ArrayCodes.from_dense(stream.codes["a"].reshape(-1, 5))
        numbers = dict.fromkeys(names, np.ones(stream.tokens.shape, np.uint8))
        writer.add(stream.tokens, stream.roles, stream.documents, stream.mask, {"a": codes}, numbers)
    index, path = open_index(tmp_path / "index"), tmp_path / "postings.parquet"
    write_parquet(index, path)
    rows = read(path)
    assert [row["latent"] for row in rows] == np.repeat(np.arange(5), index["a"].figures.firings).tolist()
    assert {row[f"slice_{name}"] for row in rows for name in names} == {"y"}


def test_some_latents_of_some_coders(tmp_path: Path) -> None:
    index = write(tmp_path / "index", make_stream(2, names=("a", "b")))
    path = tmp_path / "some.parquet"
    write_parquet(index, path, coders=["b"], latents=[3, 0, 1])
    rows = read(path)
    assert {row["coder"] for row in rows} == {"b"}
    assert list(dict.fromkeys(row["latent"] for row in rows)) == [i for i in (3, 0, 1) if index["b"][i].count]
    assert all(row["string"] is None for row in rows)
    with pytest.raises(ConfigError, match="no latent 5 in 'b'"):
        write_parquet(index, path, coders=["b"], latents=[5])
    with pytest.raises(ConfigError, match=r"rows is 'window'\. Did you mean 'windows'\?"):
        write_parquet(index, path, rows="window")


def test_one_row_a_window(index: LatentIndex, tmp_path: Path) -> None:
    path = tmp_path / "windows.parquet"
    n = write_parquet(index, path, rows="windows", kind="top", n=3, context=(4, 4))
    rows = read(path)
    assert n == len(rows) == 15
    for latent in range(5):
        for rank, window in enumerate(index["a"][latent].top(3, context=(4, 4))):
            row = next(row for row in rows if row["latent"] == latent and row["rank"] == rank)
            assert row["tokens"] == window.tokens.tolist()
            assert row["strings"] == window.strings
            assert row["activations"] == window.values.tolist()
            assert (row["peak"], row["peak_at"], row["kind"]) == (window.peak, window.peak_at, "top")
            assert (row["document"], row["role"], row["quantile"]) == (window.document, window.role, None)


def test_the_command(index: LatentIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w.parquet"
    words = [str(index.folder), str(out), "--format", "parquet", "--rows", "windows", "--n", "2", "--latents", "0,2"]
    assert command(words) == 0
    assert capsys.readouterr().out == f"4 rows\n{out}\n"
    assert [row["kind"] for row in read(out)] == ["quantiles"] * 4


def test_without_pyarrow(index: LatentIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MachineError, match=r"pip install 'unmix\[parquet\]'"):
        write_parquet(index, tmp_path / "p.parquet")
