"""Hook names: each published dialect, both ways, and names that no table knows."""

from __future__ import annotations

import pytest

from unmix.formats.hook_names import (
    as_processed,
    canonical,
    from_module_path,
    from_openai_location,
    from_submodule_name,
    from_transformer_lens,
    module_input,
    to_module_path,
    to_openai_location,
    to_submodule_name,
    to_transformer_lens,
)

TRANSFORMER_LENS = [
    ("blocks.6.hook_resid_pre", None, "blocks.6.resid_pre"),
    ("blocks.6.hook_mlp_out", None, "blocks.6.mlp_out_post"),
    ("blocks.11.mlp.hook_out", None, "blocks.11.mlp_out"),
    ("blocks.5.attn.hook_z", 3, "blocks.5.z#3"),
    ("blocks.5.mlp.hook_post", None, "blocks.5.mlp_act"),
    ("hook_embed", None, "embeddings"),
    ("blocks.5.hook_q_input", None, "blocks.5.hook_q_input"),
    ("ln_final.hook_normalized", None, "ln_final.hook_normalized"),
]


@pytest.mark.parametrize(("theirs", "head", "ours"), TRANSFORMER_LENS)
def test_transformer_lens_both_ways(theirs, head, ours):
    assert from_transformer_lens(theirs, head) == ours
    assert to_transformer_lens(ours) == (theirs, head)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("blocks.8.resid_pre~centred", "blocks.8.hook_resid_pre"),
        ("embeddings~centred", "hook_embed"),
        ("blocks.5.z~unbiased", "blocks.5.attn.hook_z"),
        ("blocks.5.mlp_in~normalised", "blocks.5.ln2.hook_normalized"),
        ("blocks.5.attn_in~normalised", "blocks.5.ln1.hook_normalized"),
    ],
)
def test_views_are_written_as_the_hook_that_shows_them(ours, theirs):
    assert to_transformer_lens(ours) == (theirs, None)


@pytest.mark.parametrize(
    ("hook", "model", "options", "seen"),
    [
        ("blocks.8.resid_pre", "gpt2-small", {}, "blocks.8.resid_pre~centred"),
        ("blocks.8.resid_pre", "EleutherAI/pythia-70m-deduped", {}, "blocks.8.resid_pre~centred"),
        ("embeddings", "openai-community/gpt2", {}, "embeddings~centred"),
        ("blocks.8.resid_pre", "google/gemma-2-2b", {}, "blocks.8.resid_pre"),  # RMS norms: left alone
        ("blocks.8.resid_pre", "microsoft/Phi-3-mini-4k-instruct", {}, "blocks.8.resid_pre"),
        ("blocks.8.resid_pre", None, {}, "blocks.8.resid_pre"),
        ("blocks.8.resid_post", "gpt2", {"centred": False}, "blocks.8.resid_post"),
        ("blocks.8.mlp_act", "gpt2", {}, "blocks.8.mlp_act"),
        ("blocks.8.z", "gpt2", {}, "blocks.8.z~unbiased"),
        ("blocks.8.z", "gpt2", {"value_biases": False}, "blocks.8.z"),
    ],
)
def test_what_transformer_lens_shows_after_its_default_processing(hook, model, options, seen):
    assert as_processed(hook, model, **options) == seen


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("resid_post_mlp.8", "blocks.8.resid_post"),
        ("resid_delta_mlp_v5_128k/autoencoders/8.pt", "blocks.8.mlp_out_post"),
        ("gpt2-small/resid_post_attn_v5_32k/autoencoders/8", "blocks.8.resid_mid"),
        ("blocks.8.mlp_post_act", "blocks.8.mlp_act"),
        ("attn_out_layer_2", "blocks.2.attn_out"),
        (".model.layers.2.mlp", "blocks.2.mlp_out"),
        ("blocks.8.hook_resid_mid", "blocks.8.resid_mid"),
        ("autoencoders/8.pt", "autoencoders/8.pt"),
        ("anything.8", "anything.8"),
    ],
)
def test_any_dialect(theirs, ours):
    assert canonical(theirs) == ours


