"""Coders fitted in closed form to tiny random models: the right reading is good, and each wrong one names its cause."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lm.families import raw_model, some_tokens
from unmix.coder import CoderConfig, CoderSet, SparseCoder
from unmix.coder.config import BatchTopK, JumpReLU, Normalise, Temporal, TopK
from unmix.core.errors import ConfigError, ModelError
from unmix.core.policy import InputPolicy
from unmix.evaluate.sampling import context_of, sample_tokens
from unmix.evaluate.self_check import SelfCheck, self_check, self_check_set
from unmix.lm import LanguageModel, load_model
from unmix.train.session import at_hooks

TOKENS = some_tokens(16, 32)
RANK = 8
"""Of 16 directions: what is left out is the coder's FVU at its own hook, about 0.1 to 0.2."""
POLICY = InputPolicy(bos="none")


@functools.cache
def model(family: str) -> LanguageModel:
    """GPT-2's activations get a mean to be wrong about (Gemma-2 has two different MLP outputs)."""
    made = raw_model(family)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("mlp.c_proj.bias"):
                parameter.add_(1.0)
    return LanguageModel(made.requires_grad_(False), f"tiny-{family}")


def activations(lm: LanguageModel, hook: str) -> Tensor:
    """[rows, d] at the positions that count."""
    return lm.capture(TOKENS, [hook])[hook][:, 1:].flatten(0, 1).float()


def fitted(
    x: Tensor,
    hook: str,
    y: Tensor | None = None,
    write: str | None = None,
    norms: Tensor | None = None,
    threshold: Tensor | None = None,
    **changes: Any,
) -> SparseCoder:
    """± the main directions of `x`: z = ±P(x − b_pre), x̂ = Pᵀ… + mean; `norms` go from the codes into the decoder."""
    y = x if y is None else y
    centred = x - x.mean(0)
    P = torch.linalg.svd(centred, full_matrices=False).Vh[:RANK]
    # Of a transcoder: the least-squares map from the codes to what is written.
    out = P if y is x else torch.linalg.lstsq(centred @ P.T, y - y.mean(0)).solution
    norms = torch.ones(2 * RANK) if norms is None else norms
    options = {"pre_bias": "tied" if y is x else "own", "input_policy": POLICY, **changes}
    config = CoderConfig(
        reads=(hook,), writes=(write or hook,), d_in=x.shape[1], d_out=y.shape[1], n_latents=2 * RANK,
        activation=options.pop("activation", {"kind": "relu"}), **options,
    )  # fmt: skip
    state = {
        "W_enc": torch.cat([P, -P]) / norms[:, None],
        "b_enc": torch.zeros(2 * RANK),
        "W_dec": torch.cat([out, -out]) * norms[:, None],
        "b_dec": y.mean(0),
    }
    if config.pre_bias == "own":
        state["b_pre"] = x.mean(0)
    if config.pre_bias == "none":
        state["b_enc"] = -state["W_enc"] @ x.mean(0)
    if threshold is not None:
        state["threshold"] = threshold
    return SparseCoder.from_state(config, state)


def restated(coder: SparseCoder, **changes: Any) -> SparseCoder:
    """The same tensors under a config that says something else: a layout read wrongly."""
    config = CoderConfig.model_validate({**coder.config.model_dump(), **changes})
    return SparseCoder.from_state(config, coder.state_dict())


def check(coder: SparseCoder, family: str, **options: Any) -> SelfCheck:
    return self_check(coder, model(family), TOKENS, **options)


@functools.cache
def at(family: str, hook: str) -> SparseCoder:
    return fitted(activations(model(family), hook), hook)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_coder_read_rightly_agrees_and_nothing_else_is_measured(family: str) -> None:
    coder = at(family, "blocks.1.mlp_out_post")
    found = check(coder, family, published={"l0": RANK, "fvu": 0.1})
    assert found.agrees
    assert (found.others, found.causes, found.disagreements) == ((), (), ())
    assert found.tokens == 16 * 31
    assert found.stated.l0 == pytest.approx(RANK)
    x = activations(model(family), "blocks.1.mlp_out_post").double()
    centred = x - x.mean(0)
    left = torch.linalg.svdvals(centred)[RANK:].square().sum() / centred.square().sum()
    assert found.stated.fvu == pytest.approx(float(left), rel=1e-3)


