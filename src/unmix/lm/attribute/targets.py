"""What is attributed: one number a context, from the logits at one position or from all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.core.errors import ConfigError, ModelError, did_you_mean

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

Kind = Literal["logit", "logprob", "logit_difference", "loss"]
Function = Callable[[Tensor], Tensor]
"""Logits [batch, pos, vocab] to one value a context [batch]."""
Token = str | int
Target = Token | Sequence[Token] | Tensor | Function | None


@dataclass(frozen=True)
class Metric:
    """One number for each context of a batch; larger is more of it (of a loss: worse)."""

    name: str
    kind: Kind | Literal["function"]
    position: int | None
    """The place whose logits are looked at, from 0; `None` where all are needed."""
    target: Tensor | None = None
    """Token ids [contexts]."""
    against: Tensor | None = None
    tokens: Tensor | None = None
    """The contexts themselves [contexts, pos]; what `loss` predicts."""
    function: Function | None = None

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], rows: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Values [batch], float32; `rows` says which context each row of `logits` belongs to.

        Where `position` is set, `logits` holds that position alone. Raises `ModelError` where a user's function
        returns another shape than [batch].
        """
        if self.function is not None:
            found = self.function(logits)
            if not isinstance(found, Tensor) or (found.numel() != len(logits)):  # pyright: ignore[reportUnnecessaryIsInstance]
                shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ModelError(f"the target function must return one value a context, [{len(logits)}], found {shown}")
            return found.reshape(-1).float()
        logits = logits.float()
        if self.kind == "loss":
            chosen = _need(self.tokens)[rows].to(logits.device)
            scores = logits[:, :-1].log_softmax(-1)
            return -scores.gather(-1, chosen[:, 1:, None]).squeeze(-1).mean(-1)
        last = logits[:, 0]
        target = _need(self.target)[rows].to(last.device)[:, None]
        if self.kind == "logprob":
            return last.log_softmax(-1).gather(-1, target).squeeze(-1)
        found = last.gather(-1, target).squeeze(-1)
        if self.kind == "logit":
            return found
        return found - last.gather(-1, _need(self.against)[rows].to(last.device)[:, None]).squeeze(-1)


def make_metric(
    lm: LanguageModel, tokens: Tensor, target: Target, against: Target = None, kind: str | None = None,
    position: int = -1,
) -> Metric:  # fmt: skip
    """The metric that the arguments mean, checked before any pass (one pass is run where no target is given).

    `target`: a token (text or id), one for each context, or a function of the logits. Without one it is the token
    that the model finds likeliest. `kind` defaults to `logit_difference` where `against` is given, else `logit`.
    Raises `ConfigError` or `ModelError`: an unknown kind, a text of several tokens, a place outside the context.
    """
    if callable(target) and not isinstance(target, Tensor):
        if kind is not None or against is not None:
            raise ConfigError("a target function is the whole metric: `metric` and `against` cannot go with it")
        return Metric(getattr(target, "__name__", "function"), "function", None, function=target)
    kind = kind or ("logit_difference" if against is not None else "logit")
    kinds = get_args(Kind)
    if kind not in kinds:
        raise ConfigError(f"metric is {kind!r}. {did_you_mean(kind, kinds)}")
    chosen = cast("Kind", kind)
    if (chosen == "logit_difference") != (against is not None):
        raise ConfigError(f"metric {chosen}: `against` is what a logit difference is taken to, and only that")
    if chosen == "loss":
        if target is not None:
            raise ConfigError("metric loss is that of the prompt's own tokens: no target goes with it")
        if tokens.shape[1] < 2:
            raise ConfigError("metric loss needs a prompt of two tokens or more")
        return Metric("loss", "loss", None, tokens=tokens)
    place = _place(position, tokens.shape[1])
    wanted = _likeliest(lm, tokens, place) if target is None else token_ids(lm, target, len(tokens))
    other = None if against is None else token_ids(lm, against, len(tokens))
    names = [_shown(lm, ids) for ids in (wanted, other) if ids is not None]
    return Metric(f"{chosen.replace('_', ' ')} of {' − '.join(names)}", chosen, place, wanted, other)


def token_ids(lm: LanguageModel, given: Any, contexts: int) -> Int[Tensor, " contexts"]:
    """One token id for each context, from a text, an id, or one of either for each.

    `ModelError` for a text that is not one token, an id outside the vocabulary, or another number of them.
    """
    if isinstance(given, Tensor):
        given = given.reshape(-1).tolist()
    each: list[Any] = [given] * contexts if isinstance(given, (str, int)) else list(given)
    if len(each) == 1:
        each = each * contexts
    if len(each) != contexts:
        raise ModelError(f"{len(each)} target tokens for {contexts} prompts: give one, or one a prompt")
    return torch.tensor([token_id(lm, one) for one in each], dtype=torch.int64)


def token_id(lm: LanguageModel, given: str | int) -> int:
    """The id of a token given as text or id; `ModelError` as for `token_ids`."""
    if isinstance(given, int):
        if not 0 <= given < lm.vocab_size:
            raise ModelError(f"token id {given}: {lm.name} has ids 0 to {lm.vocab_size - 1}")
        return given
    ids: list[int] = list(lm.tokenizer(given, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        parts = ", ".join(repr(part) for part in lm.token_strings(ids))
        raise ModelError(f"target {given!r} is {len(ids)} tokens ({parts}), expected one: name one of them")
    return int(ids[0])


def _place(position: int, length: int) -> int:
    if not -length <= position < length:
        raise ModelError(f"position {position}: the prompt has {length} tokens, so places are 0 to {length - 1}")
    return position % length


def _likeliest(lm: LanguageModel, tokens: Tensor, place: int) -> Tensor:
    return lm.logits(tokens[:, : place + 1])[:, -1].argmax(-1).cpu()


def _shown(lm: LanguageModel, ids: Tensor) -> str:
    distinct: list[int] = ids.unique().tolist()
    if len(distinct) > 3:
        return f"{len(distinct)} tokens"
    if lm.has_tokenizer:
        return " | ".join(repr(text) for text in lm.token_strings(distinct))
    return " | ".join(f"token {i}" for i in distinct)


def _need(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
