"""Effects against closed forms: a linear model is exact, patching is what ablation by hand gives, paths add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm.fakes import EVERYWHERE, LinearCoder, topk_coder
from lm.families import raw_model, some_tokens, tiny
from unmix.coder import CoderConfig, CoderSet, SparseCoder
from unmix.coder.config import TopK
from unmix.core.errors import ConfigError, ModelError
from unmix.core.policy import InputPolicy
from unmix.lm import LanguageModel, Set
from unmix.lm.attribute import agreement, attribute, node_means
from unmix.lm.attribute.baselines import make_nodes
from unmix.lm.attribute.targets import make_metric
from unmix.lm.attribute.wiring import make_wiring

TOKENS = some_tokens(2, 7)


def biased(hook: str) -> Any:
    """A coder whose bias is not zero: on the way to a stream of nothing, the next norm is not smooth."""
    coder = topk_coder(hook, 16)
    with torch.no_grad():
        coder.b_dec.copy_(torch.randn(16, generator=torch.Generator().manual_seed(4)))
    return coder


def logit_of(tokens: int) -> Any:
    return lambda logits: logits[:, -1, tokens]


def sums(result: Any) -> float:
    latents = sum(float(table.effects.double().sum()) for table in result.tables.values())
    return latents + sum(float(e.double().sum()) for e in result.errors_at.values())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_patching_equals_the_intervention(family: str, error: Any) -> None:
    lm = tiny(family)
    coder = topk_coder("blocks.1.resid_post", 16)
    with lm.bind(coder, error=error) as bound:
        found = attribute(bound, TOKENS, 5, method="patch", batch=3)
        table = found.tables["blocks.1.resid_post"]
        assert len(table.effects) == 2 * 7 * 4
        with torch.no_grad():
            whole = bound(TOKENS).logits
            for i in range(0, len(table.effects), 5):
                act = Set(latent=int(table.latents[i]), value=0.0, where=[int(table.positions[i])])
                row = int(table.contexts[i])
                moved = bound(TOKENS[row : row + 1], interventions=[act]).logits
                expected = whole[row, -1, 5] - moved[0, -1, 5]
                assert float(table.effects[i]) == pytest.approx(float(expected), abs=2e-5)


class Linear(nn.Module):
    """Two linear layers and a head over one-hot tokens: the whole model is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.embed(ids))))


class Words:
    """The least that makes a module take token ids."""

    bos_token_id = None
    eos_token_id = None
    added_tokens_decoder: dict[int, str] = {}

    def __len__(self) -> int:
        return 20

    def get_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{i}" for i in ids]


def linear() -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(Linear().requires_grad_(False), "linear", Words())


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("method", ["gradient", "ig", "patch"])
def test_a_linear_model_has_exact_effects(error: Any, method: Any) -> None:
    """effect of latent f at the last position = value × (decoder row · everything after · head row)."""
    lm, tokens = linear(), torch.tensor([[3, 4, 5]])
    coder = LinearCoder("a", 6, name="a")
    model: Any = lm.model
    with lm.bind(coder, error=error) as bound:
        found = attribute(bound, tokens, logit_of(7), method=method)
    x = model.a(model.embed(tokens))[0, -1]
    codes = x @ coder.W
    after = coder.V @ model.b.weight.T @ model.head.weight[7]
    table = found.tables["a"]
    last = table.positions == 2
    torch.testing.assert_close(table.effects[last], (codes * after).detach(), atol=1e-5, rtol=1e-4)
    assert float(table.effects[~last].abs().max()) < 1e-6
    if error == "keep":
        wrong = (x - coder.map(x)) @ model.b.weight.T @ model.head.weight[7]
        torch.testing.assert_close(found.errors_at["a@out"][0, -1], wrong.detach(), atol=1e-5, rtol=1e-4)
    else:
        assert found.errors() == []


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_integrated_gradients_add_up_to_the_difference(error: Any) -> None:
    lm = tiny("llama")
    coders = [biased("blocks.0.resid_post"), LinearCoder("blocks.1.mlp_out", 16, name="second")]
    with lm.bind(coders, error=error) as bound:
        rough = attribute(bound, TOKENS, 5, method="ig", steps=2)
        fine = attribute(bound, TOKENS, 5, method="ig", steps=24)
        for name, part in fine.completeness.items():
            assert abs(part.gap) < 0.02 * abs(part.measured) + 1e-3, name
            assert abs(part.gap) <= abs(rough.completeness[name].gap) + 1e-4
        expected = float((attribute(bound, TOKENS, 5).value - _all_zero(bound, coders[0])).sum())
        assert fine.completeness["blocks.0.resid_post"].measured == pytest.approx(expected, abs=1e-4)


