"""TransformerLens' own activations against ours on the same weights, under its hook names, to 1e-4.

What its folding and centring change is compared with the view that offers the changed tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lm.lens_models import hf_model
from unmix.core.errors import ModelError
from unmix.lm import LanguageModel

HERE = Path(__file__).parent / "transformer_lens"
RECORDED = sorted(path.stem for path in HERE.glob("*_*.safetensors") if path.stem not in ("gpt_neox",))
PLAIN = [name for name in RECORDED if name.endswith(("_bridge", "_hooked"))]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
STREAM = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
# Positions are a table of their own in GPT-2 and OPT: no point, but a module.
NO_POINT = (
    "pos_embed",
    "q_norm",
    "k_norm",
    "hook_v",
    "hook_unembed",
    "unembed.hook_out",
    "mlp.hook_pre",
    "mlp.in.",
    "mlp.gate.",
    "rotary_emb",
)


def family_of(name: str) -> str:
    return next(f for f in sorted((p.stem for p in HERE.glob("*.safetensors")), key=len) if name.startswith(f + "_"))


def ours(family: str) -> LanguageModel:
    model = hf_model(family)
    model.load_state_dict(load_file(HERE / f"{family}.safetensors"), strict=False)
    return LanguageModel(model, family)


def recorded(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(HERE / f"{name}.safetensors", "pt") as file:
        said = json.loads(file.metadata()["recorded"])
    return load_file(HERE / f"{name}.safetensors"), said


def activations(name: str) -> dict[str, torch.Tensor]:
    found = recorded(name)[0]
    return {
        hook: x.flatten(-2) if hook.endswith(("hook_z", "attn.o.hook_in")) else x
        for hook, x in found.items()
        if hook not in ("tokens", "logits") and not any(part in hook for part in NO_POINT)
    }


@pytest.mark.parametrize("name", PLAIN)
def test_without_folding_its_names_are_our_tensors(name: str) -> None:
    lm, theirs = ours(family_of(name)), activations(name)
    if family_of(name) in ("gpt_neox", "phi"):
        # Blocks that run side by side have no stream between: its `ln2.hook_in` is there the block's input.
        with pytest.raises(ModelError, match="side by side"):
            lm.hook("blocks.1.ln2.hook_in")
        theirs.pop("blocks.1.ln2.hook_in", None)
    tokens = recorded(name)[0]["tokens"]
    found = lm.capture(tokens, list(theirs))
    for hook, x in theirs.items():
        torch.testing.assert_close(found[hook], x, **CLOSE, msg=lambda m, h=hook: f"{h}: {m}")
    torch.testing.assert_close(lm.logits(tokens), recorded(name)[0]["logits"], **CLOSE)
    assert len(theirs) >= 8


def folded(hook: str, centred: bool, value_bias: bool) -> str:
    """The view of ours that TransformerLens' processed model shows under `hook`."""
    last = hook.rpartition(".")[2]
    if hook.endswith(("attn.hook_z", "attn.o.hook_in")) and value_bias:
        return f"{hook}~unbiased"
    if hook.endswith(("ln1.hook_out", "ln2.hook_out", "ln_final.hook_out", "attn.hook_in", "mlp.hook_in")):
        return f"{hook}~normalised"
    if hook == "unembed.hook_in":
        return f"{hook}~normalised"
    adds = ("attn.hook_out", "mlp.hook_out", "attn.o.hook_out", "mlp.out.hook_out", "embed.hook_out")
    stream = (*adds, "ln1.hook_in", "ln2.hook_in", "ln_final.hook_in", "blocks.1.hook_in", "blocks.1.hook_out")
    if centred and (last in STREAM or hook.endswith(stream)):
        return f"{hook}~centred"
    return hook


@pytest.mark.parametrize(
    ("name", "centred", "value_bias"),
    [
        ("gpt2_hooked_processed", True, True),
        ("opt_hooked_processed", True, True),
        ("qwen2_hooked_processed", False, True),
        ("gpt2_hooked_openai", False, True),
        ("gpt2_bridge_compatible", True, True),
        ("gemma2_bridge_compatible", False, False),
    ],
)
def test_with_folding_its_tensors_are_our_views(name: str, centred: bool, value_bias: bool) -> None:
    lm, theirs = ours(family_of(name)), activations(name)
    tokens = recorded(name)[0]["tokens"]
    views = {hook: folded(hook, centred, value_bias) for hook in theirs}
    found = lm.capture(tokens, list(dict.fromkeys(views.values())))
    for hook, view in views.items():
        torch.testing.assert_close(found[view], theirs[hook], **CLOSE, msg=lambda m, h=hook: f"{h}: {m}")
    changed = {hook for hook, view in views.items() if "~" in view}
    plain = lm.capture(tokens, sorted(changed))
    for hook in changed:
        assert not torch.allclose(plain[hook], theirs[hook], atol=1e-2), hook


def test_openais_locations_are_the_tensors_of_its_own_example() -> None:
    """Its README takes GPT-2 with `center_writing_weights=False` and the rest of the defaults."""
    lm, theirs = ours("gpt2"), activations("gpt2_hooked_openai")
    tokens = recorded("gpt2_hooked_openai")[0]["tokens"]
    example = {
        "mlp_post_act": "mlp.hook_post", "resid_delta_attn": "hook_attn_out", "resid_post_attn": "hook_resid_mid",
        "resid_delta_mlp": "hook_mlp_out", "resid_post_mlp": "hook_resid_post",
    }  # fmt: skip
    for location, hook in example.items():
        for spelled in (f"{location}.1", f"{location}_v5_32k/1", f"{location}_v5_32k/autoencoders/1.pt"):
            found = lm.capture(tokens, spelled)[spelled]
            torch.testing.assert_close(found, theirs[f"blocks.1.{hook}"], **CLOSE)


def test_versions_of_both_kinds_are_recorded() -> None:
    versions = {recorded(name)[1]["version"] for name in RECORDED}
    assert {v.split(".")[0] for v in versions} == {"3", "4"}
