"""`unmix inspect`: what is said of a coder, of several, of a broken one, and of one measured on a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm.families import raw_model
from unmix.cli import main
from unmix.coder import CoderConfig, CoderSet, SparseCoder
from unmix.coder.config import JumpReLU, TopK
from unmix.coder.native import load_native

Run = Callable[..., tuple[int, list[str], str]]
HOOK = "blocks.1.resid_post"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, list[str], str]:
        code = main(["inspect", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert [line for line in out.splitlines() if len(line) > 100 and not line.startswith(" ")] == []
        return code, out.splitlines(), err

    return call


def told(lines: list[str], label: str) -> list[str]:
    """What stands behind a label, the lines below that belong to it included."""
    found: list[str] = []
    inside = False
    for line in lines:
        if line[:12].strip():
            inside = line[:12].strip() == label
        if inside:
            found.append(line[12:])
    return found


@pytest.fixture(scope="session")
def model_folder(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer, saved as transformers saves one."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    raw_model("gpt2", vocab_size=512).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "manual.txt"
    path.write_text("\n\n".join(prose), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def fitted(model_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coder of the main directions at `HOOK`, in the native format, with the L0 it has."""
    from unmix.evaluate.sampling import sample_tokens
    from unmix.lm import load_model

    lm = load_model(model_folder, dtype="float32")
    tokens = sample_tokens(lm, str(text), 2000, 64)
    x = lm.capture(tokens, [HOOK])[HOOK][:, 1:].flatten(0, 1)
    P = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:8]
    config = CoderConfig(
        reads=(HOOK,), d_in=16, n_latents=16, activation={"kind": "relu"}, pre_bias="tied",  # pyright: ignore
        training={"published": {"l0": 8.0, "fvu": 0.2}, "context_size": 32, "dataset": "some/text"},
    )  # fmt: skip
    both = torch.cat([P, -P])
    state = {"W_enc": both, "b_enc": torch.zeros(16), "W_dec": both.clone(), "b_dec": x.mean(0)}
    folder = tmp_path_factory.mktemp("fitted") / "coder"
    SparseCoder.from_state(config, state).save(folder)
    return folder


def saved(folder: Path, **changes: Any) -> Path:
    activation = changes.pop("activation", TopK(k=2))
    SparseCoder(CoderConfig(d_in=4, n_latents=8, activation=activation, **changes)).save(folder)
    return folder


def moved(source: Path, folder: Path, **changes: Any) -> Path:
    """The coder of `source` under a config that says something else."""
    coder = load_native(source)
    config = CoderConfig.model_validate({**coder.config.model_dump(), **changes})
    SparseCoder.from_state(config, coder.state_dict()).save(folder)
    return folder


def test_one_coder(run: Run, tmp_path: Path) -> None:
    place = saved(
        tmp_path / "c", reads=("blocks.3.mlp_in",), writes=("blocks.3.mlp_out",), d_out=6, skip=True, pre_bias="own",
        activation=JumpReLU(initial_threshold=0.25), gate_space="decoder_norm", input_scale=0.5, output_scale=2.0,
        normalise={"kind": "layer_norm", "restore": False}, model={"name": "gpt2"},
        training={"published": {"l0": 71, "fvu": 0.2}, "dataset": "some/text", "context_size": 64},
    )  # fmt: skip
    code, lines, err = run(place)
    assert (code, err) == (0, "")
    assert told(lines, "format") == ["native"]
    assert told(lines, "tensors")[:3] == [
        "coder.safetensors",
        "  W_dec      float32 [8, 6]",
        "  W_enc      float32 [8, 4]",
    ]
    assert told(lines, "reads") == ["blocks.3.mlp_in"]
    assert told(lines, "writes") == ["blocks.3.mlp_out"]
    assert told(lines, "model") == ["gpt2"]
    assert told(lines, "sizes") == ["d_in=4 n_latents=8 d_out=6, 130 parameters"]
    assert told(lines, "activation") == ["jumprelu"]
    assert told(lines, "gate") == ["on z × decoder norm"]
    assert told(lines, "input") == [
        "normalise layer_norm (eps 1e-05, ddof 1), not undone after, × 0.5, b_pre subtracted"
    ]
    assert told(lines, "output") == ["× 2, plus W_skip of the input"]
    assert told(lines, "decoder") == ["row norms 1"]
    assert told(lines, "threshold") == ["0.25"]
    assert told(lines, "fed") == ["BOS before each context, the first token of each masked"]
    assert told(lines, "trained on") == ["some/text, contexts of 64 tokens"]
    assert told(lines, "published") == ["L0 71, FVU 0.2"]


