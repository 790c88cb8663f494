"""Training that goes on from a coder that is there: fine-tuning, under another objective or on other text."""

from __future__ import annotations

import torch

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, NonFiniteError
from unmix.train.config import OptimConfig, holds_unit_norm
from unmix.train.initialise import variance_of
from unmix.train.source import ActivationSource

_ALIKE = ("d_in", "width_out", "n_latents", "pre_bias", "gate_space", "skip")
_UNIT = 1e-3
"""How far a decoder row's norm may be from 1 to count as 1."""


def saved_start(config: CoderConfig, optim: OptimConfig) -> SparseCoder:
    """The coder at `optim.start_from` (any format) under `config`, with its own normalisation and scales.

    `ConfigError` where it is of other sizes or another kind than `config` says, or where decoder rows are to be held at
    norm 1 and its are not; and what `load` raises.
    """
    from unmix.formats import load

    place = str(optim.start_from)
    loaded = load(place)
    theirs = {name: getattr(loaded.config, name) for name in _ALIKE} | {"activation": loaded.config.activation.kind}
    ours = {name: getattr(config, name) for name in _ALIKE} | {"activation": config.activation.kind}
    wrong = [f"{name} is {ours[name]} here and {theirs[name]} there" for name in ours if ours[name] != theirs[name]]
    if wrong:
        raise ConfigError(f"{config.name}: cannot begin with {place}: {'; '.join(wrong)}")
    norms = loaded.W_dec.detach().float().norm(dim=-1)
    if holds_unit_norm(config.activation.kind, optim) and bool(((norms - 1).abs() > _UNIT).any()):
        raise ConfigError(
            f"{config.name}: cannot begin with {place}: its decoder rows have norms of {float(norms.min()):.3g} to "
            f"{float(norms.max()):.3g}, and training holds them at 1; say train.unit_norm: false"
        )
    kept = {name: getattr(loaded.config, name) for name in ("normalise", "input_scale", "output_scale")}
    state = {name: tensor.detach().float().clone() for name, tensor in loaded.state_dict().items()}
    return SparseCoder.from_state(config.model_copy(update=kept), state)


@torch.no_grad()
def begin_with(config: CoderConfig, source: ActivationSource, optim: OptimConfig) -> tuple[SparseCoder, float]:
    """`(coder, variance)` as `initialise`, with the weights of a coder that is there."""
    coder = saved_start(config, optim)
    x, target = source.batch(0, min(optim.init_rows, source.n_rows))
    if not bool(torch.isfinite(x).all() and torch.isfinite(target).all()):
        raise NonFiniteError(f"{config.name}: the first activations hold NaN or infinity")
    return coder, variance_of(coder, x, target)
