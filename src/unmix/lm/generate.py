"""Text from a spliced model: greedy or sampled, with keys and values cached by the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from unmix.core.errors import ConfigError, ModelError
from unmix.lm.forward import as_inputs
from unmix.lm.interventions.acts import Intervention
from unmix.lm.padding import checked_mask, pad_left
from unmix.lm.plan import Plan
from unmix.lm.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from unmix.lm.bound import BoundModel


def generate(
    bound: BoundModel,
    tokens: Int[Tensor, "batch pos"],
    max_new_tokens: int = 32,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    interventions: Sequence[Intervention] = (),
    stop_ids: Sequence[int] | None = None,
    attention_mask: Any = None,
) -> Int[Tensor, "batch new"]:
    """New ids [batch, new]; shorter than `max_new_tokens` where every row has stopped.

    The choice of tokens is that of `Sampling`. After a row's stop token (`stop_ids`; default: the model's own) it is
    filled with that token. `attention_mask` [batch, pos] is 0 on padding, which must be on the left. `ConfigError` and
    `ModelError` before any pass: options or interventions that do not fit, more tokens than the model's context holds.
    """
    steps = list(
        stream(
            bound, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, frequency_penalty=frequency_penalty, seed=seed,
            interventions=interventions, stop_ids=stop_ids, attention_mask=attention_mask,
        )
    )  # fmt: skip
    if not steps:
        return torch.empty(as_inputs(bound.lm, tokens, bound.policy).shape[0], 0, dtype=torch.int64)
    return torch.stack(steps, dim=1)


def stream(
    bound: BoundModel,
    tokens: Int[Tensor, "batch pos"],
    max_new_tokens: int,
    *,
    interventions: Sequence[Intervention] = (),
    stop_ids: Sequence[int] | None = None,
    attention_mask: Any = None,
    **sampling: Any,
) -> Iterator[Int[Tensor, " batch"]]:
    """As `generate`, one step [batch] at a time; ends once every row has stopped.

    Everything is checked at the call, before the first step is asked for.
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if not bound.lm.takes_tokens:
        raise ModelError(f"{bound.lm.name} takes no tokens: it cannot generate text")
    rule = _sampling(sampling)
    tokens = as_inputs(bound.lm, tokens, bound.policy)
    mask = checked_mask(bound.lm, tokens, attention_mask)
    if mask is not None and not bool(mask[:, -1].all()):
        raise ModelError("prompts of different lengths are padded on the left for generation")
    _check_room(bound, tokens.shape[1], max_new_tokens)
    return _steps(bound, tokens, mask, max_new_tokens, rule, bound.plan(interventions), _stops(bound, stop_ids))


