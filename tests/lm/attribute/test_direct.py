"""Direct logits: the norm's linear form is the norm, and what it says is what happens to the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lm.fakes import EVERYWHERE, LinearCoder, topk_coder
from lm.families import CONFIGS, raw_model, some_tokens, tiny
from unmix.coder import CoderConfig, SparseCoder
from unmix.coder.config import Normalise, TopK
from unmix.core.errors import ConfigError, ModelError
from unmix.lm import LanguageModel
from unmix.lm.attribute.direct import direct_logits, latent_rows
from unmix.lm.attribute.readout import Readout
from unmix.lm.norms import linear_norm

TOKENS = some_tokens(1, 6)
CLOSE = {"atol": 2e-4, "rtol": 2e-3}


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_readout_is_the_models_own_at_the_scale_of_a_position(family: str) -> None:
    """Σ of parts of the stream, each through the linear map, + what a stream of nothing gives = the logits."""
    lm = tiny(family)
    x = lm.capture(TOKENS, [lm.last_hook])[lm.last_hook][0]
    readout = Readout(lm)
    scale: Any = 1.0
    if readout.final is not None:
        scale = readout.final.scale(lm.points.last_norm, x)  # type: ignore[arg-type]
    half = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    parts = readout.logits(half, scale) + readout.logits(x - half, scale)
    constant = readout.head(readout.final.bias[None]) if readout.final is not None else 0.0
    bias = getattr(lm.points.arch.lm_head, "bias", None)
    whole = parts + constant + (0.0 if bias is None else bias)
    if readout.cap is not None:
        whole = torch.tanh(whole / readout.cap) * readout.cap
    torch.testing.assert_close(whole, lm.unembed(x), **CLOSE)


def test_without_a_final_norm_direct_logits_are_the_change_of_the_logits() -> None:
    """OPT-350m has no norm at the end: adding latents to its last stream moves the logits by exactly this."""
    lm = tiny("opt_350m")
    hook = "blocks.2.resid_post"
    coder = topk_coder(hook, 16)
    found = direct_logits(lm, coder, [3, 7])
    before = lm.logits(TOKENS)
    for row, latent in enumerate((3, 7)):
        after = lm.spliced_logits(TOKENS, {hook: lambda x, i=latent: x + coder.W_dec[i].detach()})
        torch.testing.assert_close(after - before, found.logits[row].expand_as(before), atol=1e-4, rtol=1e-4)
    assert found.scale == "left out"


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma2", "gemma3", "olmo2", "granite", "cohere", "gpt_neox", "opt"]
)
@pytest.mark.parametrize(
    "point", ["resid_post", "mlp_out", "mlp_out_post", "attn_out", "attn_out_post", "z", "mlp_act"]
)
def test_a_small_step_moves_the_logits_as_said(family: str, point: str) -> None:
    """A step along the latent's own direction at the last layer, with the norms' scales held by hand."""
    lm = LanguageModel(raw_model(family).double().requires_grad_(False), family)
    hook = f"blocks.2.{point}"
    width = lm.width(hook)
    coder = topk_coder(hook, width).double()
    x = lm.capture(TOKENS, [lm.last_hook])[lm.last_hook]
    row = coder.W_dec[5].detach()
    found = direct_logits(lm, coder, 5, at=TOKENS, position=4).logits[0]
    # What reaches the stream, by a small step; its own norm's scale moves too, so take that part away by symmetry.
    readout = Readout(lm)
    added = readout.to_stream(hook, row[None], _inner_scale(readout, hook))[0]
    norm = lm.points.last_norm
    assert norm is not None and readout.final is not None
    expected = readout.head(readout.final.apply(added, readout.final.scale(norm, x[0, 4]))[None])[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    if readout.inner_norm(hook)[0] is None:
        # No norm on the way: the stream moves by exactly that.
        edits = {hook: lambda v: torch.cat([v[:, :4], v[:, 4:5] + 0.01 * row, v[:, 5:]], dim=1)}
        moved = lm.run(TOKENS, edits, capture=[lm.last_hook], logits=False).activations[lm.last_hook]
        if point != "attn_out" and point != "attn_out_post" and point != "z":
            torch.testing.assert_close((moved - x)[0, 4].float() / 0.01, added, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "opt_350m"])
@pytest.mark.parametrize("point", ["mlp_out", "mlp_act", "attn_out", "z"])
def test_what_reaches_the_stream_is_what_the_block_adds(family: str, point: str) -> None:
    """Two positions' activations, each at the scale of its own norm: they differ by what their contributions do."""
    lm, readout = tiny(family), Readout(tiny(family))
    added = "attn_out_post" if point in ("z", "attn_out") else "mlp_out_post"
    raw = {"z": "attn_out", "mlp_act": "mlp_out"}.get(point, point)
    names = [f"blocks.1.{p}" for p in dict.fromkeys((point, raw, added))]
    found = {name.rsplit(".", 1)[1]: x[0] for name, x in lm.capture(TOKENS, names).items()}
    norm, _ = readout.inner_norm(names[0])
    scale: Any = 1.0 if norm is None else linear_norm(norm, 16).scale(norm, found[raw])
    given = readout.to_stream(names[0], found[point], scale)
    torch.testing.assert_close(given[1:] - given[:1], found[added][1:] - found[added][:1], **CLOSE)


