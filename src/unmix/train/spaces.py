"""The space where the decoder writes."""

from __future__ import annotations

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig


def inner_target(config: CoderConfig, s: Tensor, target: Tensor, context: dict[str, Tensor]) -> Tensor:
    """What the decoder's sum should be [rows, d_out]: the target before de-normalisation and output scale.

    `s` is the prepared input, `target` the raw one, `context` what `prepare` handed out.
    """
    if config.reads == config.writes:
        return s
    wanted = target
    rule = config.normalise
    if rule.kind != "none" and rule.restore:
        std = context["std"] + rule.eps if rule.eps_back else context["std"]
        # A constant input (std 0) comes back as its mean whatever the decoder says: nothing to learn there.
        centred = wanted - context["mean"] if "mean" in context else wanted
        wanted = torch.where(std > 0, centred / std, 0.0)
    return wanted / config.output_scale
