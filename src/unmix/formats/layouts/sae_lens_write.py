"""Writing a coder as a SAELens v6 inference folder: `cfg.json`, `sae_weights.safetensors`, `sparsity.safetensors`.

What SAELens has no field for is folded into the weights where that is exact, and refused with the reason where not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unmix.coder.config import CoderConfig, JumpReLU, MatchingPursuit, Normalise, Temporal, TopK
from unmix.core.atomic import write_json
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import origin, raw_gate, refuse
from unmix.formats.folds import batchtopk_as_jumprelu, fold_input_bias, fold_scales, replace_config
from unmix.formats.hook_names import CENTRED, UNBIASED, to_transformer_lens
from unmix.formats.keymap import Stored, write_state
from unmix.formats.layouts.sae_lens import KINDS, RESCALE, SCALAR_RESCALE, temporal_keymap, temporal_scale
from unmix.formats.layouts.sae_lens_parts import CFG, FREQUENCY, RUNNER, SPARSITY, WEIGHTS
from unmix.formats.lazy import apply
from unmix.formats.stores.writing import write_safetensors

log = logging.getLogger("unmix")

VERSION = "6.54.12"
"""The version whose layout is written. Without one SAELens takes a config for one of before version 6."""

_NAMES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu", "gated": "gated",
          "matching_pursuit": "matching_pursuit", "temporal": "temporal"}  # fmt: skip
_MATHS = {"k", "d_out", RESCALE, "architecture", "topk_threshold_lr", "activation_normalization_factor"}
"""Keys of an earlier config that say how it computed: written anew, or no longer true."""
_CARRIED = ("model_class_name", "model_from_pretrained_kwargs", "neuronpedia_id", "sae_lens_training_version")
"""What older configs say at their top, and version 6 under `metadata`."""
_TIED_EPS = 1e-6


@dataclass
class _Layout:
    """One coder as SAELens says it."""

    draft: Draft
    architecture: str
    subtracts: bool
    """Whether b_dec is subtracted from the input."""
    keymap: tuple[Stored, ...]
    fields: dict[str, Any] = field(default_factory=lambda: {})
    """Config fields of this architecture alone."""
    normalise: str = ""
    """`normalize_activations` where it is not what the coder's config says."""


def write_sae_lens(draft: Draft, folder: Path) -> None:
    """Write the folder in float32; outputs are those of the coder.

    Batch top-k is written as jumprelu with its threshold, as SAELens does. Own input biases, fixed scales and a fixed
    standardisation are folded into the weights. Where latents are ranked by z times a factor, the factor is folded too:
    the written codes are that product (matching pursuit with a fixed scale: codes divided by it). `FormatError` for
    what SAELens has no field for.
    """
    architecture, normalise = _architecture(draft), _normalisation(draft)
    if isinstance(draft.config.activation, (MatchingPursuit, Temporal)):
        layout = _tied(draft, architecture)
    else:
        layout = _affine(draft, architecture)
    layout.normalise = layout.normalise or normalise
    write_json(folder / CFG, _cfg(layout))
    write_safetensors(folder / WEIGHTS, write_state(layout.draft.state, layout.keymap))
    _write_facts(draft, folder)


def _architecture(draft: Draft) -> str:
    config, activation = draft.config, draft.config.activation
    if len(config.reads) != 1 or len(config.writes) != 1:
        raise _cannot(draft, f"{len(config.reads)} reads and {len(config.writes)} writes; it knows one of each")
    if activation.kind not in _NAMES:
        raise _cannot(draft, f"activation {activation.kind!r}; it has {', '.join(_NAMES)}")
    name = _NAMES[activation.kind]
    if isinstance(activation, TopK) and activation.relu == "none":
        if not activation.magnitude:
            raise _cannot(draft, "signed codes that are not selected by magnitude")
        name = "abstopk"
    if isinstance(activation, JumpReLU) and activation.keep_max:
        raise _cannot(draft, "a jumprelu that keeps the largest of a token with nothing above its threshold")
    if config.writes == config.reads and config.width_out == config.d_in and not config.skip:
        return name
    if name not in ("standard", "jumprelu"):
        raise _cannot(draft, f"a transcoder with activation {activation.kind!r}; its transcoders have relu or jumprelu")
    kind = "skip_transcoder" if config.skip else "transcoder"
    return kind if name == "standard" else f"{name}_{kind}"


