"""`unmix steer`: both texts side by side, interventions in the order given, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import unmix
from lm.families import raw_model
from unmix.coder.config import CoderConfig, TopK
from unmix.core.policy import InputPolicy

Run = Callable[..., tuple[int, str, str]]
PROMPT = "The words of"


@pytest.fixture(scope="module")
def model_folder(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    raw_model("llama", vocab_size=512).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    return folder


def coder(hook: str = "blocks.1.resid_post", **fields: object) -> unmix.SparseCoder:
    config = CoderConfig(
        reads=(hook,), d_in=16, n_latents=24, activation=TopK(k=4), input_policy=InputPolicy(bos="none", skip_first=0),
        **fields,
    )  # fmt: skip
    return unmix.SparseCoder(config, seed=1)


@pytest.fixture(scope="module")
def coder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coder") / "layer1"
    coder(name="layer1").save(folder)
    return folder


def test_both_texts_are_those_of_the_library(run: Run, model_folder: Path, coder_folder: Path, tmp_path: Path) -> None:
    acts = [
        "--set",
        "3=20",
        "--add",
        "7=-9",
        "--multiply",
        "5=2",
        "--ablate",
        "1",
        "--clamp",
        "2=0:3",
        "--where",
        "generated",
    ]
    options = ["--tokens", "12", "--temperature", "0.7", "--seed", "3", "--dtype", "float32"]
    code, out, err = run(
        "steer", str(model_folder), str(coder_folder), PROMPT, *acts, *options, "--json", str(tmp_path / "o.json")
    )
    assert code == 0, err
    found = json.loads((tmp_path / "o.json").read_text())
    lm = unmix.load_model(str(model_folder), dtype="float32")
    expected = [
        unmix.Set(latent=3, value=20.0, where="generated"), unmix.Add(latent=7, value=-9.0, where="generated"),
        unmix.Multiply(latent=5, factor=2.0, where="generated"), unmix.Ablate(latent=1, where="generated"),
        unmix.Clamp(latent=2, minimum=0.0, maximum=3.0, where="generated"),
    ]  # fmt: skip
    assert unmix.interventions_from_json(found["interventions"]) == expected
    with lm.bind(coder(name="layer1"), error="keep") as bound:
        sampling = {"temperature": 0.7, "seed": 3}
        assert found["without"] == bound.generate(PROMPT, 12, **sampling)
        assert found["with"] == bound.generate(PROMPT, 12, interventions=expected, **sampling)
    assert found["with"] != found["without"]
    assert "without" in out and "│ with" in out and "set where=generated latent=3 value=20.0" in out
    assert found["prompt"] == PROMPT and found["kl"] is None


def test_several_coders_files_of_interventions_and_a_target_kl(run: Run, model_folder: Path, tmp_path: Path) -> None:
    coder(name="a").save(tmp_path / "both" / "a")
    coder("blocks.2.resid_post", name="b").save(tmp_path / "both" / "b")
    (tmp_path / "acts.json").write_text('[{"do": "add", "latent": 2, "value": 1.0, "coder": "a"}]')
    both = [str(model_folder), str(tmp_path / "both"), PROMPT, "--dtype", "float32", "--tokens", "5"]
    code, out, err = run(
        "steer",
        *both,
        "--interventions",
        str(tmp_path / "acts.json"),
        "--steer",
        "b:4=2",
        "--kl",
        "0.05",
        "--json",
        "-",
    )
    assert code == 0, err
    found = json.loads(out)
    assert [(act["do"], act["coder"]) for act in found["interventions"]] == [("add", "a"), ("steer", "b")]
    assert found["kl"]["found"] == pytest.approx(0.05, rel=0.01)
    scales = (found["interventions"][0]["value"], found["interventions"][1]["scale"])
    assert scales == pytest.approx((found["kl"]["strength"], 2 * found["kl"]["strength"]))
    code, _, err = run("steer", *both, "--set", "3=2")
    assert code == 2 and "several coders are bound; name one of a, b" in err
    assert run("steer", *both, "--name", "a", "--set", "3=2")[0] == 0


def test_escape_codes_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from unmix.cli.steer import _wrapped

    assert _wrapped("a\x1b[31mb\nc\td", 40) == ["a\\x1b[31mb", "c\\td"]
    assert _wrapped("one two three", 7) == ["one two", "three"]


def test_quantiles_come_from_an_index(
    run: Run, model_folder: Path, coder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    class Postings:
        def postings(self) -> tuple[object, object]:
            return np.arange(3), np.array([1.0, 2.0, 4.0], np.float32)

    class CoderIndex(dict[int, Postings]):
        frequency = torch.full((24,), 0.5)

    class Index:
        def coder(self, name: str | None = None) -> CoderIndex:
            return CoderIndex({3: Postings()})

        def __init__(self, *names: str) -> None:
            self.names = names

    monkeypatch.setattr("unmix.index.open_index", lambda folder: Index("layer1"))
    line = [str(model_folder), str(coder_folder), PROMPT, "--set", "3=1.5", "--tokens", "3", "--units", "quantile"]
    code, out, err = run("steer", *line, "--index", "somewhere", "--json", "-")
    assert code == 0, err
    assert json.loads(out)["interventions"] == [{"do": "set", "latent": 3, "value": 1.5, "units": "quantile"}]
    monkeypatch.setattr("unmix.index.open_index", lambda folder: Index("layer5", "layer6"))
    code, out, err = run("steer", *line, "--index", "somewhere")
    assert code == 2 and "--index somewhere: holds layer5, layer6, not layer1" in err


def test_a_target_kl_of_what_is_generated_is_measured_there(run: Run, model_folder: Path, coder_folder: Path) -> None:
    line = [str(model_folder), str(coder_folder), PROMPT, "--dtype", "float32", "--tokens", "4", "--kl", "0.05"]
    code, out, err = run("steer", *line, "--steer", "3=1", "--where", "generated")
    assert code == 0, err
    assert "nats on the text generated without" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["m", "c"], "steer takes MODEL CODER PROMPT, found 2 words"),
        (["m", "c", "p"], "steer needs an intervention"),
        (["m", "c", "p", "--sett", "3=2"], "unknown option --sett. Did you mean 'set'"),
        (["m", "c", "p", "--set"], "--set needs a value"),
        (["m", "c", "p", "--set", "x=2"], "--set x=2: 'x' is no latent; it looks like --set 123=8"),
        (["m", "c", "p", "--set", "3"], "--set 3: a value is missing"),
        (["m", "c", "p", "--set", "3=two"], "--set 3=two: 'two' is no number"),
        (["m", "c", "p", "--clamp", "3=2"], "expected two bounds"),
        (["m", "c", "p", "--set", "-3=2"], "latents count from 0"),
        (["m", "c", "p", "--set", "3=2", "--where", "later"], "--where later: expected all, prompt"),
        (["m", "c", "p", "--set", "3=2", "--units", "std"], "--units std: allowed: latent, quantile"),
        (["m", "c", "p", "--set", "3=2", "--units", "quantile"], "--units quantile needs --index"),
        (["m", "c", "p", "--set", "3=2", "--tokens", "many"], "--tokens many: expected a whole number"),
        (["m", "c", "p", "--set", "3=2", "--tokens", "1.5"], "--tokens 1.5: expected a whole number"),
        (["m", "c", "p", "--set", "3=2", "--tokens", "-3"], "--tokens -3: expected at least 1"),
        (["m", "c", "p", "--set", "3=2", "--error", "none"], "--error none: allowed: keep, drop"),
        (["m", "c", "p", "--set", "3=2", "--top-p", "0.9"], "--top-p does nothing at temperature 0"),
        (["m", "c", "p", "--set", "3=2", "--seed", "1", "--temperature", "0"], "--seed does nothing at temperature 0"),
        (["m", "c", "p", "--set", "3=2", "--temperature", "nan"], "temperature is nan; it must be at least 0"),
        (["m", "c", "p", "--steer", "3=2", "--units", "quantile", "--index", "i"], "only values of --set, --add and"),
        (["m", "c", "p", "--where", "prompt", "--interventions", "f.json"], "those of a file say their own"),
        (["m", "c", "p", "--interventions", "/nowhere.json"], "--interventions /nowhere.json: cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(run: Run, words: list[str], says: str) -> None:
    code, out, err = run("steer", *words)
    assert code == 2 and says in err and out == ""


def test_a_latent_out_of_range_and_an_unknown_coder(run: Run, model_folder: Path, coder_folder: Path) -> None:
    line = [str(model_folder), str(coder_folder), PROMPT]
    code, _, err = run("steer", *line, "--set", "24=1")
    assert code == 2 and "coder 'layer1' has latents 0 to 23" in err
    code, _, err = run("steer", *line, "--set", "2=1", "--name", "layer2")
    assert code == 2 and "no coder 'layer2' here. Did you mean 'layer1'" in err
