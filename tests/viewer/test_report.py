"""The static report: whole or absent, verifiable, and unable to hurt."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from unmix.core.errors import ConfigError
from unmix.core.manifest import read_manifest, verify_folder
from unmix.viewer.page import asset, index_html
from unmix.viewer.report import CHUNK_PAGES, write_report
from viewer.makebelieve import DEAD_LATENT, HOSTILE, HOSTILE_LATENT, HOSTILE_TEXT, make_report_data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_report_data(120, 60, 70), tmp_path_factory.mktemp("run") / "report").parent


def payload(path: Path) -> object:
    """What a data script assigns."""
    text = path.read_text(encoding="ascii")
    match = re.fullmatch(r'\(window\.__unmix=window\.__unmix\|\|\{\}\)\["([a-z0-9-]+)"\]=(.*);\n', text)
    assert match is not None
    return json.loads(match[2])


def test_the_folder_is_whole_and_verifiable(report: Path) -> None:
    manifest = read_manifest(report, "report")
    assert manifest["pages"] == 70
    assert verify_folder(report) == []
    names = set(manifest["files"])
    assert {"index.html", "unmix.js", "unmix.css", "data/run.js", "data/latents.js", "data/pages-0000.js"} <= names
    assert names | {"manifest.json"} == {f.relative_to(report).as_posix() for f in report.rglob("*") if f.is_file()}


def test_every_page_lies_in_the_chunk_that_the_table_names(report: Path) -> None:
    table = payload(report / "data" / "latents.js")
    assert isinstance(table, dict)
    found = {
        page["id"]: int(file.stem.split("-")[1])
        for file in (report / "data").glob("pages-*.js")
        for page in payload(file)  # type: ignore[attr-defined]  # a list of pages
    }
    named = {i: chunk for i, chunk in zip(table["ids"], table["chunks"], strict=True) if chunk >= 0}
    assert found == named
    assert len(named) == 70
    assert max(list(named.values()).count(chunk) for chunk in set(named.values())) <= CHUNK_PAGES


def test_hostile_data_stay_data(report: Path) -> None:
    for file in [*report.glob("data/*.js"), report / "index.html"]:
        text = file.read_text(encoding="utf-8")
        assert "<script>window" not in text
        assert "<img" not in text
    pages = [p for f in report.glob("data/pages-*.js") for p in payload(f)]  # type: ignore[attr-defined]  # a list
    page = next(p for p in pages if p["id"] == HOSTILE_LATENT)
    assert page["explanations"][0]["text"] == HOSTILE_TEXT
    assert page["top"][0]["tokens"] == list(HOSTILE)


def test_the_page_is_small_and_loads_nothing_from_elsewhere(report: Path) -> None:
    text = (report / "index.html").read_text()
    assert len(text) < 2000
    assert re.findall(r'(?:src|href)="([^"]+)"', text)[1:] == ["unmix.css", "data/run.js", "unmix.js"]
    assert "script-src &#x27;self&#x27; file:" in text
    assert "unsafe" not in text
    assert not re.search(r"<script(?! src=)", text)


def test_training_curves_stand_below_the_app(tmp_path: Path) -> None:
    """As an image inside the page, so that nothing else has to be there and nothing in it can run."""
    write_report(make_report_data(30, 10, 12), tmp_path / "report", "<svg><script>1</script></svg>")
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    found = re.search(r'<img alt="[^"]+" src="data:image/svg\+xml;base64,([^"]+)">', text)
    assert found is not None
    assert base64.b64decode(found[1]) == b"<svg><script>1</script></svg>"


def test_a_hostile_name_is_text() -> None:
    text = index_html('</title><script>1</script>"\ud800\u202e', "served", 'to"ken')
    assert "<script>1" not in text
    assert "‹U+D800›‹U+202E›" in text
    assert 'data-token="to&quot;ken"' in text
    text.encode()


def test_a_report_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    data = make_report_data(30, 10, 12)
    write_report(data, tmp_path / "report")
    (tmp_path / "report" / "stale.txt").write_text("old")
    write_report(replace(data, paged=data.paged[:3]), tmp_path / "report")
    assert not (tmp_path / "report" / "stale.txt").exists()
    assert read_manifest(tmp_path / "report", "report")["pages"] == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(
        ConfigError, match="mine: holds something that is not a report, and writing one would remove it"
    ):
        write_report(data, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    with pytest.raises(ConfigError, match=r"thesis\.txt: is a file; a report is a folder"):
        write_report(data, tmp_path / "mine" / "thesis.txt")


def test_a_failing_page_leaves_the_older_report(tmp_path: Path) -> None:
    data = make_report_data(30, 10, 12)
    write_report(data, tmp_path / "report")
    before = read_manifest(tmp_path / "report", "report")

    def broken(latent: int):
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_report(replace(data, page=broken), tmp_path / "report")
    assert read_manifest(tmp_path / "report", "report") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    data = make_report_data(30, 10, 12)
    write_report(data, tmp_path / "a")
    write_report(data, tmp_path / "b")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_a_run_without_anything_is_a_report_too(tmp_path: Path) -> None:
    data = make_report_data(12, 0 + 1, 12)
    bare = replace(data, metrics=[], frequency=None, scores=[], summary=[], paged=(DEAD_LATENT,))
    write_report(bare, tmp_path / "report")
    assert payload(tmp_path / "report" / "data" / "run.js")["metrics"] == []  # type: ignore[index]  # a mapping


def test_the_built_app_is_small_and_self_contained() -> None:
    script, style = asset("unmix.js").decode(), asset("unmix.css").decode()
    assert len(script) + len(style) < 120_000
    assert "url(" not in style
    assert "@import" not in style
    hosts = set(re.findall(r"https?://([a-z0-9.-]+)", script + style))
    assert hosts <= {"svelte.dev", "www.w3.org"}  # links in error messages, XML name spaces
    assert not re.search(r"\beval\(|new Function\(", script)
