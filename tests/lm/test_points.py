"""Every point of every family against an independent computation from the model's own modules."""

from __future__ import annotations

import functools

import pytest
import torch

from unmix.core.errors import ModelError
from unmix.lm.points import LAYER_POINTS

from .families import _GROUPED, CONFIGS, NO_MID, PARALLEL, some_tokens, tiny

FAMILIES = list(CONFIGS)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@functools.cache
def everything(family: str) -> dict[str, torch.Tensor]:
    lm = tiny(family)
    return lm.capture(some_tokens(), lm.hooks())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt_350m"])
def test_the_stream_adds_up(family: str) -> None:
    acts, lm = everything(family), tiny(family)
    for layer in range(lm.n_layers):
        pre, post = acts[f"blocks.{layer}.resid_pre"], acts[f"blocks.{layer}.resid_post"]
        attn, mlp = acts[f"blocks.{layer}.attn_out_post"], acts[f"blocks.{layer}.mlp_out_post"]
        torch.testing.assert_close(pre + attn + mlp, post, **CLOSE)
        if family not in NO_MID:
            torch.testing.assert_close(pre + attn, acts[f"blocks.{layer}.resid_mid"], **CLOSE)
        if layer:
            torch.testing.assert_close(pre, acts[f"blocks.{layer - 1}.resid_post"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_what_transformers_returns(family: str) -> None:
    lm, acts = tiny(family), everything(family)
    states = lm.model(input_ids=some_tokens(), output_hidden_states=True).hidden_states
    for layer in range(lm.n_layers):
        torch.testing.assert_close(acts[f"blocks.{layer}.resid_pre"], states[layer])
    if "final_norm" in acts:
        torch.testing.assert_close(acts["final_norm"], states[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_neurons_and_heads(family: str) -> None:
    lm, acts = tiny(family), everything(family)
    for layer in range(lm.n_layers):
        z, neurons = lm.hook(f"blocks.{layer}.z"), lm.hook(f"blocks.{layer}.mlp_act")
        project = lm.model.get_submodule(z.read.path)
        torch.testing.assert_close(project(acts[z.name]), acts[f"blocks.{layer}.attn_out"], **CLOSE)
        down = lm.model.get_submodule(neurons.read.path)
        torch.testing.assert_close(down(acts[neurons.name]), acts[f"blocks.{layer}.mlp_out"], **CLOSE)
        assert acts[neurons.name].shape[-1] == lm.width(neurons.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_in_is_what_the_mlp_maps_to_mlp_out(family: str) -> None:
    lm, acts = tiny(family), everything(family)
    for layer in range(lm.n_layers):
        block = lm.model.get_submodule(lm.hook(f"layers.{layer}").read.path)
        mlp = getattr(block, "mlp", None)
        mlp = mlp if mlp is not None else lambda x, b=block: b.fc2(b.activation_fn(b.fc1(x)))
        torch.testing.assert_close(mlp(acts[f"blocks.{layer}.mlp_in"]), acts[f"blocks.{layer}.mlp_out"], **CLOSE)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_raw_output_and_contribution_differ_by_a_norm(family: str) -> None:
    lm, acts = tiny(family), everything(family)
    for layer in range(lm.n_layers):
        block = lm.model.model.layers[layer]
        raw, added = acts[f"blocks.{layer}.mlp_out"], acts[f"blocks.{layer}.mlp_out_post"]
        assert not torch.allclose(raw, added, atol=1e-2)
        torch.testing.assert_close(block.post_feedforward_layernorm(raw), added, **CLOSE)
        raw, added = acts[f"blocks.{layer}.attn_out"], acts[f"blocks.{layer}.attn_out_post"]
        torch.testing.assert_close(block.post_attention_layernorm(raw), added, **CLOSE)


def test_granite_contribution_is_scaled() -> None:
    acts = everything("granite")
    torch.testing.assert_close(acts["blocks.1.mlp_out"] * 0.5, acts["blocks.1.mlp_out_post"])
    torch.testing.assert_close(acts["blocks.1.attn_out"] * 0.5, acts["blocks.1.attn_out_post"])


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_the_tables_rows(family: str) -> None:
    lm, acts = tiny(family), everything(family)
    table = lm.model.get_input_embeddings()
    torch.testing.assert_close(acts["embeddings"], table(some_tokens()))


@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_blocks_have_no_resid_mid(family: str) -> None:
    with pytest.raises(ModelError, match=r"blocks\.1\.resid_mid: .* runs attention and MLP side by side") as caught:
        tiny(family).hook("blocks.1.resid_mid")
    assert caught.value.exit_code == 2
    assert "blocks.1.resid_mid" not in tiny(family).hooks()


def test_post_norm_opt_has_neither_resid_mid_nor_final_norm() -> None:
    lm = tiny("opt_350m")
    with pytest.raises(ModelError, match="no module of OPTForCausalLM's block reads the stream"):
        lm.hook("blocks.0.resid_mid")
    with pytest.raises(ModelError, match="final_norm: OPTForCausalLM has no norm after its last block"):
        lm.hook("final_norm")


def test_every_family_has_every_other_point() -> None:
    for family in FAMILIES:
        missing = {p for p in LAYER_POINTS if f"blocks.1.{p}" not in tiny(family).hooks()}
        assert missing == ({"resid_mid"} if family in NO_MID else set()), family


@pytest.mark.parametrize("family", FAMILIES)
def test_unembed_gives_the_models_logits(family: str) -> None:
    lm = tiny(family)
    last = lm.capture(some_tokens(), lm.last_hook)[lm.last_hook]
    torch.testing.assert_close(lm.unembed(last), lm.logits(some_tokens()), **CLOSE)
    assert lm.unembedding.shape[0] == lm.vocab_size == 100


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_to_a_point_is_read_there(family: str) -> None:
    lm, tokens, acts = tiny(family), some_tokens(), everything(family)
    random = torch.Generator().manual_seed(5)
    for name in [n for n in lm.hooks() if not n.startswith(("blocks.0", "blocks.2"))]:
        new = torch.randn(acts[name].shape, generator=random)
        out = lm.run(tokens, {name: lambda _, new=new: new}, capture=[name])
        torch.testing.assert_close(out.activations[name], new, **CLOSE)
        assert out.logits is not None and not torch.allclose(out.logits, lm.logits(tokens), atol=1e-3), name
        same = lm.run(tokens, {name: lambda x: x.clone()}).logits
        torch.testing.assert_close(same, lm.logits(tokens), **CLOSE)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NO_MID])
def test_writing_the_stream_between_goes_on_in_the_stream(family: str) -> None:
    """And not into the norm alone: what the block gives is the new stream plus what the MLP makes of it."""
    lm, tokens = tiny(family), some_tokens()
    new = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(5))
    hooks = ["blocks.1.resid_mid", "blocks.1.mlp_out_post", "blocks.1.resid_post"]
    acts = lm.run(tokens, {"blocks.1.resid_mid": lambda _: new}, capture=hooks).activations
    torch.testing.assert_close(acts[hooks[0]] + acts[hooks[1]], acts[hooks[2]], **CLOSE)
    torch.testing.assert_close(acts[hooks[0]], new, **CLOSE)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2", "granite"])
def test_writing_a_contribution_is_not_writing_the_raw_output(family: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    new = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(5))
    before = "blocks.1.resid_mid"
    for point in ("mlp_out", "mlp_out_post"):
        hook = f"blocks.1.{point}"
        acts = lm.run(tokens, {hook: lambda _: new}, capture=[before, "blocks.1.resid_post"]).activations
        added = acts["blocks.1.resid_post"] - acts[before]
        assert torch.allclose(added, new, atol=1e-5) == (point == "mlp_out_post")


_OLDER = {"hidden_size": 16, "num_attention_heads": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 100, "bos_token_id": 1}
# Further families that interp-engine knows: what they have is right, and what they have not is refused.
FURTHER: dict[str, tuple[str, dict[str, object], set[str]]] = {
    "smollm": ("LlamaConfig", {**_GROUPED, "num_key_value_heads": 1, "tie_word_embeddings": True}, set()),
    "smollm3": ("SmolLM3Config", _GROUPED, set()),
    "olmo": ("OlmoConfig", _GROUPED, set()),
    "glm4": ("Glm4Config", {**_GROUPED, "head_dim": 8}, set()),
    "stablelm": ("StableLmConfig", _GROUPED, set()),
    "starcoder2": ("Starcoder2Config", _GROUPED, set()),
    "bloom": ("BloomConfig", {**_OLDER, "n_layer": 3, "n_head": 4}, set()),
    "mpt": ("MptConfig", {"d_model": 16, "n_layers": 3, "n_heads": 4, "vocab_size": 100, "max_seq_len": 64}, set()),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 2, "eos_token_id": 2}, {"resid_mid"}),
    "falcon": ("FalconConfig", {**_OLDER, "num_hidden_layers": 3}, {"resid_mid"}),
}