def _steps(
    bound: BoundModel,
    context: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    rule: Sampling,
    plan: Plan,
    stops: Tensor,
) -> Iterator[Tensor]:
    sampler = Sampler(rule, context, mask)
    prompt, cache = context.shape[1], None
    done = torch.zeros(context.shape[0], dtype=torch.bool, device=context.device)
    last: Tensor | None = None
    for _ in range(max_new_tokens):
        logits, cache = _step(bound, context, mask, cache, plan, prompt)
        new = sampler(logits)
        new = new if last is None else torch.where(done, last, new)
        yield new
        done, last = done | torch.isin(new, stops), new
        if bool(done.all()):
            return
        context = torch.cat([context, new.unsqueeze(1)], dim=1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


@torch.no_grad()
def _step(
    bound: BoundModel, context: Tensor, mask: Tensor | None, cache: Any, plan: Plan, prompt: int
) -> tuple[Tensor, Any]:
    """Logits of the last position. Where the model keeps a cache only what it lacks is run.

    A coder that looks at the tokens before must see them: then every step runs the whole context.
    """
    held = 0 if cache is None else int(cache.get_seq_length())
    if held and bound.sequential:
        held, cache = 0, None
    out = bound.step(
        context[:, held:], None, plan, start=held, prompt=prompt, cache=cache, generating=True, padding=mask
    )  # fmt: skip
    if out.logits is None:
        raise ModelError(f"{bound.lm.name} returned no logits")
    return out.logits[:, -1], out.cache


def generate_texts(bound: BoundModel, prompts: Sequence[str], max_new_tokens: int = 32, **options: Any) -> list[str]:
    """What follows each prompt, up to its stop token; prompts of different lengths run as one padded batch."""
    if not prompts:
        return []
    encoded = [as_inputs(bound.lm, prompt, bound.policy)[0] for prompt in prompts]
    stops = _stops(bound, options.get("stop_ids"))
    tokens, mask = pad_left(encoded, _pad_id(bound))
    new = generate(bound, tokens, max_new_tokens, attention_mask=mask, **options)
    return [
        _continued(bound, _tail(before), _before_stop(row, stops).tolist())
        for before, row in zip(encoded, new, strict=True)
    ]


def stream_text(bound: BoundModel, prompt: str, max_new_tokens: int = 32, **options: Any) -> Iterator[str]:
    """Generated text, piece by piece; a piece is held back until its characters are whole."""
    tokens = as_inputs(bound.lm, prompt, bound.policy)
    stops = _stops(bound, options.get("stop_ids")).tolist()
    return _pieces(bound, _tail(tokens[0]), stream(bound, tokens, max_new_tokens, **options), stops)


def _tail(prompt: Int[Tensor, " pos"]) -> list[int]:
    """The ids that a continuation is decoded behind: as many as a character has bytes."""
    return prompt[-4:].tolist()


def _continued(bound: BoundModel, before: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new` behind `before`: alone, sentencepiece's decoder would drop the space that it begins with."""
    return bound.lm.decode([*before, *new])[len(bound.lm.decode(before)) :]


def _pieces(bound: BoundModel, tail: Sequence[int], steps: Iterator[Tensor], stops: Sequence[int]) -> Iterator[str]:
    ids = list(tail)
    settled, given = 0, len(ids)
    for step in steps:
        token = int(step[0])
        if token in stops:
            break
        ids.append(token)
        # Decoding from the last settled token keeps the cost of a piece independent of what was written.
        before = bound.lm.decode(ids[settled:given])
        text = bound.lm.decode(ids[settled:])
        if len(text) > len(before) and not text.endswith("�"):
            yield text[len(before) :]
            settled, given = given, len(ids)
    if given < len(ids):
        yield bound.lm.decode(ids[settled:])[len(bound.lm.decode(ids[settled:given])) :]


def _sampling(options: dict[str, Any]) -> Sampling:
    known = Sampling.__dataclass_fields__
    for name in options:
        if name not in known:
            from unmix.core.errors import did_you_mean

            others = ("interventions", "stop_ids", "attention_mask")
            raise ConfigError(f"unknown option of generation {name!r}. {did_you_mean(name, [*known, *others])}")
    return Sampling(**options)


def _stops(bound: BoundModel, stop_ids: Sequence[int] | None) -> Int[Tensor, " n"]:
    given = list(bound.lm.stop_ids if stop_ids is None else stop_ids)
    return torch.tensor(given, dtype=torch.int64, device=bound.lm.device)


def _before_stop(row: Tensor, stops: Tensor) -> Tensor:
    """The ids before the first stop token."""
    ends = torch.isin(row, stops.to(row.device)).nonzero()
    return row if not len(ends) else row[: int(ends[0])]


def _pad_id(bound: BoundModel) -> int:
    """An id for places that nothing looks at."""
    found = getattr(bound.lm.tokenizer, "pad_token_id", None) if bound.lm.has_tokenizer else None
    return int(found) if found is not None else 0


def _check_room(bound: BoundModel, prompt: int, new: int) -> None:
    """The last new token is never fed back."""
    longest = bound.lm.max_context
    if longest is not None and new > 0 and prompt + new - 1 > longest:
        raise ModelError(
            f"a prompt of {prompt} tokens and {new} new ones: {bound.lm.name} takes at most {longest} in a context"
        )
