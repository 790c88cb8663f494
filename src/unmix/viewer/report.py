"""The static report: a folder that any browser opens from disk, without a server and without a network.

    index.html, unmix.js, unmix.css     the app
    data/run.js                         run, metrics, histograms, summary
    data/latents.js                     the table of all latents
    data/pages-0000.js …                pages, some dozens a file, loaded when one of them is looked at
    manifest.json                       length and SHA-256 of all of these, written last

Data are scripts and not JSON files because a page opened from disk may run scripts beside it, but not fetch files.
"""

from __future__ import annotations

from pathlib import Path

from unmix.core.atomic import atomic_folder
from unmix.core.errors import ConfigError, CorruptError
from unmix.core.manifest import read_manifest, write_manifest
from unmix.viewer.page import SCRIPT, STYLE, asset, index_html
from unmix.viewer.shapes import LatentPage, LatentTable, ReportData
from unmix.viewer.wire import to_json, to_script

KIND = "report"
CHUNK_BYTES = 256 * 1024
CHUNK_PAGES = 32


def write_report(data: ReportData, folder: str | Path, curves: str | None = None) -> Path:
    """Write the report of a run to `folder`, replacing an older one whole; returns the path of its `index.html`.

    Costs some 10 kB a page. `curves` is an SVG of the training, shown below. Raises `ConfigError` where `folder` holds
    something that is not a report, and `MachineError` where it cannot be written.
    """
    folder = Path(folder)
    _refuse_foreign(folder)
    with atomic_folder(folder) as temp:
        (temp / "data").mkdir()
        for name in (SCRIPT, STYLE):
            (temp / name).write_bytes(asset(name))
        chunks = _write_pages(data, temp / "data")
        table: LatentTable = {**data.latents, "chunks": [chunks.get(i, -1) for i in data.latents["ids"]]}
        _write(temp / "data" / "latents.js", to_script("latents", table))
        _write(temp / "data" / "run.js", to_script("run", overview(data)))
        _write(temp / "index.html", index_html(data.run["name"], "static", curves=curves))
        write_manifest(temp, KIND, pages=len(chunks), latents=len(data.latents["ids"]))
    return folder / "index.html"


def overview(data: ReportData) -> dict[str, object]:
    """What the first page needs: everything but the table of latents and their pages."""
    return {
        "run": data.run,
        "metrics": data.metrics,
        "frequency": data.frequency,
        "scores": data.scores,
        "summary": data.summary,
        "first": _first_rows(data.latents),
        "explained": data.latents["explained"],
        "score_name": data.latents["score_name"],
    }


def _first_rows(table: LatentTable, n: int = 12) -> list[dict[str, object]]:
    """The most meaningful latents, for the overview's way in."""
    rows = zip(table["ids"][:n], table["texts"], table["scores"], table["tokens"], strict=False)
    return [{"id": i, "text": text, "score": score, "tokens": tokens} for i, text, score, tokens in rows]


def _refuse_foreign(folder: Path) -> None:
    """A report replaces its folder whole, so the folder must be an older report, empty or absent."""
    if folder.is_file():
        raise ConfigError(f"{folder}: is a file; a report is a folder")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            read_manifest(folder, KIND)
        except CorruptError as error:
            raise ConfigError(
                f"{folder}: holds something that is not a report, and writing one would remove it ({error})"
            ) from error


def _write_pages(data: ReportData, folder: Path) -> dict[int, int]:
    """Write the pages in table order; returns `{latent: number of its file}`."""
    places: dict[int, int] = {}
    held: list[LatentPage] = []
    size, number = 0, 0
    for latent in data.paged:
        page = data.page(latent)
        size += len(to_json(page))
        held.append(page)
        places[latent] = number
        if len(held) == CHUNK_PAGES or size >= CHUNK_BYTES:
            _write(folder / f"pages-{number:04d}.js", to_script(f"pages-{number}", held))
            held, size, number = [], 0, number + 1
    if held:
        _write(folder / f"pages-{number:04d}.js", to_script(f"pages-{number}", held))
    return places


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