def test_numbers_in_the_files_are_what_is_compared_with() -> None:
    told = restated(at("gpt2", "blocks.1.resid_post"), training={"published": {"l0": 2.0, "fvu": 0.2, "note": "x"}})
    found = check(told, "gpt2")
    assert found.published == {"l0": 2.0, "fvu": 0.2}
    assert found.disagreements == ("L0 is 8, published 2",)
    assert found.others, "other readings are looked for"
    assert found.causes == (), "none of which has an L0 of 2"


def test_fvu_far_above_the_published_one_disagrees() -> None:
    coder = at("gpt2", "blocks.1.resid_post")
    assert check(coder, "gpt2", published={"fvu": 0.01}).disagreements[0].startswith("FVU is 0.2")
    assert check(coder, "gpt2", published={"fvu": 0.6}).agrees, "better than published is no fault"


@pytest.mark.parametrize(
    ("family", "right", "stated"),
    [
        ("gpt2", "blocks.1.resid_post", "blocks.2.resid_post"),
        ("gpt2", "blocks.1.resid_post", "blocks.0.resid_post"),
        ("gpt2", "blocks.1.mlp_out", "blocks.1.resid_post"),
        ("gemma2", "blocks.1.mlp_out_post", "blocks.1.mlp_out"),
    ],
)
def test_a_wrong_hook_is_named_with_the_right_one(family: str, right: str, stated: str) -> None:
    coder = at_hooks(at(family, right), (stated,))
    found = check(coder, family)
    assert not found.agrees
    # GPT-2 adds its MLP's output to the stream as it is: there two names are one tensor.
    names = (right, f"{right}_post") if family == "gpt2" else (right,)
    assert found.causes[0].startswith(tuple(f"wrong hook: it fits {name}, not {stated} (then L0 8, " for name in names))
    assert found.others[0].reads[0] in names
    assert found.others[0].tokens == found.tokens, "what is named was measured on every row"


def test_without_a_published_fvu_a_much_better_hook_is_a_fault_too() -> None:
    """Where much of the stream passes a layer unchanged, a coder one layer off is not bad enough to stand out."""
    quiet = raw_model("gpt2")
    with torch.no_grad():
        for name, parameter in quiet.named_parameters():
            if ".1." in name and "c_proj" in name:
                parameter.mul_(1.0 if name.endswith("weight") else 0.3)
    lm = LanguageModel(quiet.requires_grad_(False), "quiet")
    x = lm.capture(TOKENS, ["blocks.0.resid_post"])["blocks.0.resid_post"][:, 1:].flatten(0, 1)
    coder = fitted(x, "blocks.0.resid_post")
    assert self_check(coder, lm, TOKENS).agrees
    off = at_hooks(coder, ("blocks.1.resid_post",))
    found = self_check(off, lm, TOKENS)
    assert found.stated.fvu < 0.7, "nothing says that this is bad"
    assert not found.agrees
    assert found.disagreements[0].endswith("at blocks.0.resid_post")
    assert found.causes[0].startswith("wrong hook: it fits blocks.0.resid_post, not blocks.1.resid_post")
    assert self_check(off, lm, TOKENS, {"fvu": found.stated.fvu}).agrees, "its publisher measured the same"


def test_the_search_reads_a_part_of_the_text_and_what_is_named_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from unmix.evaluate import self_check as room

    monkeypatch.setattr(room, "_SEARCH_TOKENS", 128)
    found = check(at_hooks(at("gpt2", "blocks.1.resid_post"), ("blocks.2.resid_post",)), "gpt2")
    assert found.causes
    named, rest = found.others[: len(found.causes)], found.others[len(found.causes) :]
    assert {r.tokens for r in named} == {16 * 31}
    assert {r.tokens for r in rest} == {4 * 31}