def _all_zero(bound: Any, coder: Any) -> Tensor:
    """The logit with the activation at the coder's bias everywhere, by a plain edit; the second coder as bound."""
    edits: dict[str, Any] = {"blocks.0.resid_post": coder.b_dec.expand_as}
    if bound.error == "drop":
        other = bound.bindings[1].coder
        edits["blocks.1.mlp_out"] = other.map
    with torch.no_grad():
        return bound.lm.spliced_logits(TOKENS, edits)[:, -1, 5]


def test_gradients_are_those_of_the_splice() -> None:
    """error="keep" with one coder: d logit / d code by the binding's own graph."""
    lm = tiny("gemma2")
    coder = topk_coder("blocks.1.resid_post", 16)
    with lm.bind(coder, error="keep") as bound:
        found = attribute(bound, TOKENS, 5)
        for p in coder.parameters():
            p.requires_grad_(True)
        out = bound(TOKENS)
        codes = out.codes["blocks.1.resid_post"]
        (slope,) = torch.autograd.grad(out.logits[:, -1, 5].sum(), [codes.values])
    torch.testing.assert_close(
        found.tables["blocks.1.resid_post"].effects, (slope * codes.values).detach(), atol=1e-5, rtol=1e-4
    )


def test_dropping_errors_lets_gradients_through_later_coders() -> None:
    lm = tiny("llama")
    first, second = topk_coder("blocks.0.resid_post", 16), topk_coder("blocks.1.resid_post", 16)
    with lm.bind([first, second]) as bound:
        found = attribute(bound, TOKENS, 5)
        out = bound(TOKENS)
        codes = out.codes["blocks.0.resid_post"]
        (slope,) = torch.autograd.grad(out.logits[:, -1, 5].sum(), [codes.values])
    assert found.bare is not None
    torch.testing.assert_close(
        found.tables["blocks.0.resid_post"].effects, (slope * codes.values).detach(), atol=1e-5, rtol=1e-4
    )


def test_effects_in_the_model_as_it_is_do_not_depend_on_other_coders() -> None:
    lm = tiny("gpt2")
    first, second = topk_coder("blocks.0.resid_post", 16), topk_coder("blocks.1.resid_post", 16)
    alone, both = attribute((lm, first), TOKENS, 5), attribute((lm, [first, second]), TOKENS, 5)
    one, other = (r.tables["blocks.0.resid_post"].effects for r in (alone, both))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_corrupt_prompt_is_the_baseline() -> None:
    lm = tiny("llama")
    corrupt = TOKENS.clone()
    corrupt[:, 2] = 50
    coder = topk_coder("blocks.0.resid_post", 16)
    with lm.bind(coder, error="keep") as bound:
        fine = attribute(bound, TOKENS, 5, corrupt=corrupt, method="ig", steps=24)
        quick = attribute(bound, TOKENS, 5, corrupt=corrupt)
        exact = attribute(bound, TOKENS, 5, corrupt=corrupt, method="patch")
        wiring = make_wiring(bound)
        metric = make_metric(lm, TOKENS, 5)
        nodes = make_nodes(wiring, TOKENS, metric, corrupt)
    there = lm.logits(corrupt)[:, -1, 5]
    part = fine.completeness["blocks.0.resid_post"]
    assert part.measured == pytest.approx(float((fine.value - there).sum()), abs=1e-4)
    assert abs(part.gap) < 0.03 * abs(part.measured) + 1e-3
    # Before the position that differs, nothing does.
    table = exact.tables["blocks.0.resid_post"]
    assert float(table.effects[table.positions < 2].abs().max()) < 1e-6
    assert agreement(quick, exact).pearson > 0.5
    # Latents of either prompt are nodes: those of the corrupt prompt alone have a value of 0.
    codes = nodes.codes["blocks.0.resid_post"]
    assert codes.nnz > 2 * 7 * 4
    codes.check()
    assert bool(((codes.values == 0) & (nodes.bases["blocks.0.resid_post"] != 0)).any())


