"""The space where the decoder writes."""

from __future__ import annotations

from torch import Tensor

from unmix.coder.config import CoderConfig


def inner_target(config: CoderConfig, s: Tensor, target: Tensor, context: dict[str, Tensor]) -> Tensor:
    """What the decoder's sum should be [rows, d_out]: the target before de-normalisation and output scale.

    `s` is the prepared input, `target` the raw one, `context` what `prepare` handed out.
    """
    if config.reads == config.writes:
        return s
    wanted = target
    if config.normalise.kind != "none" and config.normalise.restore:
        wanted = (wanted - context["mean"]) / context["std"]
    return wanted / config.output_scale