def _normalisation(draft: Draft) -> str:
    config, rule = draft.config, draft.config.normalise
    if rule.kind in ("none", "standardise"):
        return "none"
    transcoder = KINDS[_architecture(draft)].transcoder
    # SAELens undoes the normalisation of an autoencoder, and never that of a transcoder.
    known = Normalise(kind=rule.kind, restore=not transcoder)
    plain = rule if rule.kind == "layer_norm" else rule.model_copy(update={"eps": known.eps, "ddof": known.ddof})
    if plain != known:
        raise _cannot(draft, f"{rule.kind} with {rule!r}; it knows {known!r}")
    if config.skip:
        raise _cannot(draft, f"a skip matrix beside {rule.kind}: its skip reads the raw input")
    return "layer_norm" if rule.kind == "layer_norm" else "constant_norm_rescale"


def _affine(draft: Draft, architecture: str) -> _Layout:
    """One encoder matrix and a rule: everything but the activation can be folded."""
    if draft.config.gate_space != "raw" and isinstance(draft.config.activation, TopK):
        log.info("%s: latents are ranked by z times a factor: the written codes are that product", draft.config.name)
    draft = raw_gate(batchtopk_as_jumprelu(draft))
    config, kind = draft.config, KINDS[architecture]
    fixed = config.input_scale != 1.0 or config.output_scale != 1.0 or config.normalise.kind == "standardise"
    if fixed:
        draft = fold_scales(draft)
    elif config.pre_bias == "own" or (config.pre_bias == "tied" and kind.transcoder):
        draft = fold_input_bias(draft)
    fields: dict[str, Any] = {"d_out": config.width_out} if kind.transcoder else {}
    if isinstance(config.activation, TopK):
        fields = {"k": config.activation.k, RESCALE: False}
    return _Layout(draft, architecture, draft.config.pre_bias == "tied", kind.keymap, fields)


def _tied(draft: Draft, architecture: str) -> _Layout:
    """Matching pursuit and temporal coders: the residual is taken in the input's own units, so little can be folded."""
    config, state = draft.config, draft.state
    name = config.activation.kind
    if config.normalise.kind == "standardise":
        raise _cannot(draft, f"a fixed standardisation before {name}")
    if config.gate_space != "raw":
        raise _cannot(draft, f"a gate on z times a factor in {name}")
    if config.pre_bias == "own":
        raise _cannot(draft, f"an input bias of its own in {name}")
    if bool(state["b_enc"]().any()):
        raise _cannot(draft, f"an encoder bias in {name}")
    if abs(config.input_scale * config.output_scale - 1) > _TIED_EPS:
        raise _cannot(
            draft, f"input_scale {config.input_scale} beside output_scale {config.output_scale} in {name}: it has "
            "one factor, undone on the way back"
        )  # fmt: skip
    return _pursuit(draft, architecture) if isinstance(config.activation, MatchingPursuit) else _temporal(draft)


def _pursuit(draft: Draft, architecture: str) -> _Layout:
    config, state = draft.config, draft.state
    rule = config.activation
    assert isinstance(rule, MatchingPursuit)
    if not torch.equal(state["W_enc"](), state["W_dec"]()):
        raise _cannot(draft, "matching_pursuit whose encoder is not its decoder")
    if config.pre_bias == "none" and bool(state["b_dec"]().any()):
        raise _cannot(draft, "matching_pursuit with a decoder bias that is not subtracted from the input")
    scale, threshold = config.input_scale, rule.residual_threshold
    if scale != 1.0:
        log.info("%s: the fixed scale %g is folded in: the written codes are divided by it", config.name, scale)
        draft = replace_config(draft, input_scale=1.0, output_scale=1.0)
        draft.state["b_dec"] = apply(lambda b: b / scale, state["b_dec"])
        threshold = threshold / scale
    fields = {
        "residual_threshold": threshold,
        "max_iterations": rule.max_iterations,
        "stop_on_duplicate_support": rule.stop_on_duplicate_support,
    }
    return _Layout(draft, architecture, config.pre_bias == "tied", KINDS[architecture].keymap, fields)


