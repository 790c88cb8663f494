"""SAELens, version 6: `cfg.json` + `sae_weights.safetensors`, read and written.

Reads inference folders and training checkpoints of every architecture it registers (`KINDS`).
`s = norm_in(x) − b_dec` where `apply_b_dec_to_input`. Where it ranks z·‖w_dec‖ (`rescale_acts_by_decoder_norm`) its
codes are that product and its decoder divides by the norm again: the norms are folded into encoder and decoder, so
codes and outputs are its own. The tied kinds (matching pursuit, temporal) add b_dec only where they subtract it.
The whole `cfg.json` is kept in `config.training["sae_lens"]`, `runner_cfg.json` in `["sae_lens_runner"]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unmix.coder.config import CoderConfig
from unmix.coder.encoders.temporal import part_name
from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config, one_draft
from unmix.formats.folds import unit_decoder
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.sae_lens_parts import (
    AFFINE,
    CFG,
    GATED,
    NORMALISATIONS,
    THRESHOLD,
    WEIGHTS,
    data,
    hooks,
    model,
    normalisation,
    policy,
    runner,
    statistics,
    whitened,
)
from unmix.formats.lazy import Lazy, State, apply
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

RESCALE = "rescale_acts_by_decoder_norm"
SCALAR_RESCALE = "constant_scalar_rescale"
_SKIP = (Stored("W_skip", "W_skip", ("d_out", "d_in")),)
_DECODER = (Stored("W_dec", "W_dec", ("d_sae", "d_in")), Stored("b_dec", "b_dec", ("d_in",)))


@dataclass(frozen=True)
class Kind:
    """What one `architecture` of SAELens is here."""

    activation: str
    keymap: tuple[Stored, ...] = AFFINE
    transcoder: bool = False
    skip: bool = False
    tied: bool = False
    """Whether the encoder is the decoder transposed."""
    ranks: bool = False
    """Whether latents are ranked against each other, by z or by z·‖w_dec‖."""


_BATCHTOPK = Kind("batchtopk", (*AFFINE, Stored("topk_threshold", "threshold", ())), ranks=True)
KINDS: Mapping[str, Kind] = {
    "standard": Kind("relu"),
    "gated": Kind("gated", GATED),
    "topk": Kind("topk", ranks=True),
    "abstopk": Kind("abstopk", ranks=True),
    "jumprelu": Kind("jumprelu", (*AFFINE, *THRESHOLD)),
    "batchtopk": _BATCHTOPK,
    "matryoshka_batchtopk": _BATCHTOPK,
    "transcoder": Kind("relu", transcoder=True),
    "skip_transcoder": Kind("relu", (*AFFINE, *_SKIP), transcoder=True, skip=True),
    "jumprelu_transcoder": Kind("jumprelu", (*AFFINE, *THRESHOLD), transcoder=True),
    "jumprelu_skip_transcoder": Kind("jumprelu", (*AFFINE, *THRESHOLD, *_SKIP), transcoder=True, skip=True),
    "matching_pursuit": Kind("matching_pursuit", _DECODER, tied=True),
    "temporal": Kind("temporal", _DECODER, tied=True),
}

_OLDER = {
    "hook_name", "hook_point", "hook_layer", "hook_point_layer", "activation_fn", "activation_fn_str", "model_name",
    "finetuning_scaling_factor", "sae_lens_training_version",
}  # fmt: skip
"""Keys at the top of a `cfg.json` of before version 6, which put them under `metadata`."""
_IGNORED = (
    # Where and in what precision it ran; how it was trained. None of these changes what the weights compute.
    "dtype", "device", "decoder_init_norm", "use_sparse_activations", "aux_loss_coefficient", "topk_threshold_lr",
    "l1_coefficient", "l1_warm_up_steps", "lp_norm", "l0_coefficient", "l0_warm_up_steps",
    "pre_act_loss_coefficient", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale", "jumprelu_ste_to_input", "target_l0", "matryoshka_widths", "use_matryoshka_aux_loss",
)  # fmt: skip


def generation(cfg: Mapping[str, Any]) -> Literal["6", "older"]:
    """Which layout a `cfg.json` has: since version 6 what is not maths lies under `metadata`.

    Training runs of version 6 may add their own keys on top, so the metadata's version decides first.
    """
    metadata = cfg.get("metadata")
    if isinstance(metadata, dict) and "sae_lens_version" in metadata:
        return "6"
    return "older" if _OLDER & cfg.keys() else "6"


def both_files(place: Place) -> bool:
    """Whether the two files of every generation are there."""
    both = (place.folder / CFG).is_file() and (place.folder / WEIGHTS).is_file()
    return both and place.file in (None, CFG, WEIGHTS)


class SaeLensFormat(Format):
    """SAELens v6."""

    name = "sae_lens"
    looks_for = f"{CFG} (with metadata) + {WEIGHTS}"
    writable = True

    def recognise(self, place: Place) -> bool:
        """By its two files, and `metadata` in place of the older versions' keys."""
        return both_files(place) and generation(place.peek(CFG)) == "6"

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module. `FormatError` for a kind or setting that is not supported, or what does not fit."""
        settings = Settings(place, CFG, place.json(CFG))
        kind = KINDS[settings.choice("architecture", *KINDS, default="standard")]
        choice = settings.choice("normalize_activations", *_normalisations(kind), default="none")
        config = _config(settings, kind, choice)
        draft = Draft(config, _state(settings, kind, config), statistics(place, config.n_latents))
        settings.warn_unread()
        draft = unit_decoder(draft) if config.gate_space == "decoder_norm" else draft
        return whitened(draft, settings) if choice == "covariance_whitening" else draft

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """See `write_sae_lens`."""
        from unmix.formats.layouts.sae_lens_write import write_sae_lens

        write_sae_lens(one_draft(drafts), folder)


def _normalisations(kind: Kind) -> tuple[str, ...]:
    """What `normalize_activations` may say. A tied kind cannot be whitened: its two maps would no longer be one."""
    if kind.tied:
        own = (SCALAR_RESCALE,) if kind.activation == "temporal" else ()
        return (*(name for name in NORMALISATIONS if name != "covariance_whitening"), *own)
    return NORMALISATIONS


def _config(settings: Settings, kind: Kind, choice: str) -> CoderConfig:
    metadata = settings.object("metadata")
    settings.choice("reshape_activations", "none", "hook_z", default="none")  # heads flattened: what z is anyway
    settings.ignore(*_IGNORED)
    # A transcoder never subtracts b_dec, whatever the key says: it lives where it writes.
    subtracts = settings.flag("apply_b_dec_to_input", default=True) and not kind.transcoder
    tree: dict[str, Any] = {
        **hooks(metadata, kind.transcoder),
        **model(metadata),
        **_scales(settings, kind, choice),
        "d_in": settings.size("d_in"),
        "d_out": settings.size("d_out") if kind.transcoder else settings.size("d_in"),
        "n_latents": settings.size("d_sae"),
        "activation": _activation(settings, kind),
        "pre_bias": "tied" if subtracts else "none",
        "gate_space": "decoder_norm" if kind.ranks and settings.flag(RESCALE, default=False) else "raw",
        "skip": kind.skip,
        "input_policy": policy(metadata),
        "training": {"sae_lens": settings.tree, **data(metadata)},
    }
    if run := runner(settings.place):
        tree["training"]["sae_lens_runner"] = run
    return make_config(tree, f"{settings.place.shown}: {CFG}")


def _scales(settings: Settings, kind: Kind, choice: str) -> dict[str, Any]:
    factor = settings.number("activation_normalization_factor", default=1.0, above=0.0)
    if choice == SCALAR_RESCALE:
        return {"input_scale": factor, "output_scale": 1 / factor}
    return normalisation(settings, choice, kind.transcoder, kind.skip)


def _activation(settings: Settings, kind: Kind) -> dict[str, Any]:
    if kind.activation == "topk":
        return {"kind": "topk", "k": settings.size("k"), "relu": "before"}
    if kind.activation == "abstopk":
        return {"kind": "topk", "k": settings.size("k"), "relu": "none", "magnitude": True}
    if kind.activation == "batchtopk":
        return {"kind": "batchtopk", "k": settings.size("k")}
    if kind.activation == "matching_pursuit":
        steps = settings.raw("max_iterations")
        return {
            "kind": "matching_pursuit",
            "residual_threshold": max(0.0, settings.number("residual_threshold", default=0.01)),
            "max_iterations": None if steps is None else settings.size("max_iterations"),
            "stop_on_duplicate_support": settings.flag("stop_on_duplicate_support", default=True),
        }
    if kind.activation == "temporal":
        return _temporal(settings)
    return {"kind": kind.activation}


def _temporal(settings: Settings) -> dict[str, Any]:
    topk = settings.choice("sae_diff_type", "topk", "relu", default="topk") == "topk"
    k = settings.raw("kval_topk")
    return {
        "kind": "temporal",
        "k": settings.size("kval_topk") if topk and k is not None else None,
        "n_heads": settings.size("n_heads", default=8),
        "n_layers": settings.size("n_attn_layers", default=1),
        "bottleneck": settings.size("bottleneck_factor", default=64),
        "z_scale": temporal_scale(settings.size("d_in")),
    }


def temporal_scale(d_in: int) -> float:
    """The fixed factor on a temporal coder's input."""
    return 1 / (4 * d_in)


