"""A pass that starts in the middle gives what the whole pass gives, and leaves no trace in the model."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unmix.lm import LanguageModel
from unmix.lm.start import find_start

from .families import CONFIGS, raw_model, some_tokens, tiny

HOOKS = {
    "embeddings": 0, "blocks.0.attn_in": 0, "blocks.1.attn_out": 1, "blocks.1.resid_post": 2, "blocks.2.resid_pre": 2,
    "blocks.2.mlp_act": 2, "final_norm": 3,
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_goes_on_from_its_stream(family: str) -> None:
    """Bit for bit, packed documents and edits included."""
    lm, tokens = tiny(family), some_tokens()
    documents = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])
    for hook, blocks in HOOKS.items():
        if hook not in lm.hooks():
            continue
        start = find_start(lm, [hook, "blocks.2.resid_post"])
        assert (0 if start is None else len(start.paths)) == blocks, hook
        if start is None:
            continue
        edits = {hook: lambda x: 0.5 * x}
        stream = lm.run(tokens, capture=[start.hook], documents=documents, logits=False).activations[start.hook]
        whole = lm.run(tokens, edits, documents=documents).logits
        part = lm.run(tokens, edits, documents=documents, skip=start.skip(stream)).logits
        assert whole is not None
        assert part is not None
        assert torch.equal(whole, part), hook
    assert not any("forward" in module.__dict__ for module in lm.model.modules())


def test_a_module_that_hands_more_than_the_stream_is_run_whole() -> None:
    """A later block that reads what an earlier one kept aside is found out."""
    lm = LanguageModel(raw_model("llama"), "keeps-aside")
    model: Any = lm.model
    kept: list[Tensor] = []
    first, last = model.model.layers[0], model.model.layers[2]
    inner = first.self_attn.forward, last.self_attn.forward

    def keep(*args: Any, **kwargs: Any) -> Any:
        out = inner[0](*args, **kwargs)
        kept[:] = [out[0]]
        return out

    def use(*args: Any, **kwargs: Any) -> Any:
        out = inner[1](*args, **kwargs)
        return (out[0] + kept.pop(), *out[1:])

    first.self_attn.forward, last.self_attn.forward = keep, use
    assert find_start(lm, ["blocks.1.resid_post"]) is None


def test_a_module_of_no_family_starts_at_its_inputs() -> None:
    """Nothing is known of its blocks."""
    assert find_start(LanguageModel(nn.Sequential(nn.Linear(2, 2)), "plain"), ["0"]) is None


def test_other_threads_run_every_block() -> None:
    """While one thread's pass leaves blocks out."""
    lm, tokens = tiny("llama"), some_tokens()
    start = find_start(lm, ["blocks.1.resid_post"])
    assert start is not None
    wanted = lm.logits(tokens)
    inside, seen = threading.Event(), list[Tensor]()
    done = threading.Event()

    def other() -> None:
        inside.wait(10)
        seen.append(lm.logits(tokens))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def edit(x: Tensor) -> Tensor:
        inside.set()
        done.wait(10)
        return x

    lm.run(tokens, {"blocks.1.resid_post": edit}, skip=start.skip(torch.zeros(2, 9, 16)))
    thread.join()
    assert torch.equal(seen[0], wanted)
    assert torch.equal(lm.logits(tokens), wanted)


def test_a_pass_that_fails_leaves_no_trace() -> None:
    """Neither its own shadows nor a forward of somebody else's lost."""
    lm, tokens = LanguageModel(raw_model("gpt2"), "own"), some_tokens()
    model: Any = lm.model
    block = model.transformer.h[0]
    inner = block.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    block.forward = own
    start = find_start(lm, ["blocks.1.resid_post"])
    assert start is not None

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match=r"^no$"):
        lm.run(tokens, {"blocks.1.resid_post": broken}, skip=start.skip(torch.zeros(2, 9, 16)))
    assert block.__dict__["forward"] is own
    assert "forward" not in model.transformer.h[1].__dict__
