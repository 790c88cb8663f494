"""Packed documents kept apart: tokens attend inside their own document, positions restart in each.

Transformers reads a block-diagonal mask (sliding windows included) off positions that restart, in most families;
OPT makes a mask of its own first and silently lets documents see each other. So a model is tried once on a few
tokens before it is believed, and given an explicit mask where positions alone do not do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.core.errors import ModelError
from unmix.lm.tokens import document_positions

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

Method = Literal["positions", "mask", "none"]


def keywords(lm: LanguageModel, documents: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
    """Arguments of the model's forward that keep `documents` apart; `ModelError` where this model cannot."""
    method = lm.packing
    if method == "none":
        raise ModelError(
            f"{lm.name}: packed documents cannot be kept apart in this model (attend_across: false); run one document "
            "in each row"
        )
    return _keywords(lm, documents, method)


def find_method(lm: LanguageModel) -> Method:
    """How this model keeps documents apart, found by comparing a packed document with the same one alone."""
    if "position_ids" not in lm.forward_parameters:
        return "none"
    tokens = torch.arange(5, device=lm.device).unsqueeze(0) % lm.vocab_size
    documents = torch.tensor([[0, 0, 0, 1, 1]], device=lm.device)
    alone = _last_stream(lm, tokens[:, 3:], {})
    leaked = float((_last_stream(lm, tokens, {})[:, 3:] - alone).norm())
    methods: list[Method] = ["positions"]
    if lm.sliding_window is None:
        methods.append("mask")
    for method in methods:
        packed = _last_stream(lm, tokens, _keywords(lm, documents, method))[:, 3:]
        if float((packed - alone).norm()) <= 0.05 * leaked:
            return method
    return "none"


@torch.no_grad()
def _last_stream(lm: LanguageModel, tokens: Tensor, extra: dict[str, Any]) -> Tensor:
    from unmix.lm.forward import attach_read
    from unmix.lm.sites import Pass

    found: list[Tensor] = []
    current = Pass(lm.names.dispatcher, tuple(tokens.shape))
    attach_read(current, lm.hook(lm.last_hook), found.append)
    current.stop = True
    with current.running():
        lm.model(input_ids=tokens, use_cache=False, **extra)
    return found[0].float()


def _keywords(lm: LanguageModel, documents: Tensor, method: Method) -> dict[str, Tensor]:
    positions = {"position_ids": document_positions(documents)}
    return positions if method == "positions" else {**positions, "attention_mask": block_mask(documents, lm.dtype)}


def block_mask(documents: Int[Tensor, "batch pos"], dtype: torch.dtype) -> Float[Tensor, "batch 1 pos pos"]:
    """Additive attention mask: 0 where a token sees (itself and earlier ones of its run of one id), else the lowest."""
    starts = torch.zeros_like(documents)
    starts[:, 1:] = (documents[:, 1:] != documents[:, :-1]).to(documents.dtype)
    run = starts.cumsum(dim=1)
    same = run.unsqueeze(2) == run.unsqueeze(1)
    allowed = same & torch.ones_like(same[0]).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=documents.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)