def temporal_keymap(n_layers: int, tied: bool) -> tuple[Stored, ...]:
    """The tensors of a temporal coder; W_enc is stored where it is not the decoder."""
    parts = {"q": ("q_target", "d_attn"), "k": ("k_ctx", "d_attn"), "v": ("v_ctx", "d_sae"), "o": ("c_proj", "d_sae")}
    entries = list(_DECODER) if tied else [*_DECODER, AFFINE[0]]
    for layer in range(n_layers):
        for part, (theirs, width) in parts.items():
            key = f"attn_layers.{layer}.{theirs}"
            entries.append(Stored(f"{key}.weight", part_name(layer, part), (width, "d_sae")))
            entries.append(Stored(f"{key}.bias", part_name(layer, part, bias=True), (width,)))
    return tuple(entries)


def _state(settings: Settings, kind: Kind, config: CoderConfig) -> State:
    sizes = {"d_in": config.d_in, "d_sae": config.n_latents, "d_out": config.width_out}
    if not kind.tied:
        return read_state(settings.place, WEIGHTS, kind.keymap, sizes, source=CFG).state
    tied, keymap = True, kind.keymap
    if config.activation.kind == "temporal":
        tied = settings.flag("tied_weights", default=True)
        keymap = temporal_keymap(config.activation.n_layers, tied)
        sizes["d_attn"] = config.n_latents // config.activation.bottleneck
    state = read_state(settings.place, WEIGHTS, keymap, sizes, source=CFG).state
    state["b_enc"] = Lazy.of(torch.zeros(config.n_latents))
    if tied:
        state["W_enc"] = apply(torch.clone, state["W_dec"])
        if config.pre_bias == "none":
            # Stored all the same, but what was not subtracted is not added.
            state["b_dec"] = Lazy.of(torch.zeros(config.d_in))
    return state
