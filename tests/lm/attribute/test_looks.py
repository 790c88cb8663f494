"""Jacobian lens, token sets, neighbours, ablation over contexts, heads and sources: against cases known by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lm.fakes import EVERYWHERE, LinearCoder, topk_coder
from lm.families import CONFIGS, raw_model, some_tokens, tiny
from unmix.coder import CoderConfig, SparseCoder
from unmix.coder.config import Normalise, TopK
from unmix.core.errors import ConfigError, CorruptError, ModelError
from unmix.core.manifest import verify_folder
from unmix.core.policy import InputPolicy
from unmix.lm import LanguageModel, Set
from unmix.lm.attribute.ablation import ablation_effect
from unmix.lm.attribute.direct import LatentLogits, direct_logits
from unmix.lm.attribute.enrichment import as_token_set, token_set_enrichment, token_sets
from unmix.lm.attribute.heads import head_sources
from unmix.lm.attribute.jacobian import JacobianLens, _deal, fit_jacobian
from unmix.lm.attribute.neighbours import decoder_neighbours

TOKENS = some_tokens(3, 7)


def jacobian_by_hand(lm: LanguageModel, hook: str, tokens: torch.Tensor) -> torch.Tensor:
    """∂ h_last[t', i] / ∂ h[t, j] of one context [t', i, t, j]."""
    x = lm.capture(tokens, [hook])[hook]

    def end(h: torch.Tensor) -> torch.Tensor:
        return lm.run(tokens, {hook: lambda _: h}, capture=[lm.last_hook], logits=False).activations[lm.last_hook][0]

    return torch.autograd.functional.jacobian(end, x)[:, :, 0]


@pytest.mark.parametrize("hook", ["blocks.0.resid_post", "blocks.1.mlp_out"])
def test_the_lens_is_the_mean_jacobian(hook: str) -> None:
    lm = tiny("llama")
    fitted = fit_jacobian(lm, hook, TOKENS, InputPolicy(bos="none", skip_first=2), batch=2, passes=None)
    whole = [jacobian_by_hand(lm, hook, TOKENS[i : i + 1]) for i in range(3)]
    expected = torch.stack([j.sum(0)[:, 2:].mean(1) for j in whole]).mean(0)
    torch.testing.assert_close(fitted.jacobian, expected, atol=1e-4, rtol=1e-3)
    assert fitted.tokens == 15


def test_the_lens_at_the_same_position_needs_no_more_passes() -> None:
    lm = tiny("llama")
    tokens = some_tokens(400, 3)
    fitted = fit_jacobian(lm, "blocks.1.resid_post", tokens, EVERYWHERE, batch=100, passes=None, targets="same")
    own = torch.stack([
        torch.stack([j[t, :, t] for t in range(3)]).mean(0)
        for j in (jacobian_by_hand(lm, "blocks.1.resid_post", tokens[i : i + 1]) for i in range(0, 400, 10))
    ]).mean(0)  # fmt: skip
    later = fit_jacobian(lm, "blocks.1.resid_post", tokens, EVERYWHERE, batch=100, passes=None)
    assert float((fitted.jacobian - own).norm()) < 0.5 * float((later.jacobian - own).norm())


@pytest.mark.parametrize(("contexts", "passes"), [(40, 1), (5, 2), (7, 3)])
def test_rows_dealt_out_over_the_text(contexts: int, passes: int) -> None:
    """On copies of one context every batch gives the same rows; each is done in as many batches as was asked."""
    lm, tokens = tiny("gpt2"), TOKENS[:1].expand(contexts, -1)
    some = fit_jacobian(lm, "blocks.1.resid_post", tokens, EVERYWHERE, passes=passes)
    every = fit_jacobian(lm, "blocks.1.resid_post", TOKENS[:1], EVERYWHERE)
    torch.testing.assert_close(some.jacobian, every.jacobian, atol=1e-5, rtol=1e-4)
    assert some.tokens == 7 * passes
    dealt = _deal(16, contexts, passes, torch.Generator())
    assert torch.cat(dealt).bincount(minlength=16).tolist() == [passes] * 16
    assert max(map(len, dealt)) <= -(-16 * passes // contexts) + passes


def test_a_lens_is_a_second_read_out(tmp_path: Path) -> None:
    lm = tiny("llama")
    fitted = fit_jacobian(lm, "layers.1", TOKENS, EVERYWHERE, passes=None)
    coder = topk_coder("blocks.1.resid_post", 16)
    with_lens, without = direct_logits(lm, coder, [1, 4], lens=fitted), direct_logits(lm, coder, [1, 4])
    assert not torch.allclose(with_lens.logits, without.logits, atol=1e-2)
    moved = topk_coder("blocks.2.resid_post", 16)
    with torch.no_grad():
        moved.W_dec.copy_(coder.W_dec @ fitted.jacobian.T)
    torch.testing.assert_close(with_lens.logits, direct_logits(lm, moved, [1, 4]).logits, atol=1e-3, rtol=1e-3)
    fitted.save(tmp_path / "lens")
    again = JacobianLens.load(tmp_path / "lens")
    assert torch.equal(again.jacobian, fitted.jacobian) and again.hook == "blocks.1.resid_post"
    assert (again.tokens, again.targets) == (21, "later") and again.model == lm.fingerprint
    again.check(lm)
    assert verify_folder(tmp_path / "lens") == []
    with pytest.raises(ModelError, match="the lens was fitted on tiny-llama"):
        again.check(tiny("gpt2"))
    with pytest.raises(ModelError, match=r"the lens was fitted at blocks\.1\.resid_post, the coder writes blocks\.0"):
        direct_logits(lm, topk_coder("blocks.0.resid_post", 16), 1, lens=again)
    (tmp_path / "lens" / "lens.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptError):
        JacobianLens.load(tmp_path / "lens")


@pytest.mark.parametrize(
    ("hook", "options", "says"),
    [
        ("blocks.2.resid_post", {}, "there are no blocks after this"),
        ("blocks.1.resid_post", {"targets": "all"}, "targets is 'all'; allowed: later, same"),
        ("blocks.1.resid_post", {"passes": 0}, "passes and batch must be at least 1, found 0 and 1"),
        ("blocks.9.resid_post", {}, "there is no layer 9"),
    ],
)
def test_lenses_that_cannot_be_fitted(hook: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises((ModelError, ConfigError), match=says):
        fit_jacobian(tiny("llama"), hook, TOKENS, EVERYWHERE, **options)


# token sets ------------------------------------------------------------------------------------------------------


def test_enrichment_by_hand() -> None:
    """Logits 0…9: {7, 8, 9} beats every pair, {0, 9} half of them; ranks with a tie share their mean."""
    logits = LatentLogits((5, 6), torch.stack([torch.arange(10.0), torch.tensor([0.0] * 9 + [1.0])]), "left out", None)
    found = {(row.latent, row.name): row for row in token_set_enrichment(logits, {"high": [7, 8, 9], "ends": [0, 9]})}
    assert found[5, "high"].auc == 1.0 and found[5, "ends"].auc == 0.5
    # u = 21, mean 10.5, variance 3·7·11/12
    assert found[5, "high"].z == pytest.approx(10.5 / (3 * 7 * 11 / 12) ** 0.5)
    assert found[5, "high"].p == pytest.approx(0.0167, abs=2e-4)
    assert found[5, "ends"].z == 0 and found[5, "ends"].p == 1
    # Two groups of one value each: 21 pairs, 2·7 of them ties at zero, 7 wins.
    assert found[6, "high"].auc == pytest.approx((7 + 0.5 * 14) / 21)
    assert found[5, "high"].mean_difference == pytest.approx((8 - 3) / torch.arange(10.0).std().item())
    assert all(row.q >= row.p - 1e-12 for row in found.values())
    few = token_set_enrichment(logits, {"high": [7, 8]}, vocabulary=range(9))
    assert next(row.auc for row in few if row.latent == 5) == 1.0
    with pytest.raises(ConfigError, match="token set 'all': 10 tokens inside and 0 outside"):
        token_set_enrichment(logits, {"all": range(10)})


def test_token_sets_of_a_tokenizer(tiny_tokenizer: Any) -> None:
    lm = LanguageModel(raw_model("llama", vocab_size=512), "with-words", tiny_tokenizer)
    sets = token_sets(lm)
    names = {name: lm.token_strings(ids) for name, ids in sets.items()}
    assert all(text.startswith(" ") for text in names["begins a word"])
    assert all(text.strip().isdigit() for text in names["digits"])
    assert "," in names["punctuation"]
    ids = as_token_set(lm, ["the", "of"])
    assert " the" in lm.token_strings(ids)
    with pytest.raises(ModelError, match="none of 'Zanzibar' is one token"):
        as_token_set(lm, ["Zanzibar"])


def test_neighbours_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    coder = topk_coder("layers.1", 16, latents=40)
    with torch.no_grad():
        coder.W_dec[9] = 3 * coder.W_dec[2] + 0.01 * coder.W_dec[3]
        coder.W_dec[11].zero_()
    whole = coder.dictionary @ coder.dictionary.T
    monkeypatch.setattr("unmix.lm.attribute.neighbours._BLOCK", 7)
    (found,) = decoder_neighbours(coder, 2, 5)
    assert found[0].latent == 9 and found[0].cosine > 0.999
    masked = whole[2].clone()
    masked[2] = -2
    assert [n.latent for n in found] == masked.topk(5).indices.tolist()
    assert len(decoder_neighbours(coder, [1, 2], 100)[0]) == 39
    other = decoder_neighbours(coder, 2, 3, other=coder)[0]
    assert other[0].latent == 2 and other[0].cosine == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="their decoder rows have no cosine"):
        decoder_neighbours(coder, 1, other=topk_coder("layers.1", 8))


# ablation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["blocks.1.resid_post", "blocks.1.mlp_out"])
def test_ablation_over_contexts_is_the_intervention(hook: str) -> None:
    lm = tiny("gemma2")
    coder = topk_coder(hook, 16, input_policy=InputPolicy(bos="none", skip_first=1))
    with lm.bind(coder, error="keep") as bound, torch.no_grad():
        codes = bound(TOKENS).codes[hook].dense()
        latent = int((codes[:, 1:] != 0).sum((0, 1)).argmax())
        fires = codes[..., latent] != 0
        fires[:, 0] = False
        with_it = lm.logits(TOKENS).log_softmax(-1)
        without = bound(TOKENS, interventions=[Set(latent=latent, value=0.0)]).logits.log_softmax(-1)
    (found,) = ablation_effect(lm, coder, latent, TOKENS, batch=2, n=3)
    kl = (with_it.exp() * (with_it - without)).sum(-1)
    assert found.firings == int(fires.sum()) and found.contexts == 3
    assert found.kl == pytest.approx(float(kl[fires].mean()), rel=1e-3, abs=1e-6)
    after = (fires.long().cumsum(-1) > 0) & ~fires
    assert found.kl_after == pytest.approx(float(kl[after].mean()) if after.any() else 0.0, rel=1e-3, abs=1e-6)
    moved = (with_it - without)[fires].mean(0)
    assert [t.token for t in found.raised] == moved.topk(3).indices.tolist()
    assert found.lowered[0].difference == pytest.approx(float(moved.min()), rel=1e-3)
    known = fires.clone()
    known[:, -1] = False
    b, t = known.nonzero(as_tuple=True)
    gap = (with_it - without)[b, t, TOKENS[b, t + 1]]
    assert found.loss_increase == pytest.approx(float(gap.mean()) if len(gap) else 0.0, rel=1e-3, abs=1e-6)


def test_a_latent_that_never_fires_has_no_effect() -> None:
    coder = topk_coder("blocks.1.resid_post", 16)
    with torch.no_grad():
        coder.b_enc[3] = -1e4
    found = ablation_effect(tiny("llama"), coder, [3], TOKENS)[0]
    assert (found.firings, found.kl, found.raised, found.lowered) == (0, 0.0, [], [])


def test_documents_are_kept_apart_in_ablation() -> None:
    """A transcoder whose policy keeps documents apart runs, and gives finite figures."""
    policy = InputPolicy(bos="none", skip_first=0, attend_across=False)
    coder = LinearCoder("blocks.1.mlp_in", 16, "blocks.1.mlp_out", policy=policy)
    found = ablation_effect(tiny("llama"), coder, [0, 1], TOKENS)
    assert all(f.firings == 21 and f.kl > 0 for f in found)


# heads and sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "opt_350m"])
def test_heads_and_sources_add_up_to_the_pre_activation(family: str) -> None:
    lm = tiny(family)
    hook = "blocks.1.z"
    config = CoderConfig(
        reads=(hook,), d_in=lm.width(hook), n_latents=24, activation=TopK(k=4), input_policy=EVERYWHERE
    )
    coder = SparseCoder(config, seed=1)
    found = head_sources(lm, coder, 5, TOKENS[:1], position=4)
    z = lm.capture(TOKENS[:1], [hook])[hook][0, 4]
    assert float(found.contributions.sum()) == pytest.approx(float((z @ coder.W_enc[5]).detach()), rel=1e-3, abs=1e-4)
    assert found.pre_activation == pytest.approx(
        float((z @ coder.W_enc[5] + coder.b_enc[5]).detach()), rel=1e-3, abs=1e-4
    )
    # Nothing comes from later positions, and each head's share is its part of z.
    assert float(found.contributions[:, 5:].abs().max()) < 1e-6
    heads = found.contributions.shape[0]
    by_head = (z * coder.W_enc[5]).view(heads, -1).sum(-1).detach()
    torch.testing.assert_close(found.contributions.sum(-1), by_head, atol=1e-4, rtol=1e-3)
    head, source, token, value = found.top(1)[0]
    assert abs(value) == pytest.approx(float(found.contributions.abs().max()))
    assert token == f"[{int(TOKENS[0, source])}]" and head < heads


def test_the_pattern_is_attention() -> None:
    """Against transformers' own probabilities, in a copy of the model with eager attention."""
    from unmix.lm.attribute.heads import attention_at

    lm = tiny("llama")
    pattern, _, _ = attention_at(lm, 1, lm.hook("blocks.1.z"), TOKENS[:1], 5)
    eager = raw_model("llama")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(input_ids=TOKENS[:1], output_attentions=True).attentions[1][0, :, 5]
    torch.testing.assert_close(pattern, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm"])
def test_coders_that_normalise_and_have_biases(kind: Any) -> None:
    lm, hook = tiny("gpt2"), "blocks.1.z"
    config = CoderConfig(
        reads=(hook,), d_in=16, n_latents=24, activation=TopK(k=4), input_policy=EVERYWHERE, pre_bias="tied",
        normalise=Normalise(kind=kind), input_scale=2.0,
    )  # fmt: skip
    coder = SparseCoder(config, seed=1)
    with torch.no_grad():
        coder.b_dec.copy_(torch.randn(16))
        coder.b_enc.copy_(torch.randn(24))
    found = head_sources(lm, coder, 5, TOKENS[:1])
    z = lm.capture(TOKENS[:1], [hook])[hook][0, -1]
    _, pre = coder.encode(z[None], return_pre=True)
    assert found.pre_activation == pytest.approx(float(pre[0, 5].detach()), rel=1e-3)
    constant = float((coder.b_enc[5] - coder.W_enc[5] @ coder.b_dec).detach())
    assert found.rest == pytest.approx(constant, rel=1e-2, abs=1e-3)


def test_what_has_no_heads() -> None:
    with pytest.raises(ModelError, match=r"reads blocks\.1\.resid_post; DFA is of one z"):
        head_sources(tiny("llama"), topk_coder("blocks.1.resid_post", 16), 1, TOKENS[:1])
    with pytest.raises(ModelError, match="DFA takes one prompt"):
        head_sources(tiny("llama"), topk_coder("blocks.1.z", 16), 1, TOKENS)


def test_a_coder_that_writes_before_it_has_read_is_refused() -> None:
    lm = tiny("llama")
    hooks = ("blocks.0.resid_post", "blocks.1.resid_post")
    with pytest.raises(ModelError, match="before the model has reached"):
        ablation_effect(lm, LinearCoder(hooks, 32, hooks, d_out=32), [0], some_tokens(2, 6))
