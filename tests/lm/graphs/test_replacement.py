from __future__ import annotations

import threading

import pytest
import torch

from lm.fakes import topk_coder
from lm.families import CONFIGS, some_tokens, tiny
from lm.graphs.parts import cross_layer, linear_model, transcoder, without_biases
from unmix.coder.config import Gated, JumpReLU, Normalise
from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm.forward import run
from unmix.lm.graphs.attention import watching
from unmix.lm.graphs.heads import attention_causes
from unmix.lm.graphs.norms import find_norms, frozen
from unmix.lm.graphs.replacement import LocalReplacement

TOKENS = some_tokens(1, 9)[0]
FAMILIES = [family for family in CONFIGS if family != "opt_350m"]


def every_target(replacement: LocalReplacement) -> list[int]:
    return list(range(0, replacement.n_latents, 7))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_is_the_sum_of_the_effects_on_it(family: str) -> None:
    lm = without_biases(family)
    replacement = LocalReplacement(lm, [transcoder(layer, lm.d_model) for layer in range(3)], TOKENS)
    targets = [replacement.logit_target(5)] + [replacement.latent_target(c) for c in every_target(replacement)]
    rows = replacement.rows(targets)
    torch.testing.assert_close(rows.sum(1), torch.tensor([t.value for t in targets]), rtol=2e-4, atol=2e-5)


def test_norms_of_single_heads_are_held_too() -> None:
    lm = without_biases("cohere", use_qk_norm=True)
    replacement = LocalReplacement(lm, [transcoder(layer) for layer in range(3)], TOKENS)
    target = replacement.logit_target(5)
    assert float(replacement.rows([target]).sum()) == pytest.approx(target.value, rel=1e-3)
    why = attention_causes(replacement, layer=2, head=1, query=7, key=3, top=10_000)
    assert sum(v for _, v in why.queries) == pytest.approx(why.score, rel=1e-3, abs=1e-5)
    assert sum(v for _, v in why.keys) == pytest.approx(why.score, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": Gated()},
        {"activation": JumpReLU()},
        {"skip": True},
        {"normalise": Normalise(kind="constant_norm")},
        {"normalise": Normalise(kind="standardise")},
        {"input_scale": 0.5, "output_scale": 3.0},
        {"read": "resid_mid"},
        {"read": "mlp_in~normalised"},
        {"read": "resid_mid~centred"},
        {"write": "mlp_out_post"},
    ],
    ids=lambda o: next(iter(o)) + str(next(iter(o.values()))).split("(")[0][:18],
)
def test_every_kind_of_transcoder_adds_up(options: dict[str, object]) -> None:
    lm = without_biases("gemma2")
    replacement = LocalReplacement(lm, [transcoder(layer, **options) for layer in (0, 2)], TOKENS)
    targets = [replacement.logit_target(5)] + [replacement.latent_target(c) for c in every_target(replacement)]
    assert len(targets) > 3
    rows = replacement.rows(targets)
    torch.testing.assert_close(rows.sum(1), torch.tensor([t.value for t in targets]), rtol=3e-4, atol=3e-5)


def test_a_layer_normed_input_is_held_at_its_norm() -> None:
    lm = without_biases("llama")
    # Put back, a token's mean would be a constant of the output that no node writes.
    coders = [transcoder(layer, normalise=Normalise(kind="layer_norm", restore=False)) for layer in range(3)]
    replacement = LocalReplacement(lm, coders, TOKENS)
    targets = [replacement.latent_target(c) for c in every_target(replacement)]
    torch.testing.assert_close(
        replacement.rows(targets).sum(1), torch.tensor([t.value for t in targets]), rtol=3e-4, atol=3e-5
    )


def test_cross_layer_latents_act_through_each_of_their_writes() -> None:
    lm = without_biases("llama")
    replacement = LocalReplacement(lm, cross_layer(), TOKENS)
    targets = [replacement.logit_target(5)] + [replacement.latent_target(c) for c in every_target(replacement)]
    rows = replacement.rows(targets)
    torch.testing.assert_close(rows.sum(1), torch.tensor([t.value for t in targets]), rtol=3e-4, atol=3e-5)
    # What layer 0 writes at layers 1 and 2 is part of its effect: without these writes the sum is another.
    alone = LocalReplacement(lm, [transcoder(0)], TOKENS)
    assert not torch.allclose(
        alone.rows([alone.logit_target(5)])[0, : len(alone.active["l0"])], rows[0, : len(replacement.active["l0"])]
    )


