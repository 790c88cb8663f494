"""The activation statistics that science-of-finetuning's dictionaries carry, as a fixed standardisation.

(x − mean)·scale, with one scale a hook: `target_rms / √(Σ std² + 1e-8)` unless it is stored; undone after decoding.
NaN in mean or std means that there is none. With `keep_relative_variance: false` it is (x − mean)/(std + 1e-8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmix.core.errors import NonFiniteError
from unmix.formats.draft import Draft
from unmix.formats.folds import replace_config
from unmix.formats.keymap import Found, Stored
from unmix.formats.lazy import Lazy

MEAN, STD, SCALE, RMS = "activation_mean", "activation_std", "activation_global_scale", "target_rms"
KEYS = (MEAN, STD, SCALE, RMS)
_EPS = 1e-8


def statistics_keymap(dims: tuple[str, ...], scale_dims: tuple[str, ...]) -> tuple[Stored, ...]:
    """Their tensors: mean and std of `dims`, the scale of `scale_dims`. None of them needs to be there."""
    return (
        Stored(MEAN, MEAN, dims, kind="statistic"),
        Stored(STD, STD, dims, kind="statistic"),
        Stored(SCALE, SCALE, scale_dims, kind="statistic"),
        Stored(RMS, RMS, (), kind="statistic"),
    )


def standardise(draft: Draft, found: Found, keep_relative_variance: bool = True) -> Draft:
    """The draft with the standardisation that its file holds, if any. `NonFiniteError` for a scale that is not one."""
    held = {key: found.statistics[key]().to(torch.float32) for key in KEYS if key in found.statistics}
    if MEAN not in held or STD not in held or bool(held[MEAN].isnan().any() | held[STD].isnan().any()):
        return draft
    scale = _scale(held, keep_relative_variance)
    mean = held[MEAN].reshape(-1)
    if not bool(torch.isfinite(scale).all() and torch.isfinite(mean).all() and (scale != 0).all()):
        raise NonFiniteError(f"{draft.config.name}: the activation statistics give scales of 0, NaN or infinity")
    changed = replace_config(draft, normalise=draft.config.normalise.model_copy(update={"kind": "standardise"}))
    changed.state["norm_mean"] = Lazy.of(mean)
    changed.state["norm_scale"] = Lazy.of(scale)
    return changed


def _scale(held: dict[str, Tensor], keep_relative_variance: bool) -> Tensor:
    """The factor of every input [hooks · d]."""
    std = held[STD]
    if not keep_relative_variance:
        return 1 / (std + _EPS).reshape(-1)
    scale = held.get(SCALE)
    if scale is None:
        scale = held.get(RMS, torch.tensor(1.0)) / (std.square().sum(-1) + _EPS).sqrt()
    return (scale.unsqueeze(-1) * torch.ones_like(std)).reshape(-1)
