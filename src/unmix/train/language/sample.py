"""Text that a small model writes by itself: one token after the other, drawn from a seed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.core.policy import InputPolicy
from unmix.core.seeds import derive
from unmix.data.policy import resolve_policy
from unmix.lm.model import LanguageModel
from unmix.train.language.config import SampleConfig


def write_samples(lm: LanguageModel, spec: SampleConfig, policy: InputPolicy, seed: int) -> list[str]:
    """Each prompt with what follows it, until `spec.tokens` tokens or the end of the text."""
    fed = resolve_policy(policy, lm.tokenizer)
    return [continued(lm, prompt, spec, fed, derive(seed, "sample", n)) for n, prompt in enumerate(spec.prompts)]


def continued(lm: LanguageModel, prompt: str, spec: SampleConfig, policy: InputPolicy, seed: int) -> str:
    """`prompt` and its continuation; the context slides where it is full. Costs a forward pass a token."""
    nothing = not prompt and policy.bos == "none"
    # What was fed without a BOS knows beginnings from the separator that ends the document before.
    ids = [policy.separator_id or 0] if nothing else lm.encode_text(prompt, policy).tolist()
    random = torch.Generator().manual_seed(seed)
    written: list[int] = []
    longest = lm.max_context or len(ids) + spec.tokens
    for _ in range(spec.tokens):
        last = lm.logits(torch.tensor([[*ids, *written][-longest:]]))[0, -1]
        token = draw(last.float().cpu(), spec, random)
        if token in (*lm.stop_ids, policy.separator_id):
            break
        written.append(token)
    return prompt + lm.decode(written)


def draw(logits: Float[Tensor, " vocab"], spec: SampleConfig, random: torch.Generator) -> int:
    """One token id: the likeliest at temperature 0, else drawn from the softmax over the `top_k` likeliest."""
    if spec.temperature == 0:
        return int(logits.argmax())
    best = logits.topk(min(spec.top_k or logits.numel(), logits.numel()))
    chosen = torch.multinomial((best.values / spec.temperature).softmax(0), 1, generator=random)
    return int(best.indices[chosen])
