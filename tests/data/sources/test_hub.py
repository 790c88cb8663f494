from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmix.core.errors import DataError, MachineError, ServiceError
from unmix.data.config import DataConfig
from unmix.data.corpora import find_source, open_corpus
from unmix.data.sources.base import Document
from unmix.data.sources.hub import readings

ROWS = [{"text": "one", "id": 1}, {"text": None, "id": 2}, {"text": "three", "id": 3}]


class MissingError(FileNotFoundError):
    """As `datasets.exceptions.DatasetNotFoundError` is."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Puts a module named `datasets` with this `load_dataset` in place."""

    def put(load_dataset: Callable[..., Any]) -> None:
        module = types.ModuleType("datasets")
        module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        module.__dict__.update(load_dataset=load_dataset, __version__="4.9")
        monkeypatch.setitem(sys.modules, "datasets", module)

    return put


def test_rows_are_streamed(stand_in: Any) -> None:
    calls: list[Any] = []

    def load(name: str, subset: str | None, **kwargs: Any) -> Any:
        calls.append((name, subset, kwargs))
        return ROWS

    stand_in(load)
    config = DataConfig(source="hf:owner/name/subset", split="validation", label_column="id")
    source = find_source(config)
    assert list(source.documents()) == [Document("one", "owner/name:1", "1"), Document("three", "owner/name:3", "3")]
    assert calls == [("owner/name", "subset", {"split": "validation", "streaming": True})]
    assert source.report() == {
        "kind": "hub",
        "name": "owner/name",
        "config": "subset",
        "split": "validation",
        "column": "text",
        "datasets": "4.9",
    }


def test_two_parts_are_owner_and_name_before_name_and_config(stand_in: Any) -> None:
    def load(name: str, subset: str | None, **_: Any) -> Any:
        if (name, subset) != ("wikitext", "raw"):
            raise MissingError(f"Dataset '{name}' doesn't exist")
        return ROWS

    stand_in(load)
    assert find_source(DataConfig(source="hf:wikitext/raw")).report()["config"] == "raw"


def test_an_unknown_data_set_says_so(stand_in: Any) -> None:
    def load(name: str, *_: Any, **__: Any) -> Any:
        raise MissingError(f"Dataset '{name}' doesn't exist on the Hub")

    stand_in(load)
    with pytest.raises(DataError) as caught:
        open_corpus(DataConfig(source="hf:no/such"))
    assert str(caught.value) == "hf:no/such: no such data set (Dataset 'no/such' doesn't exist on the Hub)"


def test_an_unknown_split_or_config_passes_on_what_exists(stand_in: Any) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ValueError("Bad split: dev. Available splits: ['train', 'test']")

    stand_in(load)
    with pytest.raises(DataError, match=r"^hf:name: Bad split: dev\. Available splits: \['train', 'test'\]$"):
        open_corpus(DataConfig(source="hf:name", split="dev"))


def test_a_missing_column_lists_those_found(stand_in: Any) -> None:
    stand_in(lambda *_, **__: ROWS)
    with pytest.raises(DataError, match=r"^hf:name: row 1: no column 'body'; found text, id; set data.column: text$"):
        open_corpus(DataConfig(source="hf:name", column="body"))


def test_no_rows_is_an_error(stand_in: Any) -> None:
    stand_in(lambda *_, **__: [])
    with pytest.raises(DataError, match=r"^hf:name: the split 'train' has no rows$"):
        open_corpus(DataConfig(source="hf:name"))


def test_no_connection_is_the_service_s_error_at_the_start_and_in_the_middle(stand_in: Any) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    stand_in(offline)
    with pytest.raises(ServiceError, match=r"^hf:name: cannot be reached \(Couldn't reach the Hub\)$"):
        open_corpus(DataConfig(source="hf:name"))

    class Breaking:
        def __iter__(self) -> Any:
            yield ROWS[0]
            raise ConnectionResetError("reset")

    stand_in(lambda *_, **__: Breaking())
    documents = open_corpus(DataConfig(source="hf:name"))
    with pytest.raises(ServiceError, match=r"^hf:name: the download broke off \(reset\)$"):
        list(documents)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MachineError) as caught:
        open_corpus(DataConfig(source="hf:name"))
    assert str(caught.value) == "reading hf:name needs the package 'datasets': pip install 'unmix[data]'"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:a", [("a", None)]),
        ("hf:a/b", [("a/b", None), ("a", "b")]),
        ("hf:a/b/c", [("a/b", "c")]),
    ],
)
def test_readings_of_a_name(source: str, expected: list[tuple[str, str | None]]) -> None:
    assert readings(source) == expected


@pytest.mark.parametrize("source", ["hf:", "hf:a//b", "hf:a/b/c/d"])
def test_what_is_no_name_says_so(source: str) -> None:
    with pytest.raises(DataError, match=f"^{source}: not the name of a data set; expected hf:NAME, hf:OWNER/NAME"):
        readings(source)


def test_a_local_folder_with_the_real_package(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = DataConfig(source=f"hf:{folder}")
    assert [d.text for d in open_corpus(config)] == ["one", "three"]
    with pytest.raises(DataError, match=r"Bad split: dev"):
        open_corpus(config.model_copy(update={"split": "dev"}))
    with pytest.raises(DataError, match=r"no column 'body'; found text, id"):
        open_corpus(config.model_copy(update={"column": "body"}))