def test_one_tensor_under_two_names_is_measured_once() -> None:
    found = check(at("gpt2", "blocks.1.resid_post"), "gpt2", thorough=True)
    assert found.agrees
    assert found.causes == ()
    names = [r.reads[0] for r in found.others if r.steps == 1 and r.what.startswith("at ")]
    assert len(names) == len(set(names))
    assert "blocks.2.resid_pre" not in names, "that is blocks.1.resid_post"
    assert "blocks.0.resid_post" in names, "and not blocks.1.resid_pre, the same in another coder's words"
    assert "blocks.1.resid_pre" not in names
    before = at_hooks(at("gpt2", "blocks.1.resid_post"), ("blocks.1.resid_pre",))
    assert check(before, "gpt2").causes[0].startswith("wrong hook: it fits blocks.2.resid_pre, not blocks.1.resid_pre")
    assert not {"blocks.1.mlp_out", "blocks.1.mlp_out_post"} <= set(names)


def scaled_input() -> SparseCoder:
    x = activations(model("gpt2"), "blocks.1.resid_post")
    scale = 4.0 / float(x.norm(dim=-1).mean())
    return fitted(x * scale, "blocks.1.resid_post", input_scale=scale, output_scale=1 / scale)


def layer_normed() -> SparseCoder:
    x = activations(model("gpt2"), "blocks.1.resid_post")
    normed = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    return fitted(normed, "blocks.1.resid_post", normalise=Normalise(kind="layer_norm"))


def bias_subtracted(pre_bias: str) -> SparseCoder:
    coder = at("gpt2", "blocks.1.resid_post")
    moved = coder.W_enc.detach() @ coder.b_dec.detach()
    if pre_bias == "tied":
        return coder
    state = {**coder.state_dict(), "b_enc": coder.b_enc.detach() - moved}
    return SparseCoder.from_state(coder.config.model_copy(update={"pre_bias": "none"}), state)


def spread(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 2 * RANK)


def gated(space: str) -> SparseCoder:
    """Fires where the projection on a direction is above 0.15: of z·norm, or of z alone with thresholds to match."""
    norms = spread(0.05, 0.5)
    threshold = torch.full((2 * RANK,), 0.15)
    coder = fitted(
        activations(model("gpt2"), "blocks.1.resid_post"), "blocks.1.resid_post", norms=norms,
        threshold=threshold if space == "decoder_norm" else threshold / norms, activation=JumpReLU(), gate_space=space,
    )  # fmt: skip
    l0 = check(coder, "gpt2", published={}).stated.l0
    return restated(coder, training={"published": {"l0": l0}})


def unit_rows_meant() -> SparseCoder:
    """As e2e_sae stores them: decoder rows of any norm, made unit at every forward."""
    coder = at("gpt2", "blocks.1.resid_post")
    state = {**coder.state_dict(), "W_dec": coder.W_dec.detach() * spread(2.0, 5.0)[:, None]}
    return SparseCoder.from_state(coder.config, state)


@pytest.mark.parametrize(
    ("make", "misread", "cause"),
    [
        (scaled_input, {"input_scale": 1.0, "output_scale": 1.0}, "missing scale: it was trained on inputs scaled"),
        (
            functools.partial(at, "gpt2", "blocks.1.resid_post"),
            {"input_scale": 0.25, "output_scale": 4.0},
            "a scale that does not belong, or was folded",
        ),
        (layer_normed, {"normalise": Normalise()}, "missing normalisation: it was trained on layer-normed"),
        (
            functools.partial(at, "gpt2", "blocks.1.resid_post"),
            {"normalise": Normalise(kind="layer_norm")},
            "normalisation that does not belong",
        ),
        (functools.partial(bias_subtracted, "tied"), {"pre_bias": "none"}, "input bias: b_dec is subtracted"),
        (functools.partial(bias_subtracted, "none"), {"pre_bias": "tied"}, "input bias: b_dec is not subtracted"),
        (
            functools.partial(gated, "decoder_norm"),
            {"gate_space": "raw"},
            "folded norm: its gate acts on z times the decoder norm",
        ),
        (functools.partial(gated, "raw"), {"gate_space": "decoder_norm"}, "folded norm: its gate acts on z alone"),
        (unit_rows_meant, {}, "folded norm: its decoder rows are meant at unit norm"),
    ],
)
def test_a_layout_read_wrongly_names_its_cause(
    make: Callable[[], SparseCoder], misread: dict[str, Any], cause: str
) -> None:
    right = make()
    if make is not unit_rows_meant:
        assert check(right, "gpt2").agrees
    found = check(restated(right, **misread), "gpt2")
    assert not found.agrees
    assert found.causes[0].startswith(cause), found


