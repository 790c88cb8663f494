"""Llama Scope (He et al. 2024, arXiv 2410.20526): `hyperparams.json` + `checkpoints/final.safetensors`.

z = W_enc(x·√d/norm_in) + b_enc, x̂ = (W_dec f + b_dec)·norm_out/√d, with the average norms of the config. Its one
threshold was read off after scales and decoder norms had been folded in, so it is in raw output units: z is kept where
z·‖w_dec‖·norm_out/√d > θ, and where z·norm_in/√d > θ without `sparsity_include_decoder_norm`. Codes are z, of the
weights as stored; the project's own loader gives them times ‖w_dec‖·norm_out/√d, and the same support and outputs.
The whole config is kept under `training["llama_scope"]`.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch

from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config
from unmix.formats.hook_names import from_transformer_lens
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.scopes import path_of
from unmix.formats.lazy import Lazy
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

CONFIG = "hyperparams.json"
WEIGHTS = "checkpoints/final.safetensors"
KEYMAP = (
    Stored("encoder.weight", "W_enc", ("d_sae", "d_model")),
    Stored("encoder.bias", "b_enc", ("d_sae",)),
    Stored("decoder.weight", "W_dec", ("d_model", "d_sae"), "transpose"),
)
_BIAS = Stored("decoder.bias", "b_dec", ("d_model",))
_TRAINED_BY = (
    # Where and how it was trained. None of these changes what the weights compute.
    "device", "seed", "dtype", "exp_name", "exp_series", "exp_result_path", "expansion_factor", "bias_init_method",
    "decoder_exactly_fixed_norm", "init_decoder_norm", "init_encoder_norm", "init_encoder_with_decoder_transpose",
    "lp", "l1_coefficient", "l1_coefficient_warmup_steps", "k_warmup_steps", "use_batch_norm_mse", "use_ghost_grads",
    "tp_size", "ddp_size", "remove_gradient_parallel_to_decoder_directions",
)  # fmt: skip


class LlamaScopeFormat(Format):
    """`hyperparams.json` + `checkpoints/final.safetensors`."""

    name = "llama_scope"
    looks_for = f"{CONFIG} + {WEIGHTS} with encoder.weight, decoder.weight"

    def recognise(self, place: Place) -> bool:
        """By its two files and the names of the tensors."""
        config = place.file in (None, CONFIG) and (place.folder / CONFIG).is_file()
        return config and place.keys(WEIGHTS) >= {"encoder.weight", "encoder.bias", "decoder.weight"}

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module. `FormatError` for settings without a counterpart."""
        settings = Settings(place, CONFIG, place.json(CONFIG))
        sizes = {"d_model": settings.size("d_model"), "d_sae": settings.size("d_sae")}
        biased = settings.flag("use_decoder_bias", default=True)
        found = read_state(place, WEIGHTS, [*KEYMAP, *([_BIAS] if biased else ())], sizes, source=CONFIG)
        scale_in, scale_out = _scales(settings, sizes["d_model"])
        by_norm = settings.flag("sparsity_include_decoder_norm", default=True)
        activation = _activation(settings)
        state = dict(found.state)
        if activation["kind"] == "jumprelu":
            theta = settings.number("jump_relu_threshold") * (scale_out if by_norm else scale_in)
            state["threshold"] = Lazy.of(torch.full((sizes["d_sae"],), theta))
        if not biased:
            state["b_dec"] = Lazy.of(torch.zeros(sizes["d_model"]))
        refuse_glu(settings)
        read = settings.text("hook_point_in")
        tree = {
            "reads": (from_transformer_lens(read),),
            "writes": (from_transformer_lens(settings.text("hook_point_out", default=read)),),
            "d_in": sizes["d_model"],
            "n_latents": sizes["d_sae"],
            "activation": activation,
            "input_scale": scale_in,
            "output_scale": 1 / scale_out,
            "pre_bias": "tied" if settings.flag("apply_decoder_bias_to_pre_encoder", default=False) else "none",
            "gate_space": "decoder_norm" if by_norm and activation["kind"] != "relu" else "raw",
            "model": {"name": "meta-llama/Llama-3.1-8B"} if "Llama3_1-8B-Base" in path_of(place) else None,
            "training": {self.name: settings.tree},
        }
        settings.ignore("jump_relu_threshold", "top_k", *_TRAINED_BY)
        settings.warn_unread()
        return Draft(make_config(tree, f"{place.shown}: {CONFIG}"), state)


def refuse_glu(settings: Settings) -> None:
    """`FormatError` where a second encoder gates the first: no published coder does."""
    if settings.flag("use_glu_encoder", default=False):
        raise settings.error(
            "use_glu_encoder is true: codes are then z·sigmoid(x·W_glu + b_glu) before the activation, which no "
            "encoder here computes"
        )


def _scales(settings: Settings, d: int) -> tuple[float, float]:
    """√d over the average norm, of the input and of the output."""
    way = settings.choice("norm_activation", "dataset-wise", "inference", "none", default="dataset-wise")
    norms = settings.object("dataset_average_activation_norm")
    if way != "dataset-wise":
        return 1.0, 1.0
    return sqrt(d) / norms.number("in", above=0), sqrt(d) / norms.number("out", above=0)


def _activation(settings: Settings) -> dict[str, Any]:
    kind = settings.choice("act_fn", "jumprelu", "topk", "relu", default="jumprelu")
    return {"kind": kind, "k": settings.size("top_k"), "relu": "before"} if kind == "topk" else {"kind": kind}
