"""Every block of docs/coming-from.md that loads coders runs, on what the addresses in it hold (small stand-ins)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lm.families import raw_model

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coming-from.md"
PARITY = ROOT / "tests" / "parity"

# What is published where: address without its scheme → the recorded coder that stands for it. The layouts and the
# names of the files are those of the published ones; the coders are small and random.
_PICKLE = "final_sparse_autoencoder_gpt2-small_blocks"
PUBLISHED = {
    f"jbloom/GPT2-Small-SAEs/{_PICKLE}.8.hook_resid_pre_24576.pt": (
        f"sae_lens/mats_pt/{_PICKLE}.3.hook_resid_pre_48.pt"
    ),
    f"jbloom/GPT2-Small-SAEs/{_PICKLE}.8.hook_resid_pre_24576_log_feature_sparsity.pt": (
        f"sae_lens/mats_pt/{_PICKLE}.3.hook_resid_pre_48_log_feature_sparsity.pt"
    ),
    "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre": "sae_lens/v2_standard",
    "openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt": (
        "openai/topk_v5/gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"
    ),
    **{
        f"openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/{place}_v5_32k/autoencoders/6.pt": (
            "openai/topk_v5/gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"
        )
        for place in ("resid_delta_attn", "resid_post_attn", "resid_delta_mlp", "resid_post_mlp")
    },
    "openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/mlp_post_act_v4/autoencoders/6.pt": (
        "openai/relu_v4/gpt2-small/resid_delta_mlp_v4/autoencoders/8.pt"
    ),
    "THU-KEG/OpenSAE-LLaMA-3.1-Layer_25": "opensae/raw_input/layer_25",
    "sparsify/gpt2/tvj2owza": "e2e_sae/run",
    "EleutherAI/sae-llama-3-8b-32x/layers.10": "sparsify/topk/layers.10",
    "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71": (
        "gemma_scope/res/google/gemma-scope-2b-pt-res/layer_3/width_48/average_l0_5"
    ),
}


@dataclass(frozen=True)
class Block:
    """A fenced Python block, and the heading that it stands under."""

    section: str
    line: int
    text: str


def python_blocks() -> list[Block]:
    """Every Python block of the page."""
    text = PAGE.read_text(encoding="utf-8")
    headings = [(m.start(), m[1]) for m in re.finditer(r"^## (.+)$", text, flags=re.MULTILINE)]
    found: list[Block] = []
    for fence in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        section = [name for start, name in headings if start < fence.start()][-1]
        found.append(Block(section, text[: fence.start()].count("\n") + 2, fence[1]))
    return found


BLOCKS = python_blocks()
OURS = [block for block in BLOCKS if "unmix" in block.text]


@pytest.fixture
def internet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Serves `PUBLISHED` behind every kind of address; gives the list of what was asked for."""
    from unmix.formats.sources import blob, hub, wandb
    from unmix.formats.sources.base import Fetched

    served = tmp_path / "served"
    for address, recorded in PUBLISHED.items():
        source, target = PARITY / recorded, served / address
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            # Recorded outputs lie beside the coder, where no publisher has them.
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("expected.*", "recorded.json"))
        else:
            shutil.copy(source, target)
        if "mlp_post_act" in address:
            widen(target)
    asked: list[str] = []

    def fetch(text: str, *, below: bool = False) -> Fetched:
        asked.append(text)
        path = served / text.partition("://")[2]
        assert path.exists(), f"{text} is not among the stand-ins"
        return Fetched(path, {"scheme": text.partition("://")[0], "place": text})

    for module in (hub, blob, wandb):
        monkeypatch.setattr(module, "fetch", fetch)
    return asked


def widen(file: Path) -> None:
    """Make a coder of OpenAI's layout as wide as the tiny GPT-2's MLP, four times its stream."""
    import torch

    state = torch.load(file, weights_only=True)
    state["encoder.weight"] = state["encoder.weight"].repeat(1, 4)
    state["decoder.weight"] = state["decoder.weight"].repeat(4, 1)
    state["pre_bias"] = state["pre_bias"].repeat(4)
    torch.save(state, file)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> list[str]:
    """Tiny random models of the family that a name stands for; gives the list of the names."""
    from unmix.lm import LanguageModel

    asked: list[str] = []

    def stand_in(name: str, **_: Any) -> LanguageModel:
        asked.append(name)
        family, layers = ("llama", "num_hidden_layers") if "llama" in name.lower() else ("gpt2", "n_layer")
        model = raw_model(family, vocab_size=512, **{layers: 11}).requires_grad_(False)
        return LanguageModel(model, name, tiny_tokenizer)

    monkeypatch.setattr("unmix.lm.load.load_model", stand_in)
    return asked


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch, prose: list[str]) -> list[str]:
    """Any data set is some prose; gives the list of the names."""
    from unmix.data import DataConfig, Document
    from unmix.train import session

    asked: list[str] = []

    def documents(config: DataConfig) -> Any:
        asked.append(config.source)
        return iter([Document(text, str(i)) for i, text in enumerate(prose)])

    monkeypatch.setattr(session, "open_corpus", documents)
    return asked


