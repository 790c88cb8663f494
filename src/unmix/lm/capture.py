"""Activations at many hooks in one pass that ends at the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm.forward import as_inputs, attach_read, run, select_positions
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
) -> dict[str, Tensor]:
    """See `LanguageModel.capture`."""
    specs = [hooks] if isinstance(hooks, str) else list(hooks)
    wanted = {spec: lm.hook(spec) for spec in specs}
    found: dict[str, Tensor] = {}

    def prepare(current: Pass) -> None:
        for spec, hook in wanted.items():
            # `setdefault`: of a module that runs twice in a pass, the first run counts, whatever ends the pass.
            attach_read(current, hook, lambda x, s=spec: _keep(found, s, select_positions(x, positions)))

    apart = documents if policy is None or not policy.attend_across else None
    run(lm, as_inputs(lm, inputs, policy), prepare, documents=apart, logits=False)
    return {spec: found[spec] for spec in specs}


def _keep(found: dict[str, Tensor], spec: str, x: Tensor) -> None:
    found.setdefault(spec, x.detach())


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
