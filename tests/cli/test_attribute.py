"""`unmix attribute` and `unmix lens`: what they print is what the library gives, and what they refuse."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

import unmix
from lm.families import raw_model
from unmix.cli._words import read_words
from unmix.coder.config import CoderConfig, TopK
from unmix.core.errors import ConfigError
from unmix.core.policy import InputPolicy

Run = Callable[..., tuple[int, str, str]]
PROMPT = "The words of the"


@pytest.fixture(scope="module")
def model(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    raw_model("llama", vocab_size=512).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("coder") / "layer1"
    config = CoderConfig(
        name="layer1", reads=("blocks.1.resid_post",), d_in=16, n_latents=24, activation=TopK(k=4),
        input_policy=InputPolicy(bos="context", skip_first=1),
    )  # fmt: skip
    unmix.SparseCoder(config, seed=1).save(folder)
    return str(folder)


def test_the_table_is_the_librarys(run: Run, model: str, coder: str, tmp_path: Path) -> None:
    words = ["attribute", model, coder, PROMPT, "--target", " the", "--against", " of", "--top", "3"]
    code, out, err = run(*words, "--json", str(tmp_path / "a.json"))
    assert code == 0, err
    lm = unmix.load_model(model, dtype="float32")
    found = unmix.attribute((lm, unmix.load(coder)), PROMPT, " the", against=" of")
    lines = out.splitlines()
    assert lines[0].startswith(f"logit difference of ' the' − ' of' = {float(found.value[0]):.4g} after <|begin|> The")
    for row, line in zip(found.top(3), lines[3:6]):
        assert line.split()[:3] == [f"{row.effect:+.4f}", "layer1", str(row.latent)]
    assert "error left over at" in out
    tree = json.loads((tmp_path / "a.json").read_text())
    assert tree["latents"][0]["effect"] == pytest.approx(found.top(1, per="position")[0].effect, rel=1e-3)
    code, out, _ = run(*words, "--json", "-", "--method", "patch", "--error", "drop")
    assert code == 0
    assert json.loads(out)["method"] == "patch" and json.loads(out)["errors"] == []


def test_measured_beside_estimated_and_a_circuit(run: Run, model: str, coder: str, tmp_path: Path) -> None:
    options = ["--check", "5", "--circuit", str(tmp_path / "c"), "--node-threshold", "0.01", "--nodes", "6"]
    code, out, err = run("attribute", model, coder, PROMPT, "--method", "ig", "--steps", "4", *options)
    assert code == 0, err
    assert "measured" in out and "ig against patching, 5 nodes: correlation" in out
    assert "layer1: effects add up to" in out
    circuit = json.loads((tmp_path / "c" / "circuit.json").read_text())
    assert len(circuit["nodes"]) == 6 and "faithfulness" in err
    for name in ("circuit.svg", "curve.svg"):
        ET.fromstring((tmp_path / "c" / name).read_text())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "wonderful"], "target 'wonderful' is"),
        (["--metod", "ig"], "unknown option --metod. Did you mean"),
        (["--method", "ablate"], "method is 'ablate'. Allowed: gradient, ig, patch."),
        (["--metric", "probability"], "metric is 'probability'"),
        (["--per", "token"], "--per token: allowed: latent, position"),
        (["--top", "0"], "--top 0: at least 1"),
        (["--position", "99"], "position 99: the prompt has"),
        (["--steps", "many"], "--steps many: expected a whole number"),
        (["--nodes", "3"], "--nodes is a setting of a circuit, which needs --circuit FOLDER"),
        (["--check", "3", "--method", "patch"], "--check measures by patching"),
        (["--error", "both"], "error is 'both'; allowed: drop, keep"),
        (["--corrupt", "words"], "patching needs one position for another"),
        (["--name", "layer2"], "no coder 'layer2' here"),
        (["another"], "attribute takes MODEL CODER PROMPT, found 4 words; quote what has spaces"),
    ],
)
def test_what_is_refused(run: Run, model: str, coder: str, options: list[str], says: str) -> None:
    code, out, err = run("attribute", model, coder, PROMPT, *options)
    assert code == 2 and says in err and out == ""


def test_a_lens_is_fitted_and_read(run: Run, model: str, coder: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The words of the book are many. " * 60)
    words = [
        "--out",
        str(tmp_path / "lens"),
        "--data",
        str(text),
        "--tokens",
        "96",
        "--context",
        "24",
        "--batch",
        "2",
        "--passes",
        "9",
    ]
    code, out, err = run("lens", "fit", model, "layers.1", *words)
    assert code == 0, err
    # The first position of each context is no source.
    assert out.splitlines()[0] == (
        "mean Jacobian [16, 16] of blocks.2.resid_post by blocks.1.resid_post, over 92 positions"
    )
    assert run("verify", str(tmp_path / "lens"))[0] == 0
    options = ["--lens", str(tmp_path / "lens"), "--top", "3", "--set", "the,of", "--neighbours", "2"]
    effect = ["--effect", "48", "--context", "24", "--data", str(text), "--json", str(tmp_path / "s.json")]
    code, out, err = run("lens", "show", model, coder, "3,7", *options, *effect)
    assert code == 0, err
    tree = json.loads((tmp_path / "s.json").read_text())
    lm, loaded = unmix.load_model(model, dtype="float32"), unmix.load(coder)
    lens = unmix.JacobianLens.load(tmp_path / "lens")
    for i, row in enumerate(tree["latents"]):
        assert row["latent"] == (3, 7)[i]
        plain, through = (unmix.direct_logits(lm, loaded, (3, 7)[i], lens=given).top(3)[0] for given in (None, lens))
        assert [t["token"] for t in row["raises"]] == [t.token for t in plain]
        assert [t["token"] for t in row["lens"]["raises"]] == [t.token for t in through]
        assert len(row["neighbours"]) == 2 and row["sets"][0]["name"] == "the,of"
        assert row["ablation"]["contexts"] == 2
    assert "through the lens raises" in out and "without it: KL" in out
    code, out, err = run("lens", "show", model, coder, "3", "--at", PROMPT, "--position", "2", "--neighbours", "0")
    assert code == 0 and "at position 2" in out and "nearest" not in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["look"], "lens takes fit or show, found 'look'"),
        (["fit", "MODEL", "layers.1"], "lens fit needs --out FOLDER"),
        (["fit", "MODEL", "layers.9", "--out", "OUT"], "there is no layer 9"),
        (["fit", "MODEL", "layers.2", "--out", "OUT", "--tokens", "24", "--context", "8"], "there are no blocks after"),
        (["show", "MODEL", "CODER", "three"], "'three': latents are whole numbers"),
        (["show", "MODEL", "CODER", "99"], "latent 99: coder 'layer1' has latents 0 to 23"),
        (["show", "MODEL", "CODER", "3", "--data", "x.txt"], "--data is of the text that latents are ablated over"),
        (["show", "MODEL", "CODER", "3", "--position", "1"], "--position is a place in a text: give --at TEXT too"),
    ],
)
def test_lenses_that_are_refused(run: Run, model: str, coder: str, tmp_path: Path, words: list[str], says: str) -> None:
    known = {"MODEL": model, "CODER": coder, "OUT": str(tmp_path / "lens")}
    code, _, err = run("lens", *[known.get(word, word) for word in words])
    assert code == 2 and says in err, err
    assert not (tmp_path / "lens").exists()


def test_another_folder_is_not_overwritten(run: Run, model: str, coder: str) -> None:
    code, _, err = run("lens", "fit", model, "layers.1", "--out", coder)
    assert code == 2 and "holds no jacobian-lens" in err


def test_words_and_options() -> None:
    found = read_words(["a", "--n", "-1", "--k=8k", "b c"], ("n", "k"), "x", ("A", "B"))
    assert (found.words, found.whole("n"), found.whole("k"), found.whole("z", 4)) == (["a", "b c"], -1, 8000, 4)
    with pytest.raises(ConfigError, match="--n needs a value; see unmix x --help"):
        read_words(["--n", "--k"], ("n", "k"), "x", ())
    with pytest.raises(ConfigError, match="--k 1,x: expected a number"):
        read_words(["--k", "1,x"], ("k",), "x", ()).number("k", 0.0)
