"""`unmix plan`: what it prints, that the documentation prints the same, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from unmix.cli import main
from unmix.cli.plan import sized

EXAMPLE = "examples/scale-16m.yaml"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_page_shows_what_the_command_prints(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command of docs/scaling.md that is followed by a block of text."""
    monkeypatch.chdir(root)
    page = (root / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = re.findall(r"```sh\nunmix plan ([^\n]+)\n```\n\n```text\n(.*?)```", page, flags=re.DOTALL)
    assert len(found) == 1
    for words, text in found:
        code, out, _ = run(capsys, *shlex.split(words))
        assert (code, out) == (0, text)
        assert max(len(line) for line in out.splitlines()) <= 100


def test_numbers_for_programs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """16 bytes a weight of 2^24 latents over 64 cards, and sums that are sums."""
    code, out, _ = run(capsys, str(root / EXAMPLE), "--gpus", "64", "--json")
    assert code == 0
    found = json.loads(out)
    state = sum(found["memory"][name] for name in ("weights", "gradients", "optimiser"))
    assert state == 16 * (2**24 / 64 * (2 * 4096 + 1) + 4096)
    assert found["memory"]["fits"]
    assert found["step_seconds"] == pytest.approx(sum(phase["seconds"] for phase in found["phases"]))
    assert found["gpu_hours"] == pytest.approx(64 * found["hours"])
    assert found["cost"] == pytest.approx(2.5 * found["gpu_hours"])
    assert found["disk"]["cache"] == 1e9 * 4096 * 2


def test_the_mesh_is_chosen_where_nobody_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data first; the width from the model's own config; the L0 of thresholds has to be said."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 2048}', encoding="utf-8")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{name: {model}}}\ncoder: {{hook: layers.1, n_latents: 65536, activation: relu}}\n", encoding="utf-8"
    )
    assert run(capsys, str(file))[2] == ("unmix: plan: the L0 of layers.1 (relu) is known after training; give --l0\n")
    code, out, _ = run(capsys, str(file), "--gpus", "4", "--gpu", "a100", "--l0", "60", "--json")
    assert code == 0
    assert json.loads(out)["mesh"] == {"data": 4, "dictionary": 1, "gpu": "a100"}
    assert json.loads(out)["memory"]["weights"] == 4 * (65536 * (2 * 2048 + 1) + 2048)
    code, out, _ = run(capsys, str(file), "--l0", "60")
    assert "none: one process" in out
    assert "fits" in out


def test_what_does_not_go_together_is_refused(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With what would."""
    code, _, said = run(capsys, str(root / EXAMPLE), "--gpus", "60")
    assert code == 2
    assert said == "unmix: plan: a mesh of data 1 × dictionary 64 needs 64 cards, --gpus says 60\n"
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: someone/model}\ncoder: {hook: layers.1}\n", encoding="utf-8")
    assert "nothing here says how wide the hooks of someone/model are; give --width" in run(capsys, str(file))[2]
    assert run(capsys, "--gpus", "4")[0] == 2
    assert run(capsys, "--help")[1].startswith("usage: unmix plan CONFIG")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (8.59e9, "8.59 GB"), (4.2e15, "4,200.00 TB")]
)
def test_sizes_in_words(count: float, text: str) -> None:
    """By powers of ten."""
    assert sized(count) == text
