"""What a tired user says to `unmix index`, `diff` and `verify`: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from index.oracle import ArrayCodes, make_stream
from unmix.index.writer import IndexWriter

Run = Callable[..., tuple[int, str, str]]
META = {"model": {"name": "tiny"}, "hook": {"layers.1": "blocks.1.resid_post"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stream = make_stream(3, n_contexts=40, names=("layers.1",), vocab=7)
    where = tmp_path_factory.mktemp("words") / "index"
    with IndexWriter(where, {"layers.1": 5}, stream.context, META, vocab=list("abcdefg")) as writer:
        codes = {name: ArrayCodes.from_dense(dense.reshape(-1, 5)) for name, dense in stream.codes.items()}
        writer.add(stream.tokens, stream.roles, stream.documents, stream.mask, codes)
    return where


def refused(run: Run, *words: str, code: int = 2) -> str:
    """The one line that was said."""
    found, _, err = run(*words)
    lines = err.strip().splitlines()
    assert found == code and len(lines) == 1 and lines[0].startswith("unmix: "), err
    return lines[0]


@pytest.mark.parametrize(
    "words",
    [
        ("index", "--model", "x", "--help"), ("index", "stats", "x", "--help"), ("index", "merge", "x", "--help"),
        ("index", "repair", "x", "-h"), ("index", "export", "x", "--help"), ("index", "import", "x", "--help"),
        ("diff", "x", "--help"), ("verify", "x", "--help"),
    ],
)  # fmt: skip
def test_help_may_be_asked_for_anywhere(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, err) == (0, "") and out.startswith("usage: unmix " + words[0])


@pytest.mark.parametrize(
    "words",
    [
        ("index", "stats", "{}"), ("index", "repair", "{}"), ("diff", "{}", "--slice", "role=score", "--against",
        "role=explain"), ("index", "export", "{}", "out", "--format", "delphi"),
        ("index", "export", "{}", "out", "--format", "parquet"),
    ],
)  # fmt: skip
def test_a_place_without_an_index_is_the_user_s_error_and_says_what_is_there(
    run: Run, tmp_path: Path, folder: Path, words: tuple[str, ...]
) -> None:
    def said(place: Path) -> str:
        return refused(run, *(word.format(place) for word in words)).removeprefix(f"unmix: {place}: ")

    assert said(tmp_path / "nowhere") == "no such folder"
    assert said(tmp_path) == "holds no index"
    (tmp_path / "file").write_text("x")
    assert said(tmp_path / "file") == "is a file, expected the folder of an index"
    assert said(folder.parent) == f"is no index, but {folder} is one"
    (tmp_path / ".begun.building").mkdir()
    assert said(tmp_path / "begun") == "is not finished; the unmix index command that began it goes on"


def test_a_broken_index_is_no_user_s_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{")
    assert "manifest.json: missing" in refused(run, "index", "stats", str(tmp_path), code=4)


@pytest.mark.parametrize(
    "words,message",
    [
        (("--by", "f1"), "--by belongs to --tokens"),
        (("--everywhere", "--rank", "max"), "--everywhere belongs to --tokens"),
        (("--n", "3"), "--n belongs to --rank and --tokens"),
        (("--no-single-token", "--list", "dead"), "--no-single-token belongs to --rank and --tokens"),
        (("--rank", "max", "--min-firings", "-1"), "--min-firings -1: expected 0 or more"),
        (("--rank", "max", "--max-frequency", "7"), "--max-frequency 7: expected more than 0 and at most 1"),
        (("--rank", "max", "--max-frequency", "nan"), "--max-frequency nan: expected more than 0 and at most 1"),
        (("--tokens", "a,#7"), "token id 7 is out of range: the vocabulary has ids 0 to 6"),
    ],
)
def test_no_word_of_stats_is_read_and_ignored(run: Run, folder: Path, words: tuple[str, ...], message: str) -> None:
    assert refused(run, "index", "stats", str(folder), *words) == f"unmix: {message}"


def test_stats_name_model_and_hook_and_fit_a_terminal_of_80_columns(run: Run, folder: Path) -> None:
    code, out, _ = run("index", "stats", str(folder))
    assert code == 0 and "model: tiny\n" in out and "hook: blocks.1.resid_post (layers.1)\n" in out
    table = out.split("\n\n")[-1].splitlines()
    assert max(map(len, table)) <= 80 and re.search(r">1% +>10% +L0 +\(median\) +≥50% +≥90%$", table[1])


def test_diff_never_ends_on_a_folder_named_as_its_file(run: Run, folder: Path, tmp_path: Path) -> None:
    words = ("diff", str(folder), "--slice", "role=explain", "--against", "role=score", "--json")
    assert refused(run, *words, str(tmp_path)) == f"unmix: --json {tmp_path}: is a folder, expected a file"
    assert run(*words, str(tmp_path / "new/found.json"))[0] == 0
    assert "a" in json.loads((tmp_path / "new/found.json").read_text())


def test_words_that_are_no_paths(run: Run, folder: Path) -> None:
    assert "unknown option --hlep" in refused(run, "verify", str(folder), "--hlep")
    assert "unknown option --restart" in refused(run, "index", "merge", "out", str(folder), "--restart")


def test_an_index_is_not_merged_with_itself(run: Run, folder: Path, tmp_path: Path) -> None:
    said = refused(
        run, "index", "merge", str(tmp_path / "out"), str(folder), f"{folder.parent}/../{folder.parent.name}/index"
    )
    assert "is named twice; its text would count twice" in said and not (tmp_path / "out").exists()
    assert "nowhere: no such folder" in refused(run, "index", "merge", str(tmp_path / "out"), str(tmp_path / "nowhere"))


def test_merge_and_import_never_take_the_place_of_an_index(run: Run, folder: Path, tmp_path: Path) -> None:
    kept = (folder / "manifest.json").read_bytes()
    for words in (("merge", str(folder), str(tmp_path)), ("import", str(tmp_path), str(folder))):
        assert f"{folder}: holds an index already; choose another folder" in refused(run, "index", *words)
    assert (folder / "manifest.json").read_bytes() == kept


def test_parquet_never_takes_the_place_of_another_file(run: Run, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    notes, out = tmp_path / "notes.txt", tmp_path / "postings.parquet"
    notes.write_text("mine")
    words = ("index", "export", str(folder), "--format", "parquet")
    assert "exists and is no Parquet file" in refused(run, *words, str(notes)) and notes.read_text() == "mine"
    assert "is a folder, expected a file" in refused(run, *words, str(tmp_path))
    assert run(*words, str(out))[0] == run(*words, str(out))[0] == 0


def test_budgets_are_said_in_bytes_everywhere(run: Run, folder: Path, tmp_path: Path) -> None:
    cache, back = str(tmp_path / "cache"), str(tmp_path / "back")
    export = ("index", "export", str(folder), cache, "--format", "delphi", "--budget")
    assert "--budget 0: expected a number of bytes" in refused(run, *export, "0")
    assert run(*export, "64MiB")[0] == 0
    assert "--budget some: expected" in refused(run, "index", "import", cache, back, "--budget", "some")
    assert run("index", "import", cache, back, "--budget", "64MiB")[0] == 0