def test_centred_activations_are_named() -> None:
    """TransformerLens centres what is written to the stream: coders trained there never saw its mean over the width."""
    x = activations(model("gpt2"), "blocks.1.resid_post")
    coder = fitted(x - x.mean(-1, keepdim=True), "blocks.1.resid_post")
    found = check(coder, "gpt2")
    assert found.causes[0].startswith("missing centring: it was trained on activations less their mean over the width")
    assert found.others[0].fvu < 0.3


def test_a_norm_between_two_hooks_shows_in_l0() -> None:
    """Gemma-2's raw MLP output has the directions of the contribution and a tenth of its size: thresholds tell."""
    hook = "blocks.1.mlp_out"
    x = activations(model("gemma2"), hook)
    coder = fitted(x, hook, activation=JumpReLU(), threshold=torch.full((2 * RANK,), float(x.std())))
    right = check(coder, "gemma2", published={})
    found = check(at_hooks(coder, (f"{hook}_post",)), "gemma2", published={"l0": right.stated.l0})
    assert "published" in found.disagreements[0]
    assert found.causes[0].startswith(f"wrong hook: it fits {hook}, not {hook}_post")


def test_two_mistakes_at_once_are_found_by_trying_pairs() -> None:
    wrong = restated(scaled_input(), input_scale=1.0, output_scale=1.0)
    found = check(at_hooks(wrong, ("blocks.2.resid_post",)), "gpt2", thorough=True)
    assert "wrong hook: it fits blocks.1.resid_post, not blocks.2.resid_post; and missing scale" in found.causes[0]
    best = found.others[0]
    assert (best.reads, best.steps) == (("blocks.1.resid_post",), 2)
    assert best.what == "at blocks.1.resid_post, scaled to a mean norm of √d"


def test_a_second_mistake_is_looked_for_on_top_of_the_best_reading() -> None:
    """Its hook is off by one; there, thresholds on z times the decoder norm were taken for thresholds of z."""
    coder = gated("decoder_norm")
    wrong = at_hooks(restated(coder, gate_space="raw"), ("blocks.2.resid_post",))
    found = check(wrong, "gpt2")
    assert found.others[0].steps == 2
    assert found.causes[0].startswith(
        "wrong hook: it fits blocks.1.resid_post, not blocks.2.resid_post; and folded norm"
    )


def transcoder(family: str) -> SparseCoder:
    """Reads the MLP's input at half its directions, writes the best linear guess of its contribution."""
    lm = model(family)
    x, y = activations(lm, "blocks.1.mlp_in"), activations(lm, "blocks.1.mlp_out_post")
    return fitted(x, "blocks.1.mlp_in", y, "blocks.1.mlp_out_post")


def test_a_transcoder_moves_at_one_end_at_a_time() -> None:
    right = transcoder("gpt2")
    assert check(right, "gpt2", published={}).agrees
    reads = at_hooks(right, ("blocks.1.resid_mid",), ("blocks.1.mlp_out_post",))
    assert check(reads, "gpt2").causes[0].startswith("wrong hook: it reads blocks.1.mlp_in, not blocks.1.resid_mid")
    writes = at_hooks(right, ("blocks.1.mlp_in",), ("blocks.2.mlp_out",))
    found = check(writes, "gpt2").causes[0]
    assert found.startswith("wrong hook: it writes blocks.1.mlp_out, not blocks.2.mlp_out")