MODULES = [
    ("layers.10", "blocks.10.resid_post"),
    ("layer_5", "blocks.5.resid_post"),
    ("h.6", "blocks.6.resid_post"),
    ("transformer.h.6.mlp", "blocks.6.mlp_out"),
    ("gpt_neox.layers.3", "blocks.3.resid_post"),
    ("gpt_neox.layers.3.attention", "blocks.3.attn_out"),
    ("layers.29.mlp", "blocks.29.mlp_out"),
    ("model.layers.20.output", "blocks.20.resid_post"),
    ("model.layers.20.input", "blocks.20.resid_pre"),
    ("model.language_model.layers.2.output", "blocks.2.resid_post"),
    ("model.layers.3.mlp.output", "blocks.3.mlp_out"),
    ("model.layers.3.mlp.input", "blocks.3.mlp_in"),
    ("model.layers.3.mlp.down_proj.input", "blocks.3.mlp_act"),
    ("model.layers.3.self_attn.o_proj.input", "blocks.3.z"),
    ("model.layers.3.self_attn.input", "blocks.3.attn_in"),
    ("model.layers.3.pre_feedforward_layernorm.output", "blocks.3.mlp_in"),
    ("model.layers.3.post_feedforward_layernorm.output", "blocks.3.mlp_out_post"),
    ("model.embed_tokens.output", "embeddings"),
    ("blocks.3.hook_mlp_out", "blocks.3.mlp_out_post"),
    ("blocks.3.resid_mid", "blocks.3.resid_mid"),
    ("blocks.3.z#2", "blocks.3.z#2"),
]


@pytest.mark.parametrize(("theirs", "ours"), MODULES)
def test_module_paths(theirs, ours):
    assert from_module_path(theirs) == ours


@pytest.mark.parametrize(
    "name", ["vision.encoder", "layers.3.post_attention_layernorm.output", "layers.x", "lm_head", "blocks.3.odd", ""]
)
def test_unknown_module_paths_stay(name):
    assert from_module_path(name) == name


def test_canonical_to_module_paths():
    for hook in ("blocks.4.resid_post", "blocks.4.mlp_out", "blocks.4.attn_out"):
        assert from_module_path(to_module_path(hook)) == hook
    for point in ("resid_pre", "resid_post", "mlp_in", "mlp_act", "mlp_out", "attn_in", "attn_out", "z"):
        hook = f"blocks.4.{point}"
        assert to_module_path(hook, directed=True).endswith(("put",))
        assert from_module_path(to_module_path(hook, directed=True)) == hook
    assert to_module_path("blocks.4.resid_mid") == "blocks.4.resid_mid"
    assert to_module_path("embeddings") == "embeddings"
    assert module_input("blocks.29.mlp_out") == "blocks.29.mlp_in"
    assert module_input("blocks.29.resid_post") == "blocks.29.resid_pre"
    assert module_input("odd") == "odd"


OPENAI = [
    ("mlp_post_act", "mlp_post_act", "blocks.7.mlp_act"),
    ("resid_delta_mlp_v4", "resid_delta_mlp", "blocks.7.mlp_out_post"),
    ("resid_post_mlp_v5_32k", "resid_post_mlp", "blocks.7.resid_post"),
    ("resid_post_attn_v5_128k", "resid_post_attn", "blocks.7.resid_mid"),
    ("resid_delta_attn_v5_32k", "resid_delta_attn", "blocks.7.attn_out_post"),
]


@pytest.mark.parametrize(("location", "base", "ours"), OPENAI)
def test_openai_locations(location, base, ours):
    assert from_openai_location(location, 7) == ours
    assert to_openai_location(ours) == (base, 7)


SUBMODULES = [
    ("resid_post_layer_3", "blocks.3.resid_post", ("resid_post_layer_3", 3)),
    ("mlp_layer_12", "blocks.12.mlp_out", ("mlp_out_layer_12", 12)),
    ("attention_layer0", "blocks.0.attn_out", ("attn_out_layer_0", 0)),
    ("blocks.3.mlp_in", "blocks.3.mlp_in", ("blocks.3.mlp_in", 3)),
    ("gpt_neox.layers.3", "blocks.3.resid_post", ("resid_post_layer_3", 3)),
    ("embeddings", "embeddings", ("embeddings", None)),
]


@pytest.mark.parametrize(("theirs", "ours", "back"), SUBMODULES)
def test_submodule_names(theirs, ours, back):
    assert from_submodule_name(theirs) == ours
    assert to_submodule_name(ours) == back
    assert from_submodule_name(back[0]) == ours


def test_hooks_openai_has_no_location_for():
    assert to_openai_location("blocks.7.resid_pre") is None
    assert to_openai_location("embeddings") is None
    assert from_openai_location("odd_v5_32k", 2) == "blocks.2.odd"