def _inner_scale(readout: Readout, hook: str) -> Any:
    norm, _ = readout.inner_norm(hook)
    if norm is None:
        return 1.0
    raw = {"z": "attn_out", "mlp_act": "mlp_out"}.get(hook.rsplit(".", 1)[1], hook.rsplit(".", 1)[1])
    x = readout.lm.capture(TOKENS, [f"blocks.2.{raw}"])[f"blocks.2.{raw}"]
    return linear_norm(norm, 16).scale(norm, x[:, 4])


def test_scales_are_left_out_taken_or_averaged() -> None:
    lm, coder = tiny("llama"), topk_coder("blocks.1.resid_post", 16)
    plain, there, mean = (
        direct_logits(lm, coder, [1, 2], **options) for options in ({}, {"at": TOKENS, "position": 3}, {"at": TOKENS})
    )
    assert (plain.scale, there.scale, mean.scale) == ("left out", "at position 3", "means over 5 positions")
    for other in (there, mean):
        ratio = plain.logits / other.logits
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3, atol=0)
    x = lm.capture(TOKENS, [lm.last_hook])[lm.last_hook][0, 3]
    factor = plain.logits[0, 0] / there.logits[0, 0]
    torch.testing.assert_close(factor, (x.square().mean() + lm.model.config.rms_norm_eps).sqrt(), rtol=1e-3, atol=0)


def test_one_head_of_z_and_a_coder_of_many_writes() -> None:
    lm = tiny("llama")
    whole = LinearCoder("blocks.2.z", 16, latents=4)
    part = LinearCoder("blocks.2.z#1", 4, latents=4)
    with torch.no_grad():
        whole.V.zero_()
        whole.V[:, 4:8] = part.V
    torch.testing.assert_close(direct_logits(lm, part, 2).logits, direct_logits(lm, whole, 2).logits)
    both = LinearCoder("blocks.1.resid_pre", 16, ("blocks.1.mlp_out", "blocks.2.mlp_out"), d_out=32)
    one = LinearCoder("blocks.1.resid_pre", 16, ("blocks.1.mlp_out",))
    with torch.no_grad():
        one.V.copy_(both.V[:, :16] + both.V[:, 16:])
    torch.testing.assert_close(direct_logits(lm, both, 3).logits, direct_logits(lm, one, 3).logits, **CLOSE)


def test_units_of_a_coder_that_normalises() -> None:
    lm = tiny("gpt2")
    config = CoderConfig(
        reads=("blocks.2.resid_post",), d_in=16, n_latents=24, activation=TopK(k=4), input_policy=EVERYWHERE,
        normalise=Normalise(kind="layer_norm"), output_scale=3.0,
    )  # fmt: skip
    coder = SparseCoder(config, seed=1)
    torch.testing.assert_close(latent_rows(coder, [4])[0], 3.0 * coder.W_dec[4].detach())
    x = lm.capture(TOKENS, ["blocks.2.resid_post"])["blocks.2.resid_post"][0, 3]
    there = direct_logits(lm, coder, 4, at=TOKENS, position=3).logits
    plain = direct_logits(lm, coder, 4).logits
    scale = Readout(lm).final.scale(lm.points.last_norm, x)  # type: ignore[union-attr,arg-type]
    torch.testing.assert_close(there, plain * x.std() / scale, rtol=1e-3, atol=1e-4)


def test_top_bottom_and_shape() -> None:
    lm, coder = tiny("llama"), topk_coder("blocks.1.resid_post", 16)
    found = direct_logits(lm, coder, [1, 2])
    top, bottom = found.top(3), found.bottom(3)
    assert [t.token for t in top[0]] == found.logits[0].topk(3).indices.tolist()
    assert [t.token for t in bottom[1]] == (-found.logits[1]).topk(3).indices.tolist()
    assert top[0][0].string == f"[{top[0][0].token}]"
    x = found.logits[0].double()
    shape = found.statistics()
    z = (x - x.mean()) / x.std(correction=0)
    assert float(shape["skewness"][0]) == pytest.approx(float((z**3).mean()))
    assert float(shape["kurtosis"][0]) == pytest.approx(float((z**4).mean()))


@pytest.mark.parametrize(
    ("family", "hook", "options", "says"),
    [
        ("llama", "blocks.1.mlp_in", {}, "nothing goes from here to the logits without a nonlinear step"),
        ("opt_350m", "blocks.1.mlp_out", {}, "this family norms the stream itself after every sublayer"),
        ("llama", "blocks.1.resid_post", {"position": 1}, "position is a place in `at`"),
        ("llama", "blocks.1.resid_post", {"position": 9, "at": TOKENS}, "position 9: the prompt has 6 tokens"),
    ],
)
def test_what_has_no_direct_logits(family: str, hook: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises((ModelError, ConfigError), match=says):
        direct_logits(tiny(family), topk_coder(hook, 16), 1, **options)


def test_a_latent_out_of_range() -> None:
    with pytest.raises(ModelError, match=r"latent 24: coder 'blocks\.1\.resid_post' has latents 0 to 23"):
        direct_logits(tiny("llama"), topk_coder("blocks.1.resid_post", 16), [3, 24])