def test_a_transcoders_output_scale_is_measured_at_its_output() -> None:
    """Llama Scope's transcoders: both norms are needed, and they are not each other's inverse."""
    lm = model("gpt2")
    x, y = activations(lm, "blocks.1.mlp_in"), activations(lm, "blocks.1.mlp_out")
    a, b = 4 / float(x.norm(dim=-1).mean()), float(y.norm(dim=-1).mean()) / 4
    right = fitted(x * a, "blocks.1.mlp_in", y / b, "blocks.1.mlp_out", input_scale=a, output_scale=b)
    good = check(right, "gpt2")
    assert good.agrees
    found = check(restated(right, input_scale=1.0, output_scale=1.0), "gpt2")
    assert found.causes[0].startswith("missing scale: it was trained on inputs scaled to a mean norm of √d")
    assert found.others[0].fvu == pytest.approx(good.stated.fvu, rel=1e-3)


def crosscoder() -> SparseCoder:
    lm = model("gpt2")
    hooks = ("blocks.0.resid_post", "blocks.1.resid_post")
    coder = fitted(torch.cat([activations(lm, hook) for hook in hooks], -1), "both")
    return restated(coder, reads=hooks, writes=hooks)


def test_a_crosscoder_is_measured_where_it_reads() -> None:
    found = check(crosscoder(), "gpt2")
    assert found.agrees
    assert found.stated.reads == ("blocks.0.resid_post", "blocks.1.resid_post")
    wrong = check(restated(crosscoder(), pre_bias="none"), "gpt2")
    assert wrong.causes[0].startswith("input bias: b_dec is subtracted")
    assert {r.reads for r in wrong.others} == {found.stated.reads}, "nobody says which of its hooks to move"


def test_coders_whose_writes_add_up_are_measured_together() -> None:
    """Each alone explains one layer's part; their sums explain both."""
    one, two = transcoder("gpt2"), transcoder("gpt2")
    both = ("blocks.1.mlp_out", "blocks.2.mlp_out")
    x, y = activations(model("gpt2"), "blocks.1.mlp_in"), activations(model("gpt2"), "blocks.2.mlp_out")
    first = restated(fitted(x, "blocks.1.mlp_in", torch.cat([activations(model("gpt2"), both[0]), y / 2], -1), "x"),
                     writes=both)  # fmt: skip
    second = fitted(x, "blocks.1.mlp_in", y / 2, "blocks.2.mlp_out")
    found = self_check_set(CoderSet({"a": first, "b": second}), model("gpt2"), TOKENS)
    assert found.stated.l0 == pytest.approx(2 * RANK)
    assert found.agrees
    assert [r.what for r in found.others] == ["at blocks.1.mlp_out", "at blocks.2.mlp_out"]
    alone = check(restated(second, name="b"), "gpt2").stated.fvu
    assert found.others[1].fvu < alone, "half of it is written by the other"
    missing = self_check_set(CoderSet({"a": one, "b": restated(two, name="b")}), model("gpt2"), TOKENS)
    assert not missing.agrees, "what is written twice is twice too much"
    assert missing.causes == ()


@pytest.mark.parametrize("kind", [TopK(k=3), BatchTopK(k=3)])
def test_coders_that_rank_latents_are_read_with_norms_in_and_out(kind: Any) -> None:
    hook = "blocks.1.resid_post"
    extra = {"threshold": torch.tensor(0.2)} if kind.kind == "batchtopk" else {}
    right = fitted(
        activations(model("gpt2"), hook), hook, norms=spread(0.02, 1.0), activation=kind, gate_space="decoder_norm",
        **extra,
    )  # fmt: skip
    stated = check(right, "gpt2", published={}).stated
    found = check(restated(right, gate_space="raw"), "gpt2", thorough=True)
    read = next(r for r in found.others if r.what == "gate on z times the decoder norm")
    assert (read.l0, read.fvu) == (pytest.approx(stated.l0), pytest.approx(stated.fvu))


