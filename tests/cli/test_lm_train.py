"""`unmix lm-train`: text in, a model out that the whole coder pipeline takes like any other."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmix.cli import main

Run = Callable[..., tuple[int, str, str]]
SHRUNK = [
    "--data.tokens", "12000", "--data.context", "32", "--tokenizer.vocab_size", "300", "--tokenizer.characters",
    "40000", "--model.layers", "2", "--model.width", "16", "--model.heads", "2", "--train.batch", "256",
    "--evaluate.tokens", "256", "--sample.tokens", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document a topic of the interpreter's manual."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("text")
    for name, content in sorted(topics.items())[:60]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(root: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/lm-train.yaml, shrunk, on the manual."""
    out = tmp_path_factory.mktemp("own")
    example = str(root / "examples" / "lm-train.yaml")
    assert main(["lm-train", example, "--out", str(out), "--data.source", str(text), *SHRUNK]) == 0
    return out


def test_the_example_trains(trained: Path, run: Run) -> None:
    """And a second call, by the folder alone, says what there is."""
    code, out, _ = run("lm-train", str(trained))
    assert code == 0
    figures = json.loads((trained / "result.json").read_text(encoding="utf-8"))
    assert f"parameters      {figures['parameters']:,}\n" in out
    assert f"held-out loss   {figures['held_out_loss']:.3f} nats a token (perplexity" in out
    assert f"model           {trained / 'model'}\n" in out
    assert out.count("it writes") == 2
    assert "'The function returns" in out
    code, out, _ = run("verify", str(trained))
    assert (code, out.count("whole")) == (0, 3)


def test_the_coder_pipeline_runs_on_it_unchanged(
    trained: Path, text: Path, root: Path, tmp_path: Path, run: Run
) -> None:
    """examples/lm-train-coder.yaml, shrunk: every stage, from tokens to the report."""
    code, out, err = run(
        "run", str(root / "examples" / "lm-train-coder.yaml"), "--model", str(trained / "model"), "--data", str(text),
        "--out", str(tmp_path / "run"), "--hook", "layers.1", "--data.tokens", "20000", "--data.context", "32",
        "--coder.n_latents", "48", "--coder.k", "4", "--train.batch", "512", "--train.init_rows", "1024",
        "--train.epochs", "1", "--evaluate.tokens", "1024", "--explain.latents", "6",
    )  # fmt: skip
    assert code == 0, err
    assert "fraction of variance unexplained" in out
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    made = json.loads((tmp_path / "run" / "coders" / "layers.1" / "config.json").read_text(encoding="utf-8"))
    assert made["model"]["family"] == "gpt2"
    assert made["d_in"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.widht", "3"], "unknown field 'model.widht'. Did you mean 'width'"),
        (["--data.source", "no-such-folder"], "no-such-folder: no such file or folder"),
        (["--train.steps", "5", "--train.tokens", "9"], "say how long to train; give one of them"),
        (["--device", "warp"], "device 'warp'"),
        (["model.width", "3"], "unexpected argument 'model.width'"),
    ],
)
def test_mistakes_are_said_before_anything_is_made(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"data": {"tokens": 20_000}}), encoding="utf-8")
    code, out, err = run("lm-train", str(path), "--out", str(tmp_path / "out"), *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("unmix: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_changed_config_is_refused(trained: Path, run: Run) -> None:
    code, _, err = run("lm-train", str(trained), "--model.layers", "3")
    assert code == 2
    assert "was made with other settings (model.layers: 2 → 3); choose another folder or remove this one" in err


def test_help_loads_nothing_heavy(run: Run) -> None:
    code, out, _ = run("lm-train", "--help")
    assert code == 0
    assert out.startswith("usage: unmix lm-train CONFIG")
    code, _, err = run("lm-train", "--model.layers", "3")
    assert code == 2
    assert "the first argument is a config file or a folder of lm-train" in err


def test_the_digits_example(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Shrunk to a few passes: the network reads digits, the coders explain most of its layers."""
    pytest.importorskip("sklearn", reason="examples/digits.py needs scikit-learn (extra: examples)")
    import importlib.util

    spec = importlib.util.spec_from_file_location("digits_example", root / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    digits = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "digits_example", digits)
    spec.loader.exec_module(digits)
    digits.main(["--epochs", "10", "--folder", str(tmp_path / "digits")])
    out = capsys.readouterr().out
    assert float(out.split("network: ")[1].split("%")[0]) > 90
    assert [float(part.split(",")[0]) < 0.2 for part in out.split("FVU ")[1:]] == [True, True]
    assert "8: latent" in out
    assert (tmp_path / "digits" / "coders" / "3" / "coder.safetensors").is_file()


def test_the_digits_example_says_what_is_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(sys, "argv", ["digits.py"])
    with pytest.raises(SystemExit, match=r"needs the package scikit-learn: pip install 'unmix\[examples\]'"):
        runpy.run_path(str(root / "examples" / "digits.py"), run_name="__main__")
