"""The run files under `examples/`, one a family of coders: each is valid, and some train on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from unmix.core.policy import InputPolicy
from unmix.run.config import load_run
from unmix.run.public import train
from unmix.train.trainer import make_terms

EXAMPLES = Path(__file__).parents[2] / "examples"
FAMILIES = ("topk", "batchtopk", "jumprelu", "gated", "relu", "matryoshka", "crosscoder", "transcoder", "groupmax",
            "topk-annealed")  # fmt: skip
HOOKS = {
    "layers.8": "layers.0", "layers.10": "layers.1", "layers.12": "layers.2", "blocks.10.mlp_in": "blocks.1.mlp_in",
    "blocks.10.mlp_out": "blocks.1.mlp_out",
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, width 16, the tiny tokenizer; random weights from a fixed seed."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=512,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_is_valid_and_says_how_it_is_run(name: str) -> None:
    """Every field is known, and the commands in the comments name the file."""
    config = load_run(str(EXAMPLES / f"{name}.yaml"))
    assert config.model.name == "builtin:smollm2"
    member = next(iter(config.members().values()))
    reads, writes = member.spec.reads, member.spec.writes
    widths = ((576,) * len(reads), (576,) * len(writes))
    coder = member.spec.build(reads, writes, *widths, InputPolicy(), None)
    assert make_terms(coder, member.train)[0].name == "mse"
    text = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"unmix train examples/{name}.yaml" in text
    assert f"unmix run examples/{name}.yaml" in text


@pytest.mark.parametrize("name", FAMILIES)
def test_trains(name: str, model_folder: Path, tmp_path: Path) -> None:
    """Shrunk: fewer tokens, latents and layers; every other field as it stands."""
    tree = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    text = tmp_path / "text"
    text.mkdir()
    for i in range(80):
        lines = [f"Line {n} of page {i}: the sum of {n} and {i} is {n + i}." for n in range(12)]
        (text / f"{i}.txt").write_text("\n".join(lines))
    tree["model"] = {"name": str(model_folder), "dtype": "float32"}
    tree["data"] |= {"source": str(text), "tokens": 6000, "context": 32}
    coder, optim = tree["coder"], tree["train"]
    for side in ("hook", "write"):
        if side in coder:
            coder[side] = [HOOKS[h] for h in coder[side]] if isinstance(coder[side], list) else HOOKS[coder[side]]
    coder |= {"n_latents": 64, **({"k": 4} if "k" in coder else {})}
    optim |= {"batch": 256, "epochs": 2, "lr": 3e-3, "init_rows": 512, "log_every": 1, "checkpoint_every": 1000}
    optim |= {"prefixes": [8, 32]} if "prefixes" in optim else {}
    optim |= {"target_l0": 4} if "target_l0" in optim else {}
    optim |= {"k_start": 16} if "k_start" in optim else {}
    place = tmp_path / "run.yaml"
    place.write_text(yaml.safe_dump({**tree, "out": str(tmp_path / "run")}))
    context = train(place)
    trained = context.coder.config
    assert trained.activation.kind == tree["coder"]["activation"]
    assert len(trained.reads) == (3 if name == "crosscoder" else 1)
    assert (trained.reads == trained.writes) == (name != "transcoder")
    codes = context.coder.encode(torch.randn(5, trained.d_in))
    assert context.coder.decode(codes).shape == (5, trained.width_out)
