"""First weights: scale and centre from a first sample, so that training starts where the data is."""

from __future__ import annotations

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, NonFiniteError
from unmix.train.config import OptimConfig
from unmix.train.objectives.decoding import is_crosscoder
from unmix.train.source import ActivationSource
from unmix.train.spaces import inner_target


@torch.no_grad()
def initialise(config: CoderConfig, source: ActivationSource, optim: OptimConfig) -> tuple[SparseCoder, float]:
    """A fresh coder with fixed scales so that E‖x‖ = √d, `b_dec` at the geometric median, and the loss's unit.

    `standardise` gives each hook that scale.

    Returns `(coder, variance)`: the mean squared distance of a (scaled) target from the mean target.
    Raises `NonFiniteError` where the sample holds NaN or infinity, and `ConfigError` where the source has a target of
    its own but the coder writes what it reads.
    """
    x, target = source.batch(0, min(optim.init_rows, source.n_rows))
    if not bool(torch.isfinite(x).all() and torch.isfinite(target).all()):
        raise NonFiniteError(f"{config.name}: the first activations hold NaN or infinity")
    if config.reads == config.writes and not torch.equal(x, target):
        raise ConfigError(f"{config.name}: reads and writes {config.reads[0]!r}, but the target is not the input")
    update: dict[str, float] = {}
    if config.normalise.kind == "none":
        update["input_scale"] = scale_of(x)
        same = config.reads == config.writes
        update["output_scale"] = 1.0 / (update["input_scale"] if same else scale_of(target))
    coder = SparseCoder(config.model_copy(update=update), seed=optim.seed)
    if config.normalise.kind == "standardise":
        set_standard(coder, x)
    s, context = coder.prepare(x)
    wanted = inner_target(coder.config, s, target, context)
    coder.b_dec.copy_(geometric_median(wanted))
    if coder.config.pre_bias == "own":
        coder.b_pre.copy_(geometric_median(s))
    return coder, variance_of(coder, x, target)


@torch.no_grad()
def variance_of(coder: SparseCoder, x: Tensor, target: Tensor) -> float:
    """Mean squared distance of a target, in the coder's inner space, from the mean target."""
    s, context = coder.prepare(x)
    wanted = inner_target(coder.config, s, target, context)
    return max(float((wanted - wanted.mean(0)).square().sum(-1).mean()), 1e-12)


@torch.no_grad()
def set_standard(coder: SparseCoder, x: Tensor) -> None:
    """`norm_mean` to the mean of the sample, `norm_scale` so that what each hook adds has a mean norm of √(its width).

    One number a hook: inside one, directions keep their proportions.
    """
    config = coder.config
    widths = config.parts() if is_crosscoder(config) else (config.d_in,)
    coder.norm_mean.copy_(x.mean(0))
    scales = [torch.full((part.shape[-1],), scale_of(part)) for part in (x - x.mean(0)).split(list(widths), dim=-1)]
    coder.norm_scale.copy_(torch.cat(scales))


def scale_of(x: Tensor) -> float:
    """Factor that brings the mean norm of rows to √d."""
    return float(x.shape[-1] ** 0.5 / x.norm(dim=-1).double().mean().clamp_min(1e-12))


def geometric_median(x: Tensor, steps: int = 20) -> Tensor:
    """The point [d] with the least summed distance to the rows of `x` (Weiszfeld's iteration)."""
    guess = x.mean(0)
    for _ in range(steps):
        weights = 1.0 / (x - guess).norm(dim=-1, keepdim=True).clamp_min(1e-6)
        guess = (x * weights).sum(0) / weights.sum()
    return guess
