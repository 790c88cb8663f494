"""Writing a coder as a crosscoder folder of science-of-finetuning's fork, in the form that it pulls from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unmix.core.atomic import write_json
from unmix.formats.draft import Draft
from unmix.formats.equivalents import origin, raw_gate, refuse, refuse_unless, write_hooks
from unmix.formats.folds import fold_input_bias, fold_scales
from unmix.formats.layouts.activation_statistics import MEAN, RMS, SCALE, STD
from unmix.formats.layouts.dictionary_learning_crosscoder import CONFIG, NORMALISATIONS, WEIGHTS
from unmix.formats.lazy import Lazy, apply
from unmix.formats.stores import write_safetensors

_FORMAT = "dictionary_learning_crosscoder"
_IDS = {"decoder_norm_sum": 1, "decoder_norm": 2, "raw": 4}


def write_crosscoder(draft: Draft, folder: Path) -> None:
    """Write `model.safetensors` and `config.json` in float32; outputs are those of the coder.

    One scale a hook is kept as activation statistics, anything else of a standardisation is folded. A gate on a stored
    factor is moved into the codes. `FormatError` for what the layout has no field for.
    """
    config = draft.config
    refuse_unless(draft, _FORMAT, ("relu", "batchtopk"))
    if config.reads != config.writes:
        raise refuse(draft, _FORMAT, "a coder that writes other hooks than it reads")
    hooks = len(config.reads)
    if config.d_in % hooks or set(config.parts()) != {config.d_in // hooks}:
        raise refuse(draft, _FORMAT, f"hooks of different widths, found {list(config.parts())}")
    if config.skip:
        raise refuse(draft, _FORMAT, "a skip matrix")
    # Without statistics the peer makes its own, which say that there are none.
    fixed = _statistics(draft, hooks)
    draft = draft if fixed else fold_scales(draft)
    draft = fold_input_bias(draft)
    if config.activation.kind == "relu" or draft.config.gate_space not in _IDS:
        draft = raw_gate(draft)
    write_json(folder / CONFIG, _config(draft, hooks))
    write_safetensors(folder / WEIGHTS, _tensors(draft, hooks, fixed), {"format": "pt"})
    write_hooks(draft, folder)


def _statistics(draft: Draft, hooks: int) -> dict[str, Lazy]:
    """The statistics that say this coder's standardisation; empty where there is none, or it must be folded."""
    config, state = draft.config, draft.state
    if config.normalise.kind != "standardise" or not config.normalise.restore:
        return {}
    if config.input_scale != 1.0 or config.output_scale != 1.0:
        return {}
    mean = state["norm_mean"]().reshape(hooks, -1)
    scales = state["norm_scale"]().reshape(hooks, -1)
    if not bool((scales == scales[:, :1]).all() and (scales > 0).all()):
        return {}
    scale = torch.tensor(scales[:, 0].tolist())
    # Any deviations that add up to the scale will do: the peer reads the scale itself.
    std = (1 / scale / scales.shape[1] ** 0.5)[:, None].expand_as(mean).clone()
    made = {MEAN: mean.clone(), STD: std, SCALE: scale, RMS: torch.tensor(1.0)}
    return {key: Lazy.of(value) for key, value in made.items()}


def _tensors(draft: Draft, hooks: int, fixed: dict[str, Lazy]) -> dict[str, Lazy]:
    state = draft.state
    stored = {
        "encoder.weight": apply(lambda W: W.unflatten(1, (hooks, -1)).permute(1, 2, 0), state["W_enc"]),
        "encoder.bias": state["b_enc"],
        "decoder.weight": apply(lambda W: W.unflatten(1, (hooks, -1)).permute(1, 0, 2), state["W_dec"]),
        "decoder.bias": apply(lambda b: b.unflatten(0, (hooks, -1)), state["b_dec"]),
        "code_normalization_id": Lazy.of(torch.tensor(_number(draft))),
        **fixed,
    }
    if draft.config.activation.kind == "batchtopk":
        k = getattr(draft.config.activation, "k", 0)
        stored |= {"k": Lazy.of(torch.tensor(k, dtype=torch.int32)), "threshold": state["threshold"]}
    return stored


def _number(draft: Draft) -> int:
    """The id of the gate's factor; of relu codes, the one that was trained with."""
    if draft.config.activation.kind == "relu":
        return int(origin(draft, _FORMAT).get("code_normalization_id", 1))
    return _IDS[draft.config.gate_space]


def _config(draft: Draft, hooks: int) -> dict[str, Any]:
    config = draft.config
    known: dict[str, Any] = {
        "activation_dim": config.d_in // hooks,
        "dict_size": config.n_latents,
        "num_layers": hooks,
        "code_normalization": NORMALISATIONS[_number(draft) - 1],
    }
    if config.activation.kind == "batchtopk":
        known["k"] = getattr(config.activation, "k", 0)
    return known
