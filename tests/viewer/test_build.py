"""The committed front end is what its source builds to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from unmix.viewer.page import asset


def test_the_lock_file_names_no_download_address(root: Path) -> None:
    lock = json.loads((root / "web" / "package-lock.json").read_text(encoding="utf-8"))
    assert [name for name, package in lock["packages"].items() if "resolved" in package] == []
    assert "omit-lockfile-registry-resolved=true" in (root / "web" / ".npmrc").read_text(encoding="utf-8").split()


def test_data_never_become_html(root: Path) -> None:
    """Everything on the page may come from strangers: no raw HTML anywhere in the source."""
    sources = [p for p in (root / "web" / "src").rglob("*") if p.suffix in {".svelte", ".ts"}]
    assert len(sources) > 15
    forbidden = ("{@html", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function")
    assert [(p.name, word) for p in sources for word in forbidden if word in p.read_text(encoding="utf-8")] == []


@pytest.mark.slow
def test_the_committed_build_is_fresh(root: Path, tmp_path: Path) -> None:
    """`npm run build` gives the same bytes again."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    if not (root / "web" / "node_modules").is_dir():
        pytest.skip("web/node_modules is absent: cd web && npm ci")
    environment = {**os.environ, "UNMIX_VIEWER_OUT": str(tmp_path / "static")}
    for script in ("check", "build"):
        done = subprocess.run(  # noqa: PLW1510  a failure is shown with its output, below
            [npm, "run", script], cwd=root / "web", env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "static").iterdir()} == {"unmix.js", "unmix.css"}
    for path in (tmp_path / "static").iterdir():
        assert path.read_bytes() == asset(path.name), f"{path.name}: stale; cd web && npm run build"
