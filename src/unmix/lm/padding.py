"""Batches of texts of different lengths: padded, with what the model must be told about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmix.core.errors import ModelError

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel


def pad_left(
    prompts: Sequence[Tensor], pad_id: int
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
    """Prompts [pos] of different lengths as one batch, and where its tokens are real (`None`: everywhere)."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt.to(tokens.device)
        mask[row, longest - len(prompt) :] = True
    return tokens, None if bool(mask.all()) else mask


def checked_mask(lm: LanguageModel, tokens: Any, mask: Any) -> Bool[Tensor, "batch pos"] | None:
    """An attention mask as bools on the model's device; `None` where nothing is padding.

    `ModelError` for another shape, a row of nothing but padding, padding inside a text, and models that take none.
    """
    if mask is None:
        return None
    if not lm.is_transformers:
        raise ModelError(f"{lm.name} is no Hugging Face language model: it cannot be told about padding")
    found = torch.as_tensor(mask).to(lm.device).bool()
    found = found.unsqueeze(0) if found.ndim == 1 else found
    if found.shape != tokens.shape:
        raise ModelError(f"attention_mask is {list(found.shape)}, the tokens are {list(tokens.shape)}")
    if bool(found.all()):
        return None
    if not bool(found.any(dim=1).all()):
        raise ModelError("attention_mask leaves a row without any token")
    if bool(((found[:, 1:] != found[:, :-1]).sum(dim=1) > 1).any()):
        raise ModelError("attention_mask has padding inside a text, or on both sides; pad on the left or on the right")
    return found


def padding_keywords(lm: LanguageModel, mask: Bool[Tensor, "batch all"] | None, start: int) -> dict[str, Any]:
    """Arguments of the model's `forward` for the columns from `start` on; `mask` covers those before them too."""
    if mask is None:
        return {}
    keywords: dict[str, Any] = {"attention_mask": mask.long()}
    if "position_ids" in lm.forward_parameters:
        keywords["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:]
    return keywords


def past_padding(lm: LanguageModel, inputs: Any, mask: Any, cache: Any) -> dict[str, Any]:
    """Arguments of the model's `forward` for an attention mask [batch, pos so far], where a cache holds the start."""
    if mask is None:
        return {}
    start = 0 if cache is None else int(cache.get_seq_length())
    whole = inputs.new_empty(inputs.shape[0], start + inputs.shape[1])
    return padding_keywords(lm, checked_mask(lm, whole, mask), start)
