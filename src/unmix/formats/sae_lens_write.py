"""Writing a coder as a SAELens v6 inference folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unmix.coder.config import BatchTopK, CoderConfig, JumpReLU, Normalise, ReLU, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.atomic import atomic_folder, write_json
from unmix.core.errors import FormatError, NonFiniteError
from unmix.formats.hook_names import to_transformer_lens
from unmix.formats.keymap import write_state
from unmix.formats.sae_lens import CFG, KINDS, WEIGHTS
from unmix.formats.transforms import State, fold_decoder_norm, fold_input_bias, fold_scales

log = logging.getLogger("unmix")


def write_sae_lens(coder: SparseCoder, folder: Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` in float32; outputs are those of `coder`.

    Batch top-k is written as jumprelu with its threshold, as SAELens does. Own input biases and fixed scales are
    folded into the weights. A gate in decoder-norm space has the norms folded: codes are then z·‖w_dec‖.
    `FormatError` for what SAELens has no field for; `NonFiniteError` before anything is written.
    """
    config = coder.config
    architecture = _architecture(config)
    normalisation = _normalisation(config)
    state = {name: t.detach().cpu().float() for name, t in coder.state_dict().items()}
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{coder.name}: {name} holds NaN or infinity; nothing was written")
    if config.gate_space == "decoder_norm":
        log.info("%s: decoder norms are folded in: the written coder's codes are z·‖w_dec‖", coder.name)
        state = fold_decoder_norm(state)
    state, subtracts = _without_scales(state, config, architecture)
    state = _threshold_vector(state, config)
    cfg = _cfg(config, architecture, normalisation, subtracts)
    with atomic_folder(folder) as temp:
        write_json(temp / CFG, cfg)
        save_file(write_state(state, KINDS[architecture].keymap), temp / WEIGHTS)


def _architecture(config: CoderConfig) -> str:
    if len(config.reads) != 1 or len(config.writes) != 1:
        raise _cannot(config, f"{len(config.reads)} reads and {len(config.writes)} writes; it knows one of each")
    transcoder = config.writes != config.reads or config.width_out != config.d_in or config.skip
    activation = config.activation
    if isinstance(activation, TopK):
        if activation.relu == "none":
            raise _cannot(config, "signed codes")
        if transcoder:
            raise _cannot(config, "a top-k transcoder")
        return "topk"
    if isinstance(activation, ReLU):
        base = "standard"
    elif isinstance(activation, (JumpReLU, BatchTopK)):
        base = "jumprelu"
    else:
        raise _cannot(config, f"activation {activation.kind!r}")
    if not transcoder:
        return base
    kind = "skip_transcoder" if config.skip else "transcoder"
    return kind if base == "standard" else f"{base}_{kind}"


def _normalisation(config: CoderConfig) -> str:
    rule = config.normalise
    if rule.kind == "none":
        return "none"
    if rule != Normalise(kind="layer_norm"):
        raise _cannot(config, f"layer_norm with {rule!r}; it knows {Normalise(kind='layer_norm')!r}")
    if config.writes != config.reads or config.width_out != config.d_in or config.skip:
        raise _cannot(config, "a transcoder with layer_norm")
    return "layer_norm"


def _without_scales(state: State, config: CoderConfig, architecture: str) -> tuple[State, bool]:
    """The state without fixed scales and own biases, and whether b_dec is subtracted from the input."""
    unit = config.input_scale == 1.0 and config.output_scale == 1.0
    if config.pre_bias == "tied" and unit and not KINDS[architecture].transcoder:
        return state, True
    if config.pre_bias == "tied":
        state = fold_input_bias(state, state["b_dec"])
    elif config.pre_bias == "own":
        state = fold_input_bias(state, state["b_pre"])
    return fold_scales(state, config), False


def _threshold_vector(state: State, config: CoderConfig) -> State:
    if not isinstance(config.activation, BatchTopK):
        return state
    threshold = float(state["threshold"])
    if threshold < 0:
        raise _cannot(config, "a batchtopk coder whose threshold was never calibrated")
    return {**state, "threshold": torch.full((config.n_latents,), threshold)}


def _cfg(config: CoderConfig, architecture: str, normalisation: str, subtracts: bool) -> dict[str, Any]:
    kept: dict[str, Any] = config.training.get("sae_lens") or {}
    hook, head = to_transformer_lens(config.reads[0])
    metadata = {
        **(kept.get("metadata") or {}),
        "hook_name": hook,
        "hook_head_index": head,
        "prepend_bos": config.input_policy.bos != "none",
        "seqpos_slice": [config.input_policy.skip_first, None],
    }
    if config.model is not None:
        metadata["model_name"] = config.model.name
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": subtracts,
        "normalize_activations": normalisation,
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if KINDS[architecture].transcoder:
        cfg["d_out"] = config.width_out
        metadata["hook_name_out"], metadata["hook_head_index_out"] = to_transformer_lens(config.writes[0])
    if isinstance(config.activation, TopK):
        cfg |= {"k": config.activation.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def _cannot(config: CoderConfig, what: str) -> FormatError:
    return FormatError(f"{config.name}: the sae_lens format cannot express {what}")