@pytest.mark.parametrize("family", list(FURTHER))
def test_further_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmix.lm import LanguageModel

    from .families import raw_model

    name, sizes, missing = FURTHER[family]
    monkeypatch.setitem(CONFIGS, family, (name, sizes))
    lm, tokens = LanguageModel(raw_model(family).requires_grad_(False), family), some_tokens()
    acts = lm.capture(tokens, lm.hooks())
    assert {p for p in LAYER_POINTS if f"blocks.1.{p}" not in acts} == missing
    added = acts["blocks.1.attn_out_post"] + acts["blocks.1.mlp_out_post"]
    torch.testing.assert_close(acts["blocks.1.resid_pre"] + added, acts["blocks.1.resid_post"], **CLOSE)
    for point, out in (("z", "attn_out"), ("mlp_act", "mlp_out")):
        if point not in missing:
            path = lm.hook(f"blocks.1.{point}").read.path
            project = lm.model.get_submodule(path)
            expected = acts[f"blocks.1.{point}"] @ project.weight.T + (0 if project.bias is None else project.bias)
            torch.testing.assert_close(expected, acts[f"blocks.1.{out}"], atol=1e-4, rtol=1e-4)
    for hook in [h for h in lm.hooks() if h.startswith("blocks.1.")]:
        new = torch.randn(acts[hook].shape, generator=torch.Generator().manual_seed(5))
        found = lm.run(tokens, {hook: lambda _, new=new: new}, capture=[hook]).activations[hook]
        torch.testing.assert_close(found, new, **CLOSE)