def _temporal(draft: Draft) -> _Layout:
    config, state = draft.config, draft.state
    rule = config.activation
    assert isinstance(rule, Temporal)
    if rule.eps != Temporal(z_scale=1.0).eps:
        raise _cannot(draft, f"temporal with eps={rule.eps:g}")
    factor = rule.z_scale / temporal_scale(config.d_in)
    equal = abs(factor - 1) < _TIED_EPS and torch.equal(state["W_enc"](), state["W_dec"]())
    # Tied, SAELens adds b_dec only where it subtracts it.
    tied = equal and (config.pre_bias == "tied" or not bool(state["b_dec"]().any()))
    if not tied and abs(factor - 1) >= _TIED_EPS:
        draft = replace_config(draft)
        draft.state["W_enc"] = apply(lambda W: W * factor, state["W_enc"])
    scaled = config.input_scale != 1.0
    if scaled and config.normalise.kind != "none":
        raise _cannot(draft, f"input_scale {config.input_scale} after {config.normalise.kind} in temporal")
    fields = {
        "n_heads": rule.n_heads,
        "n_attn_layers": rule.n_layers,
        "bottleneck_factor": rule.bottleneck,
        "sae_diff_type": "relu" if rule.k is None else "topk",
        "kval_topk": rule.k,
        "tied_weights": tied,
        "activation_normalization_factor": config.input_scale,
    }
    keymap = temporal_keymap(rule.n_layers, tied)
    named = SCALAR_RESCALE if scaled else ""
    return _Layout(draft, "temporal", config.pre_bias == "tied", keymap, fields, named)


def _cfg(layout: _Layout) -> dict[str, Any]:
    """What an earlier `cfg.json` of this coder said, with everything that its weights mean said anew."""
    config = layout.draft.config
    earlier = {key: value for key, value in origin(layout.draft, "sae_lens").items() if key not in _MATHS}
    metadata = _metadata(config, earlier)
    heads = metadata["hook_name"].endswith("attn.hook_z") and metadata["hook_head_index"] is None
    if KINDS[layout.architecture].transcoder:
        metadata["hook_name_out"], metadata["hook_head_index_out"] = to_transformer_lens(config.writes[0])
    return {
        **earlier,
        "architecture": layout.architecture,
        "d_in": config.d_in,
        "d_sae": config.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": layout.subtracts,
        "normalize_activations": layout.normalise,
        # TransformerLens gives z by heads; the coder reads them one after the other.
        "reshape_activations": "hook_z" if heads and not KINDS[layout.architecture].transcoder else "none",
        **layout.fields,
        "metadata": metadata,
    }


def _metadata(config: CoderConfig, earlier: Mapping[str, Any]) -> dict[str, Any]:
    training, policy = config.training, config.input_policy
    older: dict[str, Any] = training.get("sae_lens_legacy") or training.get("mats_sae_training") or {}
    kept: dict[str, Any] = earlier.get("metadata") or {key: older[key] for key in _CARRIED if key in older}
    hook, head = to_transformer_lens(config.reads[0])
    options: dict[str, Any] = dict(kept.get("model_from_pretrained_kwargs") or {})
    for view, option in ((CENTRED, "center_writing_weights"), (UNBIASED, "fold_value_biases")):
        if config.reads[0].endswith(view):
            options[option] = True
    if options:
        kept = {**kept, "model_from_pretrained_kwargs": options}
    said = kept.get("seqpos_slice")
    start = said[0] if isinstance(said, list) and said else None
    metadata: dict[str, Any] = {
        "sae_lens_training_version": None,
        **kept,
        "sae_lens_version": VERSION,
        "hook_name": hook,
        "hook_head_index": head,
        "prepend_bos": policy.bos != "none",
        "seqpos_slice": said if (start or 0) == policy.skip_first and said else [policy.skip_first or None, None],
    }
    if policy.skip_ids:
        metadata["exclude_special_tokens"] = list(policy.skip_ids)
    if config.model is not None:
        metadata["model_name"] = config.model.name
    for theirs, ours, kind in (("context_size", "context_size", int), ("dataset_path", "dataset", str)):
        if isinstance(training.get(ours), kind):
            metadata.setdefault(theirs, training[ours])
    return metadata


def _write_facts(draft: Draft, folder: Path) -> None:
    """How often latents fired, and the training run's config where the coder came with one."""
    if FREQUENCY in draft.statistics:
        write_safetensors(folder / SPARSITY, {"sparsity": apply(torch.Tensor.float, draft.statistics[FREQUENCY])})
    left = ", ".join(sorted(set(draft.statistics) - {FREQUENCY}))
    if left:
        log.info("%s: SAELens has no file for the statistics %s; they are not written", draft.config.name, left)
    if run := origin(draft, "sae_lens_runner"):
        write_json(folder / RUNNER, run)


def _cannot(draft: Draft, what: str) -> FormatError:
    return refuse(draft, "sae_lens", what)
