from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unmix.core.errors import DataError, MachineError
from unmix.data.config import DataConfig
from unmix.data.corpora import find_source, open_corpus
from unmix.data.sources.base import Document

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: Path, **columns: list[object]) -> DataConfig:
    pq.write_table(pa.table(columns), path)
    return DataConfig(source=str(path))


def test_one_document_a_row_over_batches(tmp_path: Path) -> None:
    config = write(tmp_path / "a.parquet", text=[f"row {i}" for i in range(1, 2501)], n=list(range(2500)))
    documents = list(open_corpus(config))
    assert len(documents) == 2500
    assert documents[-1] == Document("row 2500", "a.parquet:2500", None)
    assert find_source(config).report() == {"kind": "parquet", "path": "a.parquet", "column": "text", "rows": 2500}


def test_nulls_are_passed_over_and_labels_kept(tmp_path: Path) -> None:
    config = write(tmp_path / "a.parquet", text=["x", None, "z"], label=[1, 2, 3])
    documents = list(open_corpus(config.model_copy(update={"label_column": "label"})))
    assert documents == [Document("x", "a.parquet:1", "1"), Document("z", "a.parquet:3", "3")]


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    config = write(tmp_path / "a.parquet", body=["x"], id=[1])
    with pytest.raises(DataError) as caught:
        open_corpus(config)
    assert str(caught.value) == f"{tmp_path}/a.parquet: no column 'text'; found body, id"
    with pytest.raises(DataError, match=r"b\.parquet: row 1: column 'text' holds int, expected a string"):
        list(open_corpus(write(tmp_path / "b.parquet", text=[1])))
    with pytest.raises(DataError, match=r"c\.parquet: the file has no rows"):
        open_corpus(write(tmp_path / "c.parquet", text=[]))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"d\.parquet: not a Parquet file"):
        open_corpus(DataConfig(source=str(tmp_path / "d.parquet")))
    with pytest.raises(DataError, match=r"e\.parquet: no such file"):
        open_corpus(DataConfig(source=str(tmp_path / "e.parquet")))


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {i} " * 20 for i in range(500)]}), path, compression="gzip")
    raw = bytearray(path.read_bytes())
    raw[40:400] = b"\xff" * 360
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet: a damaged Parquet file"):
        list(open_corpus(DataConfig(source=str(path))))


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MachineError) as caught:
        open_corpus(config)
    assert str(caught.value) == (
        f"reading {tmp_path}/a.parquet needs the package 'pyarrow': pip install 'unmix[parquet]'"
    )
