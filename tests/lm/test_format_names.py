"""The hook that each published format gives a coder is the tensor that the coder was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import unmix
from unmix.core.atomic import write_json
from unmix.formats.hook_names import from_module_path, from_openai_location, from_submodule_name, from_transformer_lens
from unmix.lm import LanguageModel

from .families import some_tokens, tiny

D, F = 16, 24
# What each project says of one and the same tensor, by the reader of its names.
NAMES: list[tuple[str, str, str]] = [
    # sae_lens, llama_scope, llamascopium, e2e_sae, circuit_tracer: TransformerLens' names
    ("gpt2", from_transformer_lens("blocks.1.hook_resid_pre"), "transformer.h.1@in"),
    ("gpt2", from_transformer_lens("blocks.1.mlp.hook_post"), "transformer.h.1.mlp.c_proj@in"),
    ("gpt2", from_transformer_lens("blocks.1.attn.hook_z"), "transformer.h.1.attn.c_proj@in"),
    ("gemma2", from_transformer_lens("blocks.1.hook_mlp_out"), "model.layers.1.post_feedforward_layernorm@out"),
    ("gemma2", from_transformer_lens("blocks.1.hook_resid_mid"), "model.layers.1.pre_feedforward_layernorm@in"),
    ("gemma2", from_transformer_lens("blocks.1.mlp.hook_in"), "model.layers.1.pre_feedforward_layernorm@out"),
    ("gemma2", from_transformer_lens("blocks.1.mlp.hook_out"), "model.layers.1.mlp@out"),
    # sparsify, opensae, gemma_scope_2, qwen_scope: modules of the Hugging Face model
    ("llama", from_module_path("layers.1"), "model.layers.1@out"),
    ("gpt2", from_module_path("h.1"), "transformer.h.1@out"),
    ("gpt_neox", from_module_path("gpt_neox.layers.1"), "gpt_neox.layers.1@out"),
    ("llama", from_module_path("layers.1.mlp"), "model.layers.1.mlp@out"),
    ("gemma3", from_module_path("model.layers.1.output"), "model.layers.1@out"),
    ("gemma3", from_module_path("model.layers.1.self_attn.o_proj.input"), "model.layers.1.self_attn.o_proj@in"),
    ("gemma3", from_module_path("model.layers.1.mlp.output"), "model.layers.1.mlp@out"),
    (
        "gemma3", from_module_path("model.layers.1.post_feedforward_layernorm.output"),
        "model.layers.1.post_feedforward_layernorm@out",
    ),
    # dictionary_learning
    ("gpt_neox", from_submodule_name("resid_post_layer_1"), "gpt_neox.layers.1@out"),
    ("gpt_neox", from_submodule_name("mlp_out_layer_1"), "gpt_neox.layers.1.mlp@out"),
    ("gpt_neox", from_submodule_name("attention_layer1"), "gpt_neox.layers.1.attention@out"),
    # openai
    ("gpt2", from_openai_location("mlp_post_act", 1), "transformer.h.1.mlp.c_proj@in"),
    ("gpt2", from_openai_location("resid_delta_attn_v5_32k", 1), "transformer.h.1.attn@out"),
    ("gpt2", from_openai_location("resid_post_attn_v5_32k", 1), "transformer.h.1.ln_2@in"),
    ("gpt2", from_openai_location("resid_delta_mlp_v4", 1), "transformer.h.1.mlp@out"),
    ("gpt2", from_openai_location("resid_post_mlp_v5_128k", 1), "transformer.h.1@out"),
]  # fmt: skip


def at_module(lm: LanguageModel, site: str, tokens: torch.Tensor) -> torch.Tensor:
    """The tensor at a module's border by a hook of torch's own."""
    path, _, side = site.partition("@")
    module, found = lm.model.get_submodule(path), []

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    def after(_: Any, __: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    hook = module.register_forward_pre_hook(before, with_kwargs=True) if side == "in" else None
    hook = hook or module.register_forward_hook(after)
    with torch.no_grad():
        lm.model(input_ids=tokens)
    hook.remove()
    return found[0]


@pytest.mark.parametrize(("family", "hook", "site"), NAMES)
def test_names_of_formats_are_the_tensors_they_say(family: str, hook: str, site: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    torch.testing.assert_close(lm.capture(tokens, hook)[hook], at_module(lm, site, tokens))


def weights(d_in: int = D) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_in, F), "b_enc": (F,), "W_dec": (F, d_in), "b_dec": (d_in,)}
    return {name: torch.randn(shape, generator=random) / 4 for name, shape in shapes.items()}


def sae_lens(folder: Path, **metadata: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "cfg.json", {
        "architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "metadata": {
            "sae_lens_version": "6.5.0", "model_name": "gpt2", "hook_name": "blocks.1.hook_resid_pre", **metadata,
        },
    })  # fmt: skip
    save_file(weights(), folder / "sae_weights.safetensors")
    return folder


def reads(coder: Any, lm: LanguageModel) -> torch.Tensor:
    """What the coder is handed when it is bound."""
    seen: list[torch.Tensor] = []
    inner = coder.encode
    coder.encode = lambda x: (seen.append(x), inner(x))[1]
    with torch.no_grad(), lm.bind(coder) as bound:
        bound(some_tokens(), logits=False)
    return seen[0]


@pytest.mark.parametrize("asked", [True, False, None])
def test_a_coder_of_a_centred_model_is_handed_centred_activations(asked: bool | None, tmp_path: Path) -> None:
    """`model_from_pretrained_kwargs` of SAELens: what jbloom's GPT-2 coders are loaded with there."""
    kwargs = {} if asked is None else {"model_from_pretrained_kwargs": {"center_writing_weights": asked}}
    coder, lm = unmix.load(sae_lens(tmp_path / "sae", **kwargs)), tiny("gpt2")
    raw = lm.capture(some_tokens(), "blocks.1.resid_pre")["blocks.1.resid_pre"]
    expected = raw - raw.mean(dim=-1, keepdim=True) if asked else raw
    torch.testing.assert_close(reads(coder, lm), expected)
    unmix.convert(tmp_path / "sae", tmp_path / "again", format="sae_lens")
    assert unmix.load(tmp_path / "again").config.reads == coder.config.reads


