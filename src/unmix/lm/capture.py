"""Activations at many hooks in one pass that ends at the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm.forward import as_inputs, attach_read, run, select_positions
from unmix.lm.padding import checked_mask, padding_keywords
from unmix.lm.points import Hook
from unmix.lm.sites import Pass

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel


@torch.no_grad()
def capture(
    lm: LanguageModel,
    inputs: Any,
    hooks: str | Sequence[str],
    policy: InputPolicy | None = None,
    positions: Tensor | Sequence[int] | None = None,
    documents: Any = None,
    attention_mask: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Tensor]:
    """See `LanguageModel.capture`."""
    specs = [hooks] if isinstance(hooks, str) else list(hooks)
    wanted = {spec: lm.hook(spec) for spec in specs}
    found: dict[str, Tensor] = {}

    def keep(spec: str, x: Tensor) -> None:
        # Of a module that runs twice in a pass, the first run counts, whatever ends the pass.
        if spec not in found:
            found[spec] = _owned(select_positions(x, positions)).to(device=device, dtype=dtype)

    def prepare(current: Pass) -> None:
        for spec, hook in wanted.items():
            attach_read(current, hook, lambda x, s=spec: keep(s, x))

    prepared = as_inputs(lm, inputs, policy)
    mask = checked_mask(lm, prepared, attention_mask)
    apart = documents if policy is None or not policy.attend_across else None
    if apart is not None and mask is not None:
        raise ModelError("packed documents and padding do not go together: give one of the two")
    run(lm, prepared, prepare, documents=apart, logits=False, extra=padding_keywords(lm, mask, 0))
    return {spec: found[spec] for spec in specs}


def _owned(x: Tensor) -> Tensor:
    """`x` without the memory of what it was cut out of."""
    x = x.detach()
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def measure_width(lm: LanguageModel, hook: Hook) -> int:
    """Width at a hook: by running one token, or for a plain module from its own sizes."""
    if lm.takes_tokens:
        return int(capture(lm, torch.zeros(1, 1, dtype=torch.int64), hook.name)[hook.name].shape[-1])
    module: nn.Module = lm.names.dispatcher.module(hook.read.path)
    sizes = ("in_features", "in_channels") if hook.read.side == "in" else ("out_features", "embedding_dim")
    for attribute in (*sizes, "normalized_shape"):
        size = getattr(module, attribute, None)
        if size is not None:
            return int(size[-1]) if isinstance(size, (tuple, list)) else int(size)
    raise ModelError(
        f"{hook.name}: {type(module).__name__} does not say how wide it is; hook the Linear or norm beside it"
    )
