"""Names: canonical strings, aliases, module paths, and what an unknown one is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unmix.core.errors import ModelError
from unmix.lm import LanguageModel, load_model
from unmix.lm.sites import Site

from .families import CONFIGS, some_tokens, tiny

BLOCK = {
    "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers", "llama": "model.layers",
}  # fmt: skip


@pytest.mark.parametrize(
    ("alias", "canonical"),
    [
        ("blocks.1.resid_post", "blocks.1.resid_post"),
        ("blocks.1.hook_resid_post", "blocks.1.resid_post"),
        ("blocks.1.hook_resid_pre", "blocks.1.resid_pre"),
        ("blocks.1.hook_out", "blocks.1.resid_post"),
        ("resid_post.1", "blocks.1.resid_post"),
        ("layers.1", "blocks.1.resid_post"),
        ("h.1", "blocks.1.resid_post"),
        ("blocks.1", "blocks.1.resid_post"),
        ("transformer.h.1", "blocks.1.resid_post"),
        ("model.layers.1.output", "blocks.1.resid_post"),
        ("model.layers.1.input", "blocks.1.resid_pre"),
        ("blocks.1.attn.hook_z", "blocks.1.z"),
        ("blocks.1.hook_z", "blocks.1.z"),
        ("blocks.1.mlp.hook_post", "blocks.1.mlp_act"),
        ("blocks.1.mlp.hook_in", "blocks.1.mlp_in"),
        ("blocks.1.mlp.hook_out", "blocks.1.mlp_out"),
        ("blocks.1.hook_mlp_out", "blocks.1.mlp_out_post"),
        ("blocks.1.hook_attn_out", "blocks.1.attn_out_post"),
        ("blocks.1.attn.hook_out", "blocks.1.attn_out"),
        ("blocks.1.attn.hook_in", "blocks.1.attn_in"),
        ("layers.1.mlp", "blocks.1.mlp_out"),
        ("layers.1.mlp.output", "blocks.1.mlp_out"),
        ("layers.1.mlp@in", "blocks.1.mlp_in"),
        ("h.1.attn", "blocks.1.attn_out"),
        ("model.layers.1.self_attn.input", "blocks.1.attn_in"),
        ("hook_embed", "embeddings"),
        ("unembed.hook_in", "final_norm"),
        ("embed.hook_out", "embeddings"),
        ("ln_final.hook_in", "blocks.2.resid_post"),
        ("ln_final.hook_out", "final_norm"),
        ("ln_final.hook_normalized", "final_norm~normalised"),
        ("blocks.1.ln1.hook_in", "blocks.1.resid_pre"),
        ("blocks.1.ln1.hook_out", "blocks.1.attn_in"),
        ("blocks.1.ln1.hook_normalized", "blocks.1.attn_in~normalised"),
        ("blocks.1.ln2.hook_out", "blocks.1.mlp_in"),
        ("blocks.1.ln2.hook_normalized", "blocks.1.mlp_in~normalised"),
        ("blocks.1.attn.o.hook_in", "blocks.1.z"),
        ("blocks.1.mlp.out.hook_in", "blocks.1.mlp_act"),
        ("blocks.1.hook_resid_pre~centred", "blocks.1.resid_pre~centred"),
        ("h.1~centred", "blocks.1.resid_post~centred"),
        ("resid_post_layer_1", "blocks.1.resid_post"),
        ("mlp_layer1", "blocks.1.mlp_out"),
        (".gpt_neox.layers.1", "blocks.1.resid_post"),
        ("layers.1.self_attn.o_proj.input", "blocks.1.z"),
        ("layers.1.mlp.down_proj.input", "blocks.1.mlp_act"),
        ("resid_post_mlp.1", "blocks.1.resid_post"),
        ("resid_delta_attn/1", "blocks.1.attn_out_post"),
        ("resid_delta_mlp_v5_128k/autoencoders/1.pt", "blocks.1.mlp_out_post"),
        ("blocks.1.mlp_post_act", "blocks.1.mlp_act"),
        (" blocks.1.resid_post ", "blocks.1.resid_post"),
        ("blocks.1.attn.hook_z#3", "blocks.1.z#3"),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_aliases_mean_one_tensor_in_every_family(family: str, alias: str, canonical: str) -> None:
    assert tiny(family).hook(alias).name == canonical


def test_opt_has_no_mlp_module_to_name() -> None:
    assert tiny("opt").hook("layers.1.mlp").name == "blocks.1.mlp_out"
    assert tiny("opt").hook("blocks.1.mlp_out").read == Site("model.decoder.layers.1.fc2", "out")


@pytest.mark.parametrize("family", list(BLOCK))
def test_real_module_paths_become_points(family: str) -> None:
    lm, path = tiny(family), BLOCK[family]
    assert lm.hook(f"{path}.1").name == "blocks.1.resid_post"
    assert lm.hook(f"{path}.1@in").name == "blocks.1.resid_pre"
    assert lm.hook(lm.hook("blocks.2.z").read.path + ".input").name == "blocks.2.z"


def test_gemma_module_names_are_raw_outputs_and_block_level_ones_contributions() -> None:
    lm = tiny("gemma2")
    assert lm.hook("model.layers.1.mlp").name == "blocks.1.mlp_out"
    assert lm.hook("model.layers.1.post_feedforward_layernorm@out").name == (
        "model.layers.1.post_feedforward_layernorm@out"
    )
    assert lm.hook("blocks.1.hook_mlp_out").read.path == "model.layers.1.post_feedforward_layernorm"


def test_any_other_module_keeps_its_path() -> None:
    lm = tiny("llama")
    hook = lm.hook("layers.1.self_attn.q_proj")
    assert hook.name == "model.layers.1.self_attn.q_proj@out"
    assert lm.hook(hook.name) == hook
    assert lm.hook("lm_head@in").name == "lm_head@in"
    with pytest.raises(ModelError, match=r"unknown hook 'lm_head\.weight'"):
        lm.hook("lm_head.weight")


@pytest.mark.parametrize("family", list(CONFIGS))
def test_canonical_names_resolve_to_themselves(family: str) -> None:
    lm = tiny(family)
    assert [lm.hook(name).name for name in lm.hooks()] == lm.hooks()
    assert len(set(lm.hooks())) == len(lm.hooks())


def test_names_come_in_the_order_of_the_forward_pass() -> None:
    names = tiny("llama").hooks()
    assert names[:3] == ["embeddings", "blocks.0.resid_pre", "blocks.0.attn_in"]
    assert names[-2:] == ["blocks.2.resid_post", "final_norm"]


def test_an_unknown_hook_lists_the_nearest() -> None:
    with pytest.raises(ModelError) as caught:
        tiny("llama").hook("blocks.1.resid_pots")
    assert str(caught.value) == (
        "unknown hook 'blocks.1.resid_pots'. Nearest: blocks.1.resid_post, blocks.2.resid_post, blocks.0.resid_post."
    )


def test_a_hook_like_nothing_is_told_what_hooks_look_like() -> None:
    with pytest.raises(ModelError, match=r"unknown hook 'qqq'\. Hooks look like .*resid_post, final_norm; hooks\(\)"):
        tiny("llama").hook("qqq")


@pytest.mark.parametrize("spec", ["blocks.3.resid_post", "layers.3", "resid_post.3", "model.layers.3.mlp"])
def test_a_layer_out_of_range(spec: str) -> None:
    with pytest.raises(ModelError, match=r"there is no layer 3; this model has layers 0 to 2"):
        tiny("llama").hook(spec)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("blocks.1.hook_mlp_in", "use resid_mid, or mlp_in"),
        ("blocks.1.hook_attn_in", "use resid_pre, or attn_in"),
    ],
)
def test_names_of_other_tensors_are_refused_with_the_reason(spec: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        tiny("llama").hook(spec)


def test_heads() -> None:
    lm = tiny("qwen3")  # head_dim 8 × 4 heads = 32, wider than d_model 16
    whole = lm.capture(some_tokens(), ["blocks.1.z", "blocks.1.z#2", "layers.1.self_attn.k_proj#1"])
    torch.testing.assert_close(whole["blocks.1.z#2"], whole["blocks.1.z"][..., 16:24])
    assert lm.width("blocks.1.z") == 32
    assert lm.width("blocks.1.z#2") == 8
    keys = lm.capture(some_tokens(), "layers.1.self_attn.k_proj")["layers.1.self_attn.k_proj"]
    torch.testing.assert_close(whole["layers.1.self_attn.k_proj#1"], keys[..., 8:16])


def test_heads_that_do_not_exist() -> None:
    lm = tiny("qwen3")
    with pytest.raises(ModelError, match=r"blocks\.1\.z#4: no head '4'; this model has heads 0 to 3"):
        lm.hook("blocks.1.z#4")
    with pytest.raises(ModelError, match="only z and module paths"):
        lm.hook("blocks.1.resid_post#0")
    with pytest.raises(ModelError, match="a width of 16 holds 2 heads of 8, so no head 2"):
        lm.capture(some_tokens(), "layers.1.self_attn.k_proj#2")  # 2 key heads for 4 query heads


def test_a_plain_module_has_module_paths_only() -> None:
    lm = LanguageModel(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), "mlp")
    assert lm.hooks() == ["0@in", "0@out", "1@in", "1@out", "2@in", "2@out"]
    assert (lm.width("0@in"), lm.width("0"), lm.width("2@in")) == (4, 6, 6)
    with pytest.raises(ModelError, match="1@out: ReLU does not say how wide it is"):
        lm.width("1")
    with pytest.raises(ModelError, match=r"unknown hook 'layers\.0'\. Hooks look like"):
        lm.hook("layers.0")


def test_hook_points_of_a_transformer_lens_model_are_modules() -> None:
    """Its hook names are paths of identity modules, so they work as they are, refused ones included."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hook_resid_pre, self.hook_resid_post, self.mlp = nn.Identity(), nn.Identity(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.hook_resid_pre(x)
            return self.hook_resid_post(x + self.mlp(x))

    class Lens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(10, 4), nn.ModuleList([Block(), Block()])
            self.ln_final = nn.ModuleDict({"hook_normalized": nn.Identity()})
            self.tokenizer = range(10)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return self.ln_final["hook_normalized"](x)

    lm, tokens = load_model(Lens()), torch.tensor([[1, 2, 3]])
    acts = lm.capture(tokens, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "ln_final.hook_normalized"])
    assert torch.equal(acts["blocks.0.hook_resid_post"], acts["blocks.1.hook_resid_pre"])
    assert torch.equal(lm.run(tokens).logits, acts["ln_final.hook_normalized"])
    assert lm.width("blocks.1.hook_resid_post") == 4
