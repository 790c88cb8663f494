"""OpenSAE's interventions, written out here by hand from what its wrapper does, and how each is said in `unmix`.

Its wrapper replaces the output of a layer by decode(encode(x)) at every token, after changing the k kept entries of
each: `multiply` scales a latent where it is kept; `set` and `add` do so too, and where the latent is not kept it takes
the place of the smallest kept one. With `prompt_only` nothing at all is done once the prompt has run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unmix
from unmix.core.policy import InputPolicy

from .fakes import topk_coder
from .families import raw_model, some_tokens, tiny

LATENTS = [5, 17, 3]


def theirs(indices: Tensor, values: Tensor, mode: str, amount: float) -> tuple[Tensor, Tensor]:
    """Kept entries [tokens, k] after the intervention."""
    indices, values = indices.clone(), values.clone()
    for latent in LATENTS:
        for row in range(len(indices)):
            kept = (indices[row] == latent).nonzero().flatten().tolist()
            for slot in kept:
                values[row, slot] = {
                    "set": amount, "add": values[row, slot] + amount, "multiply": values[row, slot] * amount,
                }[mode]  # fmt: skip
            if not kept and mode != "multiply":
                slot = int(values[row].argmin())
                indices[row, slot], values[row, slot] = latent, amount
    return indices, values


def ours(mode: str, amount: float, where: Any = "all") -> unmix.Set | unmix.Add | unmix.Multiply:
    """The table of docs/intervening.md."""
    if mode == "multiply":
        return unmix.Multiply(latent=LATENTS, factor=amount, where=where)
    kind = unmix.Set if mode == "set" else unmix.Add
    return kind(latent=LATENTS, value=amount, where=where, evict=True)


@pytest.mark.parametrize(("mode", "amount"), [("set", 8.0), ("set", 0.0), ("add", 2.5), ("multiply", 3.0)])
@pytest.mark.parametrize("prompt_only", [False, True])
def test_each_mode_one_to_one(mode: str, amount: float, prompt_only: bool) -> None:
    lm = tiny("llama")
    coder = topk_coder("layers.1", 16, k=6, input_policy=InputPolicy(bos="none", skip_first=0))
    model = raw_model("llama").requires_grad_(False)
    prefilling = True

    def wrapper(_module: Any, _inputs: Any, output: Any) -> Any:
        nonlocal prefilling
        if prompt_only and not prefilling:
            return output
        prefilling = False
        x = output if isinstance(output, Tensor) else output[0]
        codes = coder.encode(x.reshape(-1, 16))
        indices, values = theirs(*codes.topk_view(), mode, amount)
        dense = torch.zeros(len(indices), 24).scatter_add_(1, indices.long(), values)
        y = (dense @ coder.W_dec + coder.b_dec).view_as(x)
        return y if isinstance(output, Tensor) else (y, *output[1:])

    handle = model.model.layers[1].register_forward_hook(wrapper)
    with torch.no_grad():
        expected = model.generate(
            some_tokens(1, 6), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        prefilling = True
        logits = model(input_ids=some_tokens(1, 6)).logits
    handle.remove()
    where = "prompt" if prompt_only else "all"
    with lm.bind(coder, error="drop", where=where, interventions=[ours(mode, amount)]) as bound, torch.no_grad():
        torch.testing.assert_close(bound(some_tokens(1, 6)).logits, logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(bound.generate_tokens(some_tokens(1, 6), 10, stop_ids=()), expected[:, 6:])