def test_means_are_a_baseline() -> None:
    lm = tiny("llama")
    coder = topk_coder("blocks.0.resid_post", 16)
    with lm.bind(coder, error="keep") as bound:
        means = node_means(bound, TOKENS, batch=1)
        codes = bound(TOKENS).codes["blocks.0.resid_post"].dense().detach()
        torch.testing.assert_close(means.codes["blocks.0.resid_post"], codes.flatten(0, 1).mean(0))
        assert means.positions == 14
        found = attribute(bound, TOKENS, 5, means=means, method="ig", steps=24)
    x = lm.capture(TOKENS, ["blocks.0.resid_post"])["blocks.0.resid_post"]
    flat = x.flatten(0, 1).mean(0)
    expected = found.value - lm.spliced_logits(TOKENS, {"blocks.0.resid_post": flat.expand_as})[:, -1, 5]
    part = found.completeness["blocks.0.resid_post"]
    assert part.measured == pytest.approx(float(expected.sum()), abs=1e-4)
    assert abs(part.gap) < 0.03 * abs(part.measured) + 1e-3


def test_transcoders_and_crosscoders() -> None:
    lm = tiny("gemma2")
    transcoder = LinearCoder("blocks.0.mlp_in", 16, "blocks.0.mlp_out_post", name="t")
    wide = LinearCoder(
        ("blocks.1.resid_pre",), 16, ("blocks.1.attn_out_post", "blocks.2.mlp_out_post"), d_out=32, name="w"
    )
    for error in ("keep", "drop"):
        with lm.bind([transcoder, wide], error=error) as bound:
            exact = attribute(bound, TOKENS[:1], 5, method="patch")
            fine = attribute(bound, TOKENS[:1], 5, method="ig", steps=24)
            table = exact.tables["w"]
            with torch.no_grad():
                act = Set(latent=2, value=0.0, where=[4], coder="w")
                expected = bound(TOKENS[:1]).logits - bound(TOKENS[:1], interventions=[act]).logits
            chosen = (table.latents == 2) & (table.positions == 4)
            assert float(table.effects[chosen]) == pytest.approx(float(expected[0, -1, 5]), abs=2e-5)
            for part in fine.completeness.values():
                assert abs(part.gap) < 0.03 * abs(part.measured) + 2e-3


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_coders_that_write_together_are_one_group(error: Any) -> None:
    """A cross-layer transcoder: layer 0 writes to both MLPs, layer 1 to its own; one error a hook."""
    lm, one = tiny("llama"), TOKENS[:1]
    outs = ("blocks.0.mlp_out", "blocks.1.mlp_out")
    makers = [("blocks.0.mlp_in", outs, 32), ("blocks.1.mlp_in", outs[1:], 16)]
    members = {
        f"t{i}": SparseCoder(
            CoderConfig(
                name=f"t{i}", reads=(read,), writes=writes, d_in=16, d_out=width, n_latents=12, activation=TopK(k=3),
                pre_bias="none", input_policy=EVERYWHERE,
            ), seed=i,
        ) for i, (read, writes, width) in enumerate(makers)
    }  # fmt: skip
    for coder in members.values():
        with torch.no_grad():
            coder.b_dec.copy_(torch.randn(coder.b_dec.shape, generator=torch.Generator().manual_seed(7)))
    with lm.bind(CoderSet(members), error=error) as bound, torch.no_grad():
        assert make_wiring(bound).groups == [("t0", "t1")]
        exact = attribute(bound, one, 5, method="patch")
        whole = bound(one).logits
        for name in ("t0", "t1"):
            table = exact.tables[name]
            for i in range(0, len(table.effects), 4):
                act = Set(latent=int(table.latents[i]), value=0.0, where=[int(table.positions[i])], coder=name)
                expected = (whole - bound(one, interventions=[act]).logits)[0, -1, 5]
                assert float(table.effects[i]) == pytest.approx(float(expected), abs=2e-5)
        fine = attribute(bound, one, 5, method="ig", steps=24)
    part = fine.completeness["t0 + t1"]
    assert abs(part.gap) < 0.03 * abs(part.measured) + 1e-3
    biases = {
        outs[0]: members["t0"].b_dec[:16].expand_as,
        outs[1]: (members["t0"].b_dec[16:] + members["t1"].b_dec).expand_as,
    }
    with torch.no_grad():
        empty = lm.spliced_logits(one, biases)[0, -1, 5]
    assert part.measured == pytest.approx(float(fine.value[0] - empty), abs=1e-4)
    assert list(fine.errors_at) == (list(outs) if error == "keep" else [])


