"""A flipped byte is found, named by what it is of, and mended to the byte; nothing else is done again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from index.builds import asked, changed_codes, make_source, opens, small_cut, tree
from index.oracle import make_stream, write
from unmix.cli._index_repair import command
from unmix.cli.verify import command as verify_command
from unmix.core.errors import ConfigError, CorruptError, ResumeError
from unmix.core.manifest import verify_folder
from unmix.index.building import build
from unmix.index.reader import open_index
from unmix.index.repairing import repair


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_cut(monkeypatch)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "i"
    with pytest.MonkeyPatch.context() as patch:
        small_cut(patch)
        build(folder, make_source)
    return folder


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "i")
    return tmp_path / "i"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_whole_index_needs_nothing(index: Path) -> None:
    assert repair(index) == []


@pytest.mark.parametrize(
    ("file", "said", "again"),
    [
        (
            "a/segment-00001/values.bin",
            r"segment 1 of 'a' \(tokens 96 to 191, shards 2 to 3\): a/segment-00001/",
            [8, 12],
        ),
        ("a/segment-00002/manifest.json", r"segment 2 of 'a' \(tokens 192 to 287, shards 4 to 5\): a/", [16, 20]),
        ("layers.1-out/segment-00000/positions.bin", r"segment 0 of 'layers.1/out' \(tokens 0 to 95, shards", [0, 4]),
        ("a/statistics/sum.bin", "statistics of 'a': a/statistics/sum.bin: found sha256", []),
        ("tokens.bin", "token files: tokens.bin: found sha256", [0, 4, 8, 12, 16, 20]),
        ("slice-speaker.bin", "token files: slice-speaker.bin: found", [0, 4, 8, 12, 16, 20]),
        ("vocab.json", "vocab.json: found sha256", []),
    ],
)
def test_one_flipped_bit(
    index: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, said: str, again: list[int]
) -> None:
    flip(index / file)
    assert [problem.path for problem in verify_folder(index)] == [index / file]
    with pytest.raises(CorruptError, match=f"^1 broken: .*{said}.*unmix index repair mends it"):
        verify_command([str(index)])
    assert capsys.readouterr().out == f"broken  {index}\n"
    (line,) = repair(index, opens(tmp_path / "log"))
    assert line.startswith(said[:6].replace("\\", "")) and file in line
    assert asked(tmp_path / "log") == again
    assert tree(index) == tree(built)
    assert verify_command([str(index)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["i"]


def test_much_is_broken_at_once(index: Path, built: Path, tmp_path: Path) -> None:
    shutil.rmtree(index / "a/segment-00001")
    (index / "a/segment-00000/values.bin").unlink()
    (index / "layers.1-out/statistics/sum.bin").write_bytes(b"short")
    flip(index / "documents.bin")
    assert len(repair(index, opens(tmp_path / "log"))) == 4
    assert tree(index) == tree(built)


def test_statistics_need_no_source_even_of_user_code(tmp_path: Path) -> None:
    write(tmp_path / "i", make_stream(1))
    before = tree(tmp_path / "i")
    flip(tmp_path / "i/a/statistics/sum.bin")
    assert len(repair(tmp_path / "i")) == 1
    assert tree(tmp_path / "i") == before
    flip(tmp_path / "i/a/segment-00000/values.bin")
    with pytest.raises(ConfigError, match="was not built from a source, so only statistics can be repaired"):
        repair(tmp_path / "i", make_source)


def test_without_its_source(index: Path) -> None:
    flip(index / "mask.bin")
    with pytest.raises(ConfigError, match="the source they came from is not known"):
        repair(index)


def test_another_source_is_refused_and_named(index: Path) -> None:
    flip(index / "a/segment-00001/values.bin")
    before = tree(index)
    with pytest.raises(ResumeError, match=r"was built of other inputs: coder 'a' changed: [0-9a-f]+ → "):
        repair(index, lambda: changed_codes(make_source(), "a"))
    assert tree(index) == before


def test_a_source_that_gives_other_bytes_changes_nothing(index: Path) -> None:
    class Drifting(type(make_source())):
        inputs = make_source().inputs

    flip(index / "a/segment-00001/values.bin")
    before = tree(index)
    changed = changed_codes(make_source(), "a")
    drifting = Drifting(**{name: getattr(changed, name) for name in changed.__dataclass_fields__})
    with pytest.raises(CorruptError, match="the source gives other bytes here than where the index was made"):
        repair(index, lambda: drifting)
    assert tree(index) == before


@pytest.mark.parametrize("file", ["index.json", "manifest.json"])
def test_what_says_how_to_read_the_rest_cannot_be_mended(index: Path, file: str) -> None:
    text = (index / file).read_text()
    (index / file).write_text(text.replace('"roles"', '"rolls"', 1) if file == "index.json" else text[:40])
    with pytest.raises(CorruptError, match=file):
        repair(index, make_source)


def test_statistics_after_repair_are_those_of_the_postings(index: Path) -> None:
    figures = open_index(index)["a"].figures.firings.copy()
    shutil.rmtree(index / "a/statistics")
    assert len(repair(index)) == 1
    np.testing.assert_array_equal(open_index(index)["a"].figures.firings, figures)


def test_the_command_mends_what_needs_no_model(index: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(index / "a/statistics/sum.bin")
    assert command([str(index)]) == 0
    assert capsys.readouterr().out.startswith("repaired  statistics of 'a': a/statistics/sum.bin: found sha256 ")
    assert tree(index) == tree(built)
    assert command([str(index)]) == 0
    assert capsys.readouterr().out == f"whole     {index}\n"
    flip(index / "tokens.bin")
    with pytest.raises(ConfigError, match="does not say how its source is opened again"):
        command([str(index)])
    with pytest.raises(ConfigError, match="usage: unmix index repair INDEX"):
        command(["a", "b"])