def test_latents_that_never_fired_are_counted(run: Run, root: Path) -> None:
    code, lines, _ = run(root / "tests" / "parity" / "sae_lens" / "standard")
    assert code == 0
    logs = load_file(root / "tests" / "parity" / "sae_lens" / "standard" / "sparsity.safetensors")["sparsity"]
    silent = int((logs < -9.99).sum())
    assert silent > 0
    assert told(lines, "silent") == [f"{silent} of 48 latents never fired in training"]
    assert told(lines, "statistic")[0].startswith("log feature sparsity: -10 to ")


def test_several_coders(run: Run, root: Path) -> None:
    place = root / "tests" / "parity" / "circuit_tracer_clt" / "jumprelu"
    code, lines, _ = run(place)
    assert code == 0
    assert told(lines, "together") == ["3 coders whose writes add up"]
    assert told(lines, "coders") == [
        "3; --name CODER says more of one",
        "layer_0  48 latents × 16  jumprelu  blocks.0.mlp_in → blocks.0.mlp_out, … (2 more)",
        "layer_1  48 latents × 16  jumprelu  blocks.1.mlp_in → blocks.1.mlp_out, … (1 more)",
        "layer_2  48 latents × 16  jumprelu  blocks.2.mlp_in → blocks.2.mlp_out",
    ]
    code, lines, _ = run(place, "--name", "layer_1")
    assert told(lines, "coder") == ["layer_1"]
    assert told(lines, "writes") == ["blocks.1.mlp_out, blocks.2.mlp_out"]
    code, _, err = run(place, "--name", "layer_7")
    assert code == 2
    assert "no coder 'layer_7' here. Did you mean 'layer_" in err


def test_long_lists_are_cut(run: Run, tmp_path: Path) -> None:
    hooks = tuple(f"blocks.{i}.mlp_out" for i in range(26))
    coders = {
        f"layer_{i}": SparseCoder(
            CoderConfig(reads=(hooks[i],), writes=hooks[i:], d_in=4, d_out=4 * (26 - i), n_latents=8, pre_bias="none",
                        activation=TopK(k=2))
        )
        for i in range(26)
    }  # fmt: skip
    CoderSet(coders).save(tmp_path / "set")
    _, lines, _ = run(tmp_path / "set")
    assert len(told(lines, "coders")) == 26  # a head, 24 coders, a tail
    assert told(lines, "coders")[-1] == "… 2 more"
    assert len(lines) < 60
    _, lines, _ = run(tmp_path / "set", "--name", "layer_0")
    assert told(lines, "writes")[-1].endswith("… (20 more)")


def test_a_coder_with_nan_is_told_and_its_refusal_too(run: Run, tmp_path: Path) -> None:
    from unmix.formats import convert

    convert(saved(tmp_path / "c"), tmp_path / "bad", "sae_lens")
    weights = tmp_path / "bad" / "sae_weights.safetensors"
    tensors: dict[str, Tensor] = load_file(weights)
    tensors["b_dec"][1] = float("nan")
    tensors["W_enc"][0, :3] = float("inf")
    save_file(tensors, weights)
    code, lines, err = run(tmp_path / "bad")
    assert (code, err) == (0, "")
    shown = [line.split(None, 1) for line in told(lines, "tensors")]
    assert ["W_enc", "float32 [4, 8]  3 infinite"] in shown
    assert ["b_dec", "float32 [4]  1 NaN"] in shown
    assert "NaN" in " ".join(told(lines, "refused"))
    assert "coder" not in [line[:12].strip() for line in lines]
    code, lines, _ = run(tmp_path / "bad", "--model", "nothing-is-loaded")
    assert code == 1
    assert told(lines, "self-check") == ["not measured: load refuses this coder"]


def test_a_file_that_is_no_coder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    code, lines, _ = run(tmp_path)
    assert code == 0
    assert told(lines, "format") == ["none recognised"]
    assert "broken.safetensors" in told(lines, "tensors")[0]
    assert "no known format" in " ".join(told(lines, "refused"))
    code, lines, err = run(tmp_path / "nowhere")
    assert (code, lines) == (2, [])
    assert "nowhere: no such file or folder" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "inspect needs a PLACE first"),
        (["p", "--modle", "gpt2"], "unknown option --modle. Did you mean 'model'"),
        (["p", "--text", "a.txt"], "--text says how to measure, which needs --model MODEL"),
        (["p", "--thorough"], "--thorough says how to measure, which needs --model MODEL"),
        (["p", "--format"], "--format needs a value"),
        (["p", "q"], "unexpected argument 'q'"),
    ],
)
def test_bad_arguments(run: Run, arguments: list[str], message: str) -> None:
    code, lines, err = run(*arguments)
    assert (code, lines) == (2, [])
    assert message in err