def test_masked_positions_hold_no_nodes() -> None:
    coder = topk_coder("blocks.1.resid_post", 16, input_policy=InputPolicy(bos="none", skip_first=3))
    found = attribute((tiny("llama"), coder), TOKENS, 5)
    assert int(found.tables["blocks.1.resid_post"].positions.min()) == 3
    assert float(found.errors_at["blocks.1.resid_post"][:, :3].abs().max()) == 0


def test_metrics() -> None:
    lm = tiny("llama")
    model = (lm, topk_coder("blocks.1.resid_post", 16))
    logits = lm.logits(TOKENS)
    last = logits[:, -1]
    assert torch.allclose(attribute(model, TOKENS, 5).value, last[:, 5])
    assert torch.allclose(attribute(model, TOKENS, [5, 6]).value, torch.stack([last[0, 5], last[1, 6]]))
    assert torch.allclose(attribute(model, TOKENS, 5, against=9).value, last[:, 5] - last[:, 9], atol=1e-6)
    assert torch.allclose(attribute(model, TOKENS, 5, metric="logprob").value, last.log_softmax(-1)[:, 5])
    assert torch.allclose(attribute(model, TOKENS).value, last.max(-1).values)
    assert torch.allclose(attribute(model, TOKENS, 5, position=2).value, logits[:, 2, 5], atol=1e-5)
    scores = logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None]).squeeze(-1)
    assert torch.allclose(attribute(model, TOKENS, metric="loss").value, -scores.mean(-1))
    mine = attribute(model, TOKENS, lambda logits: logits[:, -1, 5] ** 2)
    assert torch.allclose(mine.value, last[:, 5] ** 2)
    # What comes after the position that is read has no effect.
    early = attribute(model, TOKENS, 5, position=2).tables["blocks.1.resid_post"]
    assert float(early.effects[early.positions > 2].abs().max()) == 0


def test_a_limit_leaves_out_what_cannot_reach_the_metric() -> None:
    model = (tiny("llama"), topk_coder("blocks.1.resid_post", 16))
    every = attribute(model, TOKENS, 5, position=2).tables["blocks.1.resid_post"]
    some = attribute(model, TOKENS, 5, position=2, method="patch", limit=10_000).tables["blocks.1.resid_post"]
    assert torch.equal(some.effects.isfinite(), every.effects != 0)
    assert bool((some.positions[some.effects.isfinite()] <= 2).all())


def test_a_limit_measures_the_strongest() -> None:
    lm = tiny("llama")
    model = (lm, topk_coder("blocks.1.resid_post", 16))
    every, some = attribute(model, TOKENS, 5, method="patch"), attribute(model, TOKENS, 5, method="patch", limit=9)
    effects = some.tables["blocks.1.resid_post"].effects
    known = effects.isfinite()
    counted = int(known.sum()) + int(some.errors_at["blocks.1.resid_post"].isfinite().sum())
    assert counted == 9
    torch.testing.assert_close(effects[known], every.tables["blocks.1.resid_post"].effects[known])
    assert len(some.top(100, per="position")) == int(known.sum())