def test_an_end_to_end_coder_of_gpt2_is_handed_centred_activations(tmp_path: Path) -> None:
    """e2e_sae takes the model by `HookedTransformer.from_pretrained(tlens_model_name)`."""
    w = weights()
    tensors = {
        "encoder.0.weight": w["W_enc"].T.contiguous(), "encoder.0.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(), "decoder.bias": w["b_dec"],
    }  # fmt: skip
    torch.save({f"blocks-1-hook_resid_pre.{name}": value for name, value in tensors.items()}, tmp_path / "samples_1.pt")
    settings = {"tlens_model_name": "gpt2-small", "saes": {"sae_positions": ["blocks.1.hook_resid_pre"]}}
    (tmp_path / "final_config.yaml").write_text(yaml.safe_dump(settings))
    lm = tiny("gpt2")
    raw = lm.capture(some_tokens(), "blocks.1.resid_pre")["blocks.1.resid_pre"]
    torch.testing.assert_close(reads(unmix.load(tmp_path), lm), raw - raw.mean(dim=-1, keepdim=True))


def test_a_gemma_scope_transcoder_reads_the_norm_without_its_gain(tmp_path: Path) -> None:
    import numpy as np

    place = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1" / "width_16k" / "average_l0_5"
    place.mkdir(parents=True)
    np.savez(
        place / "params.npz", **{k: v.numpy() for k, v in weights().items()}, threshold=np.full(F, 0.01, "float32")
    )
    lm, coder = tiny("gemma2"), unmix.load(place)
    mid = lm.capture(some_tokens(), "blocks.1.resid_mid")["blocks.1.resid_mid"]
    normed = mid / (mid.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(reads(coder, lm), normed, atol=1e-5, rtol=1e-5)
    assert lm.hook(coder.config.writes[0]).name == "blocks.1.mlp_out_post"


def test_the_catalogue_knows_which_gpt2_coders_were_trained_on_a_centred_model() -> None:
    from unmix.formats.sources.releases import resolve_release

    def hook(text: str) -> Any:
        return resolve_release(f"release:{text}").facts["hook"]

    assert hook("gpt2-small-res-jb/blocks.8.hook_resid_pre") == "blocks.8.resid_pre~centred"
    assert hook("gpt2-small-res-jb/blocks.11.hook_resid_post") == "blocks.11.resid_post~centred"
    assert hook("openai-gpt2-small-v5-32k/resid_post_mlp/8") == "blocks.8.resid_post"
    assert hook("gpt2-small-resid-post-v5-32k/blocks.8.hook_resid_post") == "blocks.8.resid_post"


def test_a_release_says_which_view_of_a_hook_it_is(tmp_path: Path) -> None:
    from unmix.formats.provenance import _hooks

    config = unmix.load(sae_lens(tmp_path / "sae")).config
    assert _hooks(config, {"hook": "blocks.1.resid_pre~centred"})["reads"] == ("blocks.1.resid_pre~centred",)
    assert _hooks(config, {"hook": "blocks.2.resid_pre~centred"}) == {}