def test_an_effect_is_what_the_target_loses_in_a_linear_model() -> None:
    lm = linear_model()
    replacement = LocalReplacement(lm, [transcoder(layer) for layer in range(3)], TOKENS)
    row = replacement.rows([replacement.logit_target(5)])[0]
    entry = len(replacement.active["l0"]) + 3
    coder, at = replacement.locate(entry)
    active = replacement.active[coder.name]
    vector = coder.coder.W_dec[active.latents[at]] * active.values[at]

    def without(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, active.positions[at]] -= vector
        return x

    held = {hook: (lambda x, h=hook: replacement.held[h].unsqueeze(0)) for hook in replacement.outputs}
    hook = coder.writes[0].name
    changed = lm.run(TOKENS.unsqueeze(0), {**held, hook: lambda x: without(replacement.held[hook].unsqueeze(0))}).logits
    plain = lm.logits(TOKENS.unsqueeze(0))
    assert changed is not None
    lost = (plain - changed)[0, -1]
    assert float(row[entry]) == pytest.approx(float(lost[5] - lost.mean()), rel=1e-4, abs=1e-6)


def test_batches_and_memory_change_nothing() -> None:
    lm = tiny("llama")
    coders = [transcoder(layer) for layer in range(3)]
    wide, narrow = LocalReplacement(lm, coders, TOKENS), LocalReplacement(lm, coders, TOKENS, memory=1)
    assert (wide.flow.batch, narrow.flow.batch) == (64, 1)
    columns = every_target(wide)
    rows = [r.rows([r.latent_target(c) for c in columns]) for r in (wide, narrow)]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=1e-6)


def test_positions_that_the_coder_was_not_trained_on_are_all_error() -> None:
    lm = without_biases("llama")
    policy = InputPolicy(bos="none", skip_first=2)
    replacement = LocalReplacement(lm, [transcoder(0, input_policy=policy, skip=True)], TOKENS)
    assert int(replacement.active["l0"].positions.min()) == 2
    torch.testing.assert_close(replacement.errors["blocks.0.mlp_out"][:2], replacement.held["blocks.0.mlp_out"][:2])
    target = replacement.logit_target(5)
    assert float(replacement.rows([target]).sum()) == pytest.approx(target.value, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "cohere"])
def test_a_held_norm_has_the_gradient_of_its_linear_map(family: str) -> None:
    lm = tiny(family)
    path, parts = next((p, n) for p, n in find_norms(lm).items() if len(n.gain) == lm.d_model)
    norm = lm.model.get_submodule(path)
    x = torch.randn(2, 3, lm.d_model, requires_grad=True)
    y = norm(x)
    torch.testing.assert_close(frozen(x, y.detach(), parts), y)
    centred = x - x.mean(-1, keepdim=True) if parts.centred else x
    r = (centred.square().mean(-1, keepdim=True)).rsqrt().detach()
    (expected,) = torch.autograd.grad((r * parts.gain * centred + parts.bias).sum(), x, retain_graph=True)
    (found,) = torch.autograd.grad(frozen(x, y.detach(), parts).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert parts.centred == (family in ("gpt2", "cohere"))


def test_other_passes_and_threads_see_nothing_of_it() -> None:
    lm = tiny("gemma2")
    before = lm.logits(TOKENS.unsqueeze(0))
    seen: list[torch.Tensor] = []
    inside, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        inside.wait()
        seen.append(lm.logits(TOKENS.unsqueeze(0)))
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()

    def shout(call):
        inside.set()
        done.wait()
        return call.query * 0, call.key, call.value

    with watching(shout):
        run(lm, TOKENS.unsqueeze(0), lambda _: None)
    thread.join()
    assert LocalReplacement(lm, [transcoder(0)], TOKENS).flow.batch == 64
    assert torch.equal(seen[0], before)
    assert torch.equal(lm.logits(TOKENS.unsqueeze(0)), before)


@pytest.mark.parametrize(
    ("coders", "message"),
    [
        ([topk_coder("blocks.1.resid_post", 16)], "which write mlp_out or mlp_out_post"),
        ([transcoder(1, write="mlp_out_post~centred")], "writes blocks.1.mlp_out_post~centred; an attribution graph"),
        ([topk_coder("blocks.1.mlp_out", 16)], "a transcoder reads what comes before the MLP that it writes"),
        ([transcoder(1, 32, read="mlp_act")], "reads blocks.1.mlp_act, which is not linear in what comes before"),
        ([transcoder(1, 8)], "coder 'l1' reads 8 values, blocks.1.mlp_in have 16"),
        ([transcoder(1), transcoder(1)], "two coders have one name (l1, l1)"),
        ({"a": transcoder(1), "b": transcoder(1)}, "coders 'a' and 'b' both write blocks.1.mlp_out"),
        ([], "there is no coder"),
        ([transcoder(0, skip=True, normalise=Normalise(kind="layer_norm"))], "a skip of a normalised input"),
    ],
)  # fmt: skip
def test_coders_that_cannot_be_drawn_are_refused(coders: object, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        LocalReplacement(tiny("llama"), coders, TOKENS)
    assert message in str(caught.value)


def test_a_model_without_a_last_norm_says_so() -> None:
    with pytest.raises(ModelError, match="has no norm after its last block"):
        LocalReplacement(tiny("opt_350m"), [transcoder(0)], TOKENS)
