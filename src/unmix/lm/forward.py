"""One forward pass of a language model (or any module): inputs, packed documents, edits, reads, early exit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm import packing
from unmix.lm.points import Hook
from unmix.lm.sites import Pass, head_columns, put_slice

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

Edit = Callable[[Tensor], Tensor]
"""Maps the activation at a hook `[batch, pos, d]` to what takes its place."""


@dataclass(frozen=True)
class RunOutput:
    """What one pass gave; `logits` is `None` where the pass ended early or the module returned no tensor."""

    logits: Tensor | None
    """[batch, pos, vocab]; of any other module, its output."""
    activations: dict[str, Tensor]
    """Each hook asked for, under the name it was asked by: [batch, pos, d]."""
    cache: Any = None
    """Keys and values so far, where they were asked for."""


def attach_read(current: Pass, hook: Hook, sink: Callable[[Tensor], None]) -> None:
    """Give `sink` the activation at `hook` as it flows on."""

    def handler(value: Tensor) -> None:
        part = _part(hook, value)
        apart = hook.base is not None or (hook.view is not None and hook.view.apart)
        x = part if apart or hook.scale == 1.0 else part * hook.scale
        sink(x if hook.view is None else hook.view.show(x))

    current.read(hook.read, handler)


def attach_write(current: Pass, hook: Hook, edit: Edit, mask: Bool[Tensor, "batch pos"] | None = None) -> None:
    """Replace the activation x at `hook` by `edit(x)`; positions where `mask` is False keep their value bit for bit.

    The edit may return another dtype, or a tensor on another device. Raises `ModelError` during the pass where it
    returns another shape.
    """
    before: list[Tensor] = []
    view = hook.view
    apart = view is not None and view.apart
    if apart:
        current.read(hook.read, before.append)
    elif hook.base is not None:
        current.read(hook.base, before.append)

    def handler(value: Tensor) -> Tensor | None:
        part = _part(hook, value)
        x = part if hook.scale == 1.0 else part * hook.scale
        x = x if hook.base is None else x + before[-1]
        shown = x if view is None else view.show(before[-1] if apart else x)
        new = edit(shown)
        if new is shown:
            return None
        if new.shape != shown.shape:
            raise ModelError(f"{hook.name}: the edit returned {list(new.shape)}, the activation is {list(shown.shape)}")
        new = new.to(value.device)
        same = None if hook.direct else (new == shown).detach()
        new = new if view is None else view.undo(new, x)
        new = new if hook.base is None else new - before[-1]
        new = (new if hook.scale == 1.0 else new / hook.scale).to(value.dtype)
        new = new if same is None else _exactly(part, new, same)
        if mask is not None:
            new = torch.where(mask.unsqueeze(-1), new, part)
        if hook.heads_apart and hook.head is None:
            return new.view(value.shape)
        if hook.head is None:
            return new
        return put_slice(_flat(hook, value), _columns(hook, value), new).view(value.shape)

    current.write(hook.write, handler)


def _exactly(part: Tensor, new: Tensor, same: Tensor) -> Tensor:
    """`new`, but `part` to the bit where the edit changed nothing: on the way there and back it was rounded."""
    return torch.where(same, part.detach() + (new - new.detach()) if new.requires_grad else part, new)


def _flat(hook: Hook, value: Tensor) -> Tensor:
    return value.flatten(-2) if hook.heads_apart and value.ndim == 4 else value


def _part(hook: Hook, value: Tensor) -> Tensor:
    value = _flat(hook, value)
    return value if hook.head is None else value[..., _columns(hook, value)]


def _columns(hook: Hook, value: Tensor) -> slice:
    return head_columns(_flat(hook, value).shape[-1], hook.head or 0, hook.head_size, hook.name)


def as_inputs(lm: LanguageModel, inputs: Any, policy: InputPolicy | None = None) -> Any:
    """Inputs as the model takes them: token ids [batch, pos] int64 on its device; of a plain module, as they are.

    Text is encoded under `policy`; ids get nothing added. `ModelError` for ids outside the vocabulary, contexts
    longer than the model's, and anything that is neither text nor ids.
    """
    if isinstance(inputs, str):
        encoded = lm.encode_text(inputs, policy).unsqueeze(0)
        _check_length(lm, encoded)
        return encoded.to(lm.device)
    if not lm.takes_tokens:
        return inputs.to(lm.device) if isinstance(inputs, Tensor) else inputs
    if isinstance(inputs, (np.ndarray, list, tuple)):
        try:
            inputs = torch.from_numpy(np.asarray(inputs).astype(np.int64, casting="same_kind"))
        except (TypeError, ValueError):
            raise ModelError("inputs must be a text or token ids [pos] or [batch, pos]") from None
    if not isinstance(inputs, Tensor) or inputs.is_floating_point() or inputs.ndim not in (1, 2) or not inputs.numel():
        shown = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ModelError(f"inputs must be a text or token ids [pos] or [batch, pos], found {shown}")
    tokens = inputs.to(torch.int64)
    tokens = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
    _check_tokens(lm, tokens)
    return tokens.to(lm.device)


def _check_tokens(lm: LanguageModel, tokens: Tensor) -> None:
    if tokens.device.type == "cpu":
        # On a card this would wait for the device; there the embedding itself asserts.
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= lm.vocab_size:
            wrong = low if low < 0 else high
            raise ModelError(f"token id {wrong}: {lm.name} has ids 0 to {lm.vocab_size - 1}")
    _check_length(lm, tokens)


def _check_length(lm: LanguageModel, tokens: Tensor) -> None:
    longest = lm.max_context
    if longest is not None and tokens.shape[1] > longest:
        raise ModelError(f"a context of {tokens.shape[1]} tokens: {lm.name} takes at most {longest}")


def as_documents(inputs: Any, documents: Any) -> Tensor | None:
    """Document ids as a tensor beside `inputs`; `None` where every row is one document."""
    if documents is None:
        return None
    ids = documents if isinstance(documents, Tensor) else torch.from_numpy(np.asarray(documents).astype(np.int64))
    ids = ids.to(inputs.device)
    ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
    if ids.shape != inputs.shape:
        raise ModelError(f"documents are {list(ids.shape)}, the tokens are {list(inputs.shape)}")
    return ids if bool((ids != ids[:, :1]).any()) else None


def run(
    lm: LanguageModel,
    inputs: Any,
    prepare: Callable[[Pass], None],
    *,
    documents: Any = None,
    logits: bool = True,
    cache: Any = None,
    use_cache: bool = False,
    last_only: bool = False,
    skip: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[Tensor | None, Any]:
    """Run the model on prepared inputs with the handlers that `prepare` attaches; (logits, cache).

    `extra`: further arguments of the model's own `forward`, those of padded inputs say (see `unmix.lm.padding`).
    `skip`: modules left out by path, and what each gives instead (see `unmix.lm.start`).

    `documents` [batch, pos]: tokens attend only inside their own document and positions restart in each. With
    `logits=False` the pass ends at the last handler's site. `last_only` asks for the last position's logits.
    """
    shape = tuple(inputs.shape) if lm.takes_tokens else None
    current = Pass(lm.names.dispatcher, shape)
    prepare(current)
    current.stop = not logits
    if current.stop and not current.pending:
        return None, None
    arguments, keywords = _call(lm, inputs, as_documents(inputs, documents) if lm.takes_tokens else None)
    if lm.is_transformers:
        keywords["use_cache"] = use_cache
        if cache is not None:
            keywords["past_key_values"] = cache
        if last_only and "logits_to_keep" in lm.forward_parameters:
            keywords["logits_to_keep"] = 1
    keywords |= extra or {}
    output: Any = None
    current.skipped = dict(skip or {})
    with current.dispatcher.skipping(list(current.skipped)), current.running():
        output = lm.model(*arguments, **keywords)
    current.check_seen()
    return _logits(output), getattr(output, "past_key_values", None)


def _call(lm: LanguageModel, inputs: Any, documents: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not lm.takes_tokens:
        if isinstance(inputs, dict):
            return (), dict(inputs)
        return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
    if documents is None:
        return ((), {"input_ids": inputs}) if lm.is_transformers else ((inputs,), {})
    return (), {"input_ids": inputs, **packing.keywords(lm, documents)}


def _logits(output: Any) -> Tensor | None:
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, (tuple, list)) and isinstance(output[0], Tensor) else None


def forward_parameters(model: Any) -> frozenset[str]:
    """Names of the arguments that a model's `forward` takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def select_positions(x: Tensor, positions: Tensor | Sequence[int] | None) -> Tensor:
    """`x` [batch, pos, d] at places [n] → [batch, n, d], or where a bool mask [batch, pos] is true → [kept, d]."""
    if positions is None:
        return x
    chosen = positions if isinstance(positions, Tensor) else torch.tensor(positions, dtype=torch.int64)
    chosen = chosen.to(x.device)
    return x[chosen] if chosen.dtype == torch.bool else x[:, chosen]


def put(values: Tensor, mask: Bool[Tensor, "batch pos"]) -> Edit:
    """An edit that puts `values` ([n, d] in the order of the mask's true positions, or [d] for all) there.

    Masked positions keep their activation. Gradients flow to `values`.
    """
    where = mask.to(values.device)

    def edit(x: Tensor) -> Tensor:
        new = x.clone()
        new[where] = values.to(x.dtype)
        return new

    return edit