def test_tables(tmp_path: Any) -> None:
    import json

    lm = tiny("llama")
    found = attribute((lm, topk_coder("blocks.1.resid_post", 16)), TOKENS, 5)
    table = found.tables["blocks.1.resid_post"]
    top = found.top(3, per="position")
    assert [abs(t.effect) for t in top] == pytest.approx(table.effects.abs().topk(3).values.tolist())
    summed = {int(i): float(table.effects[table.latents == i].sum()) for i in table.latents.unique()}
    best = found.top(2)
    assert best[0].effect == pytest.approx(max(summed.values(), key=abs), abs=1e-6)
    assert best[0].position is None and best[0].token.startswith("[")
    found.to_json(tmp_path / "a.json")
    tree = json.loads((tmp_path / "a.json").read_text())
    assert tree["schema"] == "unmix-attribution-1"
    assert len(tree["latents"]) == 2 * 7 * 4 and len(tree["errors"]) == 14
    assert tree["latents"][0]["effect"] == pytest.approx(top[0].effect)
    found.to_json(tmp_path / "b.json", n=3)
    assert len(json.loads((tmp_path / "b.json").read_text())["latents"]) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "gradients"}, "method is 'gradients'. Did you mean 'gradient'?"),
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"metric": "logits"}, "metric is 'logits'. Did you mean 'logit'"),
        ({"metric": "logprob", "against": 3}, "`against` is what a logit difference is taken to"),
        ({"target": 100}, "token id 100: tiny-llama has ids 0 to 99"),
        ({"target": [1, 2, 3]}, "3 target tokens for 2 prompts"),
        ({"position": 7}, "position 7: the prompt has 7 tokens, so places are 0 to 6"),
        ({"corrupt": TOKENS[:, :5]}, r"the corrupt prompt has \[2, 5\] tokens, the prompt \[2, 7\]"),
        ({"target": lambda logits: logits.sum()}, r"must return one value a context, \[2\], found \[\]"),
        ({"metric": "loss", "target": 4}, "no target goes with it"),
    ],
)
def test_what_cannot_be_attributed(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ModelError, ConfigError), match=says):
        attribute((tiny("llama"), topk_coder("blocks.1.resid_post", 16)), TOKENS, **{"target": 5, **options})


def test_a_prompt_that_is_too_long_and_interventions_are_refused() -> None:
    lm, coder = tiny("llama"), topk_coder("blocks.1.resid_post", 16)
    with pytest.raises(ModelError, match="a context of 65 tokens: tiny-llama takes at most 64"):
        attribute((lm, coder), some_tokens(1, 65), 5)
    with lm.bind(coder, interventions=[Set(latent=1, value=0.0)]) as bound, pytest.raises(ModelError) as caught:
        attribute(bound, TOKENS, 5)
    assert "this binding holds 1 interventions; bind without them" in str(caught.value)
    with lm.bind(coder, where="prompt") as bound, pytest.raises(ModelError, match="bind with where='all'"):
        attribute(bound, TOKENS, 5)


def test_bfloat16() -> None:
    lm = LanguageModel(raw_model("llama").to(torch.bfloat16).requires_grad_(False), "bf16")
    found = attribute((lm, topk_coder("blocks.1.resid_post", 16)), TOKENS, 5)
    whole = attribute((tiny("llama"), topk_coder("blocks.1.resid_post", 16)), TOKENS, 5)
    assert found.top(1)[0].latent in {e.latent for e in whole.top(4)}


def test_nodes_are_where_the_binding_looks() -> None:
    """A policy given to `bind` takes the place of the coder's own."""
    lm = tiny("llama")
    coder = topk_coder("blocks.1.resid_post", 16, input_policy=InputPolicy(bos="none", skip_first=3))
    tokens = some_tokens(1, 6)
    everywhere = InputPolicy(bos="none", skip_first=0)
    with lm.bind(coder, error="keep") as own, lm.bind(coder, error="keep", policy=everywhere) as given:
        tables = [attribute(bound, tokens[0], 5).tables["blocks.1.resid_post"] for bound in (own, given)]
    found = [set(table.positions.tolist()) for table in tables]
    assert found == [{3, 4, 5}, {0, 1, 2, 3, 4, 5}]
