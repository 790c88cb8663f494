"""Text from a spliced model: greedy or sampled, with keys and values cached by the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.core.errors import ConfigError, ModelError
from unmix.lm.intervene import Intervention

if TYPE_CHECKING:
    from unmix.lm.bound import BoundModel


def generate(
    bound: BoundModel,
    tokens: Int[Tensor, "batch pos"],
    max_new_tokens: int = 32,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    interventions: Sequence[Intervention] = (),
    stop_ids: Sequence[int] | None = None,
) -> Int[Tensor, "batch new"]:
    """New ids [batch, new]; shorter than `max_new_tokens` where every row has stopped.

    `temperature` 0 takes the likeliest token. After a row's stop token (`stop_ids`; default: the model's own) it is
    filled with that token. Each call has a random stream of its own from `seed`.
    """
    steps = list(
        stream(
            bound, tokens, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed,
            interventions=interventions, stop_ids=stop_ids,
        )
    )  # fmt: skip
    if not steps:
        return torch.empty(tokens.shape[0], 0, dtype=torch.int64)
    return torch.stack(steps, dim=1)


@torch.no_grad()
def _next(
    logits: Float[Tensor, "batch vocab"], temperature: float, top_k: int | None, random: torch.Generator
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        lowest = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < lowest, float("-inf"))
    # Drawn on the CPU, so that a seed gives the same text on every device with the same probabilities.
    return torch.multinomial(scaled.softmax(dim=-1).cpu(), 1, generator=random)[:, 0].to(logits.device)


def stream(
    bound: BoundModel,
    tokens: Int[Tensor, "batch pos"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    interventions: Sequence[Intervention] = (),
    stop_ids: Sequence[int] | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """As `generate`, one step [batch] at a time; ends once every row has stopped."""
    if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ConfigError("max_new_tokens and temperature must be at least 0, top_k at least 1")
    if not bound.lm.takes_tokens:
        raise ModelError(f"{bound.lm.name} takes no tokens: it cannot generate text")
    acts = bound.checked(interventions)
    stops = torch.tensor(list(bound.lm.stop_ids if stop_ids is None else stop_ids), dtype=torch.int64)
    stops = stops.to(tokens.device)
    random = torch.Generator().manual_seed(seed)
    prompt, context, cache = tokens.shape[1], tokens, None
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    last: Tensor | None = None
    for _ in range(max_new_tokens):
        logits, cache = _step(bound, context, cache, acts, prompt)
        new = _next(logits, temperature, top_k, random)
        new = new if last is None else torch.where(done, last, new)
        yield new
        done, last = done | torch.isin(new, stops), new
        if bool(done.all()):
            return
        context = torch.cat([context, new.unsqueeze(1)], dim=1)


@torch.no_grad()
def _step(
    bound: BoundModel, context: Tensor, cache: Any, acts: Sequence[Intervention], prompt: int
) -> tuple[Tensor, Any]:
    """Logits of the last position. Where the model keeps a cache only what it lacks is run.

    A coder that looks at the tokens before must see them: then every step runs the whole context.
    """
    held = 0 if cache is None else int(cache.get_seq_length())
    if held and bound.sequential:
        held, cache = 0, None
    out = bound.step(
        context[:, held:], None, acts, start=held, prompt=prompt, cache=cache, generating=True
    )  # fmt: skip
    if out.logits is None:
        raise ModelError(f"{bound.lm.name} returned no logits")
    return out.logits[:, -1], out.cache