@pytest.mark.parametrize("block", OURS, ids=lambda block: f"{block.section} line {block.line}")
def test_our_blocks_run(
    block: Block, internet: list[str], models: list[str], data_sets: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And what they name afterwards is what the comments beside it say."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block.text, f"{PAGE}:{block.line}", "exec"), names)
    assert internet, "it loads something"
    CHECKS.get(_key(block), lambda _: None)(names)
    assert set(models) <= {"gpt2", "meta-llama/Llama-3.1-8B"}
    assert set(data_sets) <= {"hf:some/dataset"}


def _key(block: Block) -> str:
    """The first call of unmix in a block that tells it from the others."""
    return next(key for key in [*CHECKS, ""] if key in block.text)


def session_came_back(names: dict[str, Any]) -> None:
    assert names["lm"].name == "gpt2"
    assert names["tokens"].shape == (64, 64)
    assert names["rows"].shape == (4 * 63, 16)
    assert names["sparsity"].shape == (48,)
    assert names["coder"].config.training["source"]["format"] == "mats_sae_training"


def sae_lens_goes_both_ways(names: dict[str, Any]) -> None:
    import unmix

    assert names["coder"].config.training["source"]["format"] == "sae_lens_legacy"
    again = unmix.load("back-in-their-format")
    assert again.config.training["source"]["format"] == "sae_lens"


def openai_reconstructs(names: dict[str, Any]) -> None:
    assert names["hook"] == "blocks.8.resid_post"
    assert names["normalised_mse"].shape == names["x"].shape[:-1]
    assert names["coder"].config.training["published"] == {"l0": 32}


def opensae_is_sparse(names: dict[str, Any]) -> None:
    assert names["indices"].shape == names["values"].shape == (5, 9)
    assert names["output"].shape == (5, 16)


def e2e_is_spliced(names: dict[str, Any]) -> None:
    assert list(names["coders"]) == ["blocks.2.hook_resid_pre", "blocks.6.hook_resid_pre"]
    assert names["spliced"].shape == names["original"].shape
    assert not names["spliced"].allclose(names["original"])
    assert names["directions"].norm(dim=-1).allclose(names["directions"].new_ones(()))


def sparsify_folders(names: dict[str, Any]) -> None:
    assert list(names["coders"]) == ["layers.10"]
    one, other = names["coder"].state_dict(), names["coders"]["layers.10"].state_dict()
    assert all(one[name].equal(other[name]) for name in one)


def gemma_scope_says_its_l0(names: dict[str, Any]) -> None:
    assert names["published"] == {"l0": 71.0}
    assert names["coder"].config.reads == ("blocks.20.resid_post",)


def every_location_reads_its_hook(names: dict[str, Any]) -> None:
    points = [hook.removeprefix("blocks.6.") for hook in names["hooks"].values()]
    assert points == ["mlp_act", "attn_out_post", "resid_mid", "mlp_out_post", "resid_post"]
    assert all(error.ndim == 2 and bool((error > 0).all()) for error in names["errors"].values())


def opensae_is_bound(names: dict[str, Any]) -> None:
    codes = names["out"].codes[names["coder"].name]
    dense = codes.dense()
    assert codes.uniform_k == 9
    assert bool((dense[..., [3, 7]] == 8.0).all())
    assert names["lm"].decode(names["tokens"][0]).startswith(names["text"])


def e2e_is_bound(names: dict[str, Any]) -> None:
    assert names["logits"].shape == names["original"].shape
    assert not names["logits"].allclose(names["original"])
    assert names["behind"].shape[-1] == names["directions"].shape[-1] == 16
    assert names["ids"].shape[0] == 1


def evaluation_has_its_figures(names: dict[str, Any]) -> None:
    assert names["figures"]["l0"]["value"] > 0
    assert names["fires"].shape[-1] == 48


def lens_has_its_tables(names: dict[str, Any]) -> None:
    assert [len(tokens) for tokens in names["promoted"]] == [10] * 8
    assert set(names["shape"]) == {"mean", "std", "skewness", "kurtosis"}
    assert names["enriched"] and len(names["near"][0]) == 3


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "openai-gpt2-small-v4": every_location_reads_its_hook,
    "evict=True": opensae_is_bound,
    "frequency_penalty": e2e_is_bound,
    "unmix.evaluate(": evaluation_has_its_figures,
    "unmix.direct_logits(": lens_has_its_tables,
    "load_session(": session_came_back,
    "unmix.convert(": sae_lens_goes_both_ways,
    "openai-gpt2-small": openai_reconstructs,
    "topk_view": opensae_is_sparse,
    "unmix.Set(": lambda names: names["text"] is not None,
    "wandb://": e2e_is_spliced,
    "sae-llama-3-8b": sparsify_folders,
    "gemma-scope": gemma_scope_says_its_l0,
}


def test_every_project_has_its_block_and_ours() -> None:
    """A section shows how they load, then how we do."""
    for name in ("mats_sae_training and SAELens", "OpenAI sparse_autoencoder", "OpenSAE", "e2e_sae",
                 "sae-auto-interp (delphi) and sparsify"):  # fmt: skip
        here = [block for block in BLOCKS if block.section == name]
        assert {block in OURS for block in here} == {True, False}, name
    assert {_key(block) for block in OURS} == set(CHECKS), "each block of ours has its check"
