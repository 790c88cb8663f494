"""Writing a coder as a SAELens v6 inference folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from unmix.coder.config import BatchTopK, CoderConfig, JumpReLU, Normalise, ReLU, TopK
from unmix.core.atomic import write_json
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.folds import batchtopk_as_jumprelu, fold_scales, unit_decoder
from unmix.formats.hook_names import to_transformer_lens
from unmix.formats.keymap import write_state
from unmix.formats.sae_lens import CFG, KINDS, WEIGHTS
from unmix.formats.stores.writing import write_safetensors

log = logging.getLogger("unmix")


def write_sae_lens(draft: Draft, folder: Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` in float32; outputs are those of the coder.

    Batch top-k is written as jumprelu with its threshold, as SAELens does. Own input biases and fixed scales are
    folded into the weights. A gate in decoder-norm space has the norms folded: codes are then z·‖w_dec‖.
    `FormatError` for what SAELens has no field for.
    """
    config = draft.config
    architecture = _architecture(config)
    normalisation = _normalisation(config)
    if config.gate_space != "raw":
        log.info("%s: decoder norms are folded in: the written coder's codes are z·‖w_dec‖", config.name)
        draft = unit_decoder(draft)
    draft = batchtopk_as_jumprelu(draft)
    plain = config.input_scale == config.output_scale == 1.0 and config.normalise.kind != "standardise"
    if not (plain and config.pre_bias in ("none", "tied")) or KINDS[architecture].transcoder:
        draft = fold_scales(draft)
    write_json(folder / CFG, _cfg(config, architecture, normalisation, draft.config.pre_bias == "tied"))
    write_safetensors(folder / WEIGHTS, write_state(draft.state, KINDS[architecture].keymap))


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
    if rule.kind in ("none", "standardise"):
        return "none"
    if rule != Normalise(kind="layer_norm"):
        raise _cannot(config, f"layer_norm with {rule!r}; it knows {Normalise(kind='layer_norm')!r}")
    if config.writes != config.reads or config.width_out != config.d_in or config.skip:
        raise _cannot(config, "a transcoder with layer_norm")
    return "layer_norm"


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