def test_documents_that_are_kept_apart_stay_apart() -> None:
    """A coder trained on packed documents that do not see each other is measured so too."""
    tokens = TOKENS.clone()
    tokens[:, 15] = 2
    apart = InputPolicy(bos="none", attend_across=False, separator_id=2)
    hook = "blocks.1.resid_post"
    documents = (torch.arange(32) > 15).long().expand_as(tokens)
    x = model("gpt2").capture(tokens, [hook], apart, documents=documents)[hook][:, 1:].flatten(0, 1)
    coder = fitted(x, hook, input_policy=apart)
    centred = x - x.mean(0)
    left = float(torch.linalg.svdvals(centred)[RANK:].square().sum() / centred.square().sum())
    assert self_check(coder, model("gpt2"), tokens).stated.fvu == pytest.approx(left, rel=1e-3)


def test_coders_that_look_at_the_tokens_before_see_whole_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go through in chunks; none of them begins inside a context."""
    from unmix.evaluate import self_check as room

    monkeypatch.setattr(room, "_ROWS", 5)
    hook, tokens = "blocks.1.resid_post", TOKENS
    config = CoderConfig(
        reads=(hook,), d_in=16, n_latents=32, input_policy=POLICY, pre_bias="tied",
        activation=Temporal(k=4, n_heads=2, bottleneck=4, z_scale=1.0),
    )  # fmt: skip
    coder = SparseCoder(config, seed=3).eval().requires_grad_(False)
    for name, parameter in coder.named_parameters():
        if name.startswith("attn"):
            parameter.normal_(std=0.3)
    x = model("gpt2").capture(tokens, [hook])[hook][:, 1:]
    out = coder(x).reconstruction
    fvu = (x - out).square().sum() / (x - x.flatten(0, 1).mean(0)).square().sum()
    found = self_check(coder, model("gpt2"), tokens, {"fvu": 1e9})
    assert found.stated.fvu == pytest.approx(float(fvu), rel=1e-4)
    assert len(self_check(coder, model("gpt2"), tokens).others) > 10, "other readings of it are measured too"


def test_clear_errors() -> None:
    coder = at("gpt2", "blocks.1.resid_post")
    with pytest.raises(ModelError, match=r"unknown hook 'blocks.1.resid_pots'. Nearest: blocks.1.resid_post"):
        check(at_hooks(coder, ("blocks.1.resid_pots",)), "gpt2")
    with pytest.raises(ModelError, match="there is no layer 9; this model has layers 0 to 2"):
        check(at_hooks(coder, ("blocks.9.resid_post",)), "gpt2")
    with pytest.raises(ModelError, match=r"resid_post: blocks.1.mlp_act of tiny-gpt2 is 64 wide, the coder needs 16"):
        check(restated(at_hooks(coder, ("blocks.1.mlp_act",)), name="resid_post"), "gpt2")
    for unknown in ("input", "input.0"):
        with pytest.raises(ConfigError, match="its files do not say which hook it reads; give it with hook="):
            check(at_hooks(coder, (unknown,)), "gpt2")
    masked = restated(coder, input_policy=InputPolicy(skip_first=32))
    with pytest.raises(ConfigError, match="no position counts under the coder's input policy"):
        check(masked, "gpt2")


def test_nothing_is_said_where_activations_never_vary() -> None:
    coder = at("gpt2", "blocks.1.resid_post")
    same = torch.full((2, 2), 5)
    found = self_check(coder, model("gpt2"), same[:, :2])
    assert math.isnan(found.stated.fvu)
    assert found.disagreements == ("FVU is nan: undefined, since the activation never varies",)
    assert found.causes == ()


def test_it_is_fit_for_json() -> None:
    import json

    found = check(at("gpt2", "blocks.1.resid_post"), "gpt2", published={"l0": 1.0})
    told = json.loads(json.dumps(found.model_dump()))
    assert (told["agrees"], told["published"], told["stated"]["what"]) == (False, {"l0": 1.0}, "as stated")


def with_tokenizer(tokenizer: object, **sizes: Any) -> LanguageModel:
    return LanguageModel(raw_model("gpt2", vocab_size=512, **sizes).requires_grad_(False), "tiny", tokenizer)


def test_tokens_of_a_text_are_packed_with_the_policys_bos(tiny_tokenizer: Any, tmp_path: Any) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words and others. " * 60, encoding="utf-8")
    lm = with_tokenizer(tiny_tokenizer)
    found = sample_tokens(lm, str(text), 100, 16)
    assert found.shape == (6, 16)
    assert found[:, 0].tolist() == [tiny_tokenizer.bos_token_id] * 6
    ids = tiny_tokenizer(text.read_text(encoding="utf-8").strip(), add_special_tokens=False)["input_ids"]
    assert found[:, 1:].flatten().tolist() == ids[: 6 * 15]
    bare = sample_tokens(lm, str(text), 100, 16, InputPolicy(bos="none"))
    assert bare.flatten().tolist() == ids[:96]


def test_a_tokenizer_without_bos_gives_contexts_without_one(tiny_tokenizer: Any, caplog: Any) -> None:
    tiny_tokenizer.bos_token = None
    found = sample_tokens(with_tokenizer(tiny_tokenizer), tokens=64, context=32)
    assert found.shape == (2, 32)
    assert "the tokenizer has no begin-of-sequence token: contexts start without one" in caplog.text


def test_sizes_of_samples(tiny_tokenizer: Any, tmp_path: Any) -> None:
    from unmix.core.errors import DataError

    lm = with_tokenizer(tiny_tokenizer)
    assert sample_tokens(lm, tokens=1).shape == (1, 64), "what the model takes, at least one context"
    with pytest.raises(ConfigError, match="context is 65; tiny takes 2 to 64 tokens"):
        sample_tokens(lm, context=65)
    with pytest.raises(ConfigError, match="tokens must be at least 1, found 0"):
        sample_tokens(lm, tokens=0)
    short = tmp_path / "short.txt"
    short.write_text("few words", encoding="utf-8")
    with pytest.raises(DataError, match=r"short.txt: too little text for one context of 64 tokens"):
        sample_tokens(lm, str(short))
    with pytest.raises(DataError, match=r"nowhere.txt: no such file"):
        sample_tokens(lm, str(tmp_path / "nowhere.txt"))
    told = CoderConfig(d_in=4, n_latents=8, activation=TopK(k=2), training={"context_size": 48})
    assert context_of(told, lm) == 48
    assert context_of(told.model_copy(update={"training": {}}), lm) == 64


@pytest.mark.model
def test_on_the_real_model() -> None:
    """Main directions of SmolLM2 at layer 3, stated at layer 4: the demo's model says so."""
    lm = load_model("builtin:smollm2", dtype="float32")
    tokens = sample_tokens(lm, tokens=2048, context=128)
    hook = "blocks.3.mlp_out"
    x = lm.capture(tokens, [hook])[hook][:, 1:].flatten(0, 1)
    centred = x - x.mean(0)
    P = torch.linalg.svd(centred, full_matrices=False).Vh[:256]
    config = CoderConfig(reads=(hook,), d_in=576, n_latents=512, activation={"kind": "relu"}, pre_bias="tied")  # pyright: ignore
    state = {"W_enc": torch.cat([P, -P]), "b_enc": torch.zeros(512), "W_dec": torch.cat([P, -P]), "b_dec": x.mean(0)}
    coder = SparseCoder.from_state(config, state)
    assert self_check(coder, lm, tokens, {"l0": 256}).agrees
    found = self_check(at_hooks(coder, ("blocks.4.mlp_out",)), lm, tokens, {"l0": 256, "fvu": 0.2})
    assert found.causes[0].startswith("wrong hook: it fits blocks.3.mlp_out, not blocks.4.mlp_out")
