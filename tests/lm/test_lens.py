"""TransformerLens models bind by their own hook names and by ours: on stand-ins, and live where the package is.

The live half ran with transformer-lens 3.9.0 and 4.3.0; what those versions compute is also recorded in
`tests/parity/transformer_lens`.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import unmix
from unmix.core.errors import ModelError
from unmix.core.policy import ModelFingerprint
from unmix.lm import LanguageModel
from unmix.lm.points import LAYER_POINTS

from .fakes import LinearCoder, topk_coder
from .families import some_tokens
from .lens_models import bridge, hf_model, hooked
from .tiny_lens import VOCAB, D, TinyLens

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TOKENS = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
BOTH = pytest.mark.parametrize("kind", ["hooked", "bridge"])


def standin(kind: str) -> tuple[TinyLens, LanguageModel]:
    model = TinyLens(kind == "hooked").requires_grad_(False)
    return model, unmix.load_model(model)


@BOTH
def test_its_sizes_name_and_logits(kind: str) -> None:
    model, lm = standin(kind)
    assert repr(lm) == f"LanguageModel('tiny-lens', 2 layers, d_model {D}, float32 on cpu)"
    assert (lm.vocab_size, lm.max_context, lm.takes_tokens, lm.is_transformers) == (VOCAB, 16, True, False)
    assert lm.fingerprint == ModelFingerprint(
        name="tiny-lens", family="gpt2", n_layers=2, d_model=D, vocab_size=VOCAB, weights_hash=None
    )
    assert torch.equal(lm.logits(TOKENS), model(TOKENS))
    last = lm.capture(TOKENS, lm.last_hook)[lm.last_hook]
    torch.testing.assert_close(lm.unembed(last), model(TOKENS))
    assert lm.unembedding.shape == (VOCAB, D)
    assert lm.ends_in_stream(["blocks.1.resid_post"])
    with pytest.raises(ModelError, match="token id 30: tiny-lens has ids 0 to 29"):
        lm.capture(torch.tensor([[30]]), "blocks.0.resid_pre")


@BOTH
def test_its_own_names(kind: str) -> None:
    model, lm = standin(kind)
    for name, value in model.cache(TOKENS).items():
        found = lm.capture(TOKENS, name)[name]
        torch.testing.assert_close(found, value.flatten(-2) if name.endswith("hook_z") else value)


@BOTH
def test_our_names_are_the_same_tensors(kind: str) -> None:
    model, lm = standin(kind)
    assert {name.rpartition(".")[2] for name in lm.hooks()} == {*LAYER_POINTS, "embeddings", "final_norm"}
    acts = lm.capture(TOKENS, lm.hooks())
    for layer, block in enumerate(model.blocks):
        a = {point: acts[f"blocks.{layer}.{point}"] for point in LAYER_POINTS}
        torch.testing.assert_close(a["resid_pre"] + a["attn_out_post"], a["resid_mid"])
        torch.testing.assert_close(a["resid_mid"] + a["mlp_out_post"], a["resid_post"])
        torch.testing.assert_close(block.ln1(a["resid_pre"]), a["attn_in"])
        torch.testing.assert_close(block.ln2(a["resid_mid"]), a["mlp_in"])
        torch.testing.assert_close(a["z"] @ block.attn.W_O.flatten(0, 1), a["attn_out"])
        torch.testing.assert_close((a["mlp_in"] @ block.mlp.W_in).relu(), a["mlp_act"])
        torch.testing.assert_close(a["mlp_act"] @ block.mlp.W_out, a["mlp_out"])
    assert lm.width("blocks.1.z") == D
    assert lm.hook("layers.1").name == lm.hook("blocks.1.hook_resid_post").name == "blocks.1.resid_post"


@BOTH
def test_what_is_written_is_read_there(kind: str) -> None:
    _, lm = standin(kind)
    shapes = lm.capture(TOKENS, lm.hooks())
    for name in lm.hooks():
        new = torch.randn(shapes[name].shape, generator=torch.Generator().manual_seed(3))
        out = lm.run(TOKENS, {name: lambda _, new=new: new}, capture=[name])
        torch.testing.assert_close(out.activations[name], new, **CLOSE)
        assert out.logits is not None and not torch.allclose(out.logits, lm.logits(TOKENS), atol=1e-3)
    mid = ["blocks.0.resid_mid", "blocks.0.mlp_out_post", "blocks.0.resid_post"]
    acts = lm.run(TOKENS, {mid[0]: lambda x: x * 2 + 1}, capture=mid).activations
    torch.testing.assert_close(acts[mid[0]] + acts[mid[1]], acts[mid[2]], **CLOSE)


@BOTH
def test_heads_and_views(kind: str) -> None:
    model, lm = standin(kind)
    acts = lm.capture(
        TOKENS, ["blocks.1.z", "blocks.1.z#2", "blocks.1.mlp_in~normalised", "blocks.1.resid_pre~centred"]
    )
    assert torch.equal(acts["blocks.1.z#2"], acts["blocks.1.z"][..., 8:])
    assert float(acts["blocks.1.resid_pre~centred"].mean(dim=-1).abs().max()) < 1e-6
    torch.testing.assert_close(acts["blocks.1.mlp_in~normalised"], model.cache(TOKENS)["blocks.1.ln2.hook_normalized"])
    whole = acts["blocks.1.z"].clone()
    whole[..., 8:] = 0
    expected = lm.spliced_logits(TOKENS, {"blocks.1.z": lambda _: whole})
    torch.testing.assert_close(lm.spliced_logits(TOKENS, {"blocks.1.z#2": torch.zeros_like}), expected)


@BOTH
def test_coders_bind(kind: str) -> None:
    _, lm = standin(kind)
    by_ours, by_theirs = topk_coder("blocks.0.resid_post", D), topk_coder("blocks.0.hook_resid_post", D)
    by_theirs.load_state_dict(by_ours.state_dict())
    with torch.no_grad(), lm.bind(by_ours) as bound:
        one = bound(TOKENS)
    with torch.no_grad(), lm.bind(by_theirs) as bound:
        assert torch.equal(one.logits, bound(TOKENS).logits)
    assert not torch.allclose(one.logits, lm.logits(TOKENS), atol=1e-3)
    with lm.bind(LinearCoder("blocks.1.attn.hook_z", D)) as bound:
        bound(TOKENS).logits.sum().backward()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("blocks.2.resid_post", "there is no layer 2; this model has layers 0 to 1"),
        ("blocks.1.hook_resid_pots", r"unknown hook 'blocks\.1\.hook_resid_pots'\. Nearest: blocks\.1\.resid_post"),
        ("blocks.1.z~unbiased", "fold_value_biases says which z it has"),
        ("blocks.1.resid_pre~normalised", "only what comes out of a norm has a normalised view"),
        ("blocks.1.z~whatever", "no view 'whatever'"),
        ("blocks.1.mlp_in~centred", "only the stream and what is added to it are centred"),
    ],
)
def test_names_that_do_not_fit(spec: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        standin("hooked")[1].hook(spec)


def test_parallel_blocks_have_no_stream_between() -> None:
    model = TinyLens(hooked=False)
    model.cfg.parallel_attn_mlp = True
    lm = LanguageModel(model, "parallel")
    with pytest.raises(ModelError, match=r"blocks\.1\.resid_mid: attention and MLP run side by side"):
        lm.hook("blocks.1.resid_mid")
    assert lm.hook("blocks.1.ln2.hook_in").name == "blocks.1.ln2.hook_in@out"  # its own hook still is one


# live ------------------------------------------------------------------------------------------------------------

HAVE = importlib.util.find_spec("transformer_lens") is not None
LIVE = pytest.mark.skipif(not HAVE, reason="transformer-lens is not installed (extra `tl`)")
HOOKED = HAVE and int(version("transformer-lens").partition(".")[0]) < 4
OLD = pytest.mark.skipif(not HOOKED, reason="HookedTransformer is in transformer-lens up to 3.x")
QUIET = pytest.mark.filterwarnings("ignore")


def compare(model: Any, family: str) -> None:
    """Its run_with_cache, our capture on it, and our capture on the Hugging Face model."""
    tokens = some_tokens(2, 6)
    lm, bare = unmix.load_model(model), LanguageModel(hf_model(family), family)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(lm.logits(tokens), logits, **CLOSE)
    torch.testing.assert_close(bare.logits(tokens), logits, atol=1e-4, rtol=1e-4)
    assert lm.fingerprint.family == bare.fingerprint.family
    assert lm.hooks() == bare.hooks()
    ours, theirs = lm.capture(tokens, lm.hooks()), bare.capture(tokens, bare.hooks())
    for name in lm.hooks():
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post"):
        found = lm.capture(tokens, name)[name]
        torch.testing.assert_close(found, cache[name].reshape(found.shape), **CLOSE)
    coder = topk_coder("blocks.1.hook_mlp_out", lm.d_model)
    with torch.no_grad(), lm.bind(coder) as bound, bare.bind(coder) as plain:
        torch.testing.assert_close(bound(tokens).logits, plain(tokens).logits, atol=1e-3, rtol=1e-3)


@LIVE
@QUIET
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "opt"])
def test_live_bridge(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    compare(bridge(family, tmp_path / "model"), family)


@LIVE
@OLD
@QUIET
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2"])
def test_live_hooked_transformer(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    compare(hooked(family, tmp_path / "model"), family)