def test_a_coder_that_does_what_was_published(run: Run, fitted: Path, model_folder: Path, text: Path) -> None:
    code, lines, err = run(fitted, "--model", model_folder, "--text", text, "--tokens", "1k", "--context", "64")
    assert (code, err) == (0, "")
    table = told(lines, "self-check")
    assert f"945 tokens of {text} in contexts of 64" in " ".join(table[:3])
    rows = {" ".join(row.split()[:-2]): row.split()[-2:] for row in table if row.startswith(("published", "as stated"))}
    assert rows["published"] == ["8", "0.2"]
    assert rows["as stated (blocks.1.resid_post)"][0] == "8"
    assert len([row for row in table if "wrong" in row or "at blocks" in row]) == 0
    assert told(lines, "verdict") == ["agrees with what was published"]


def test_a_coder_at_the_wrong_hook(run: Run, fitted: Path, model_folder: Path, text: Path, tmp_path: Path) -> None:
    wrong = moved(fitted, tmp_path / "w", reads=["blocks.2.resid_post"], writes=["blocks.2.resid_post"])
    measure = ("--model", model_folder, "--text", text, "--tokens", "1k")
    code, lines, _ = run(wrong, *measure)
    assert code == 1
    assert told(lines, "verdict")[0].startswith("does not agree: FVU is ")
    assert told(lines, "cause")[0].startswith(
        "wrong hook: it fits blocks.1.resid_post, not blocks.2.resid_post (then L0"
    )
    assert any(row.startswith("at blocks.1.resid_post  ") for row in told(lines, "self-check"))
    assert told(lines, "self-check")[-1].endswith(" more; --json has them all")
    code, lines, _ = run(wrong, *measure, "--hook", HOOK)
    assert code == 0
    assert told(lines, "verdict") == ["agrees with what was published"]


def test_the_same_as_json(run: Run, fitted: Path, model_folder: Path, text: Path) -> None:
    code, lines, _ = run(fitted, "--json", "--model", model_folder, "--text", text, "--tokens", 640, "--thorough")
    facts = json.loads("\n".join(lines))
    assert code == 0
    assert facts["measured_on"] == {"model": str(model_folder), "text": str(text), "tokens": 640, "context": 32}
    assert facts["self_check"]["agrees"] is True
    assert facts["self_check"]["stated"]["l0"] == pytest.approx(8)
    assert facts["self_check"]["others"], "thorough looks at other readings all the same"
    assert facts["coders"][HOOK]["coder"]["d_in"] == 16


def test_coders_that_write_together_are_measured_together(
    run: Run, fitted: Path, model_folder: Path, text: Path, tmp_path: Path
) -> None:
    half = load_native(fitted)
    both = dict.fromkeys(("a", "b"), half)
    CoderSet(both).save(tmp_path / "set")
    code, lines, _ = run(tmp_path / "set", "--model", model_folder, "--text", text, "--tokens", "1k")
    assert code == 1
    assert told(lines, "verdict")[0].startswith("does not agree: L0 is 16, published 8; FVU is")
    assert told(lines, "cause") == [
        "no other reading that was tried fits; the text, the model or the files may be others"
    ]
    code, _, err = run(tmp_path / "set", "--model", model_folder, "--hook", HOOK)
    assert code == 2
    assert "measured where their files say, not at --hook" in err


def test_measuring_one_of_several_needs_its_name(run: Run, root: Path) -> None:
    code, lines, err = run(root / "tests" / "parity" / "sae_lens" / "mats_group_pt", "--model", "gpt2")
    assert (code, lines) == (2, [])
    assert "holds 2 coders; say which to measure with --name: " in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hook", "blocks.1.resid_pots"], "unknown hook 'blocks.1.resid_pots'. Nearest: blocks.1.resid_post"),
        (["--hook", "blocks.1.mlp_act"], "is 64 wide, the coder needs 16"),
        (["--tokens", "few"], "--tokens: found 'few', expected a number such as 8192 or 8k"),
        (["--context", "100"], "takes 2 to 64 tokens"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_what_cannot_be_measured(run: Run, fitted: Path, model_folder: Path, options: list[str], message: str) -> None:
    code, lines, err = run(fitted, "--model", model_folder, *options)
    assert code == 2
    assert told(lines, "coder") == [HOOK], "the facts are told first"
    assert message in err
