"""Llamascopium (once lm-saes, Language-Model-SAEs), and its Llama Scope R1-Distill: `config.json` + `sae_weights.*`.

z = x'W_E + b_E with x' = x·√d/norm_in, x̂ = (f W_D + b_D)·norm_out/√d; the average norms lie with the weights. The gate
acts in that normalised space, unlike Llama Scope's: relu, top-k after relu, or z·‖w_dec‖ > θ with
θ = exp(log_jumprelu_threshold), without ‖w_dec‖ where `sparsity_include_decoder_norm` is false. `norm_activation:
inference` means that the scales are in the weights; `token-wise` divides each token by its own norm. Files of early
2025 have the names of two Linear layers. The whole config is kept under `training["llamascopium"]`.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch

from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config
from unmix.formats.hook_names import from_transformer_lens
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.llama_scope import refuse_glu
from unmix.formats.lazy import Lazy
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"
_NORM = "dataset_average_activation_norm."
_KEYMAP = (
    Stored("W_E", "W_enc", ("d_model", "d_sae"), "transpose"),
    Stored("encoder.weight", "W_enc", ("d_sae", "d_model")),
    Stored("b_E", "b_enc", ("d_sae",)),
    Stored("encoder.bias", "b_enc", ("d_sae",)),
    Stored("W_D", "W_dec", ("d_sae", "d_model")),
    Stored("decoder.weight", "W_dec", ("d_model", "d_sae"), "transpose"),
)
_BIAS = (
    Stored("b_D", "b_dec", ("d_model",)),
    Stored("decoder.bias", "b_dec", ("d_model",)),
)
_THRESHOLD = (
    Stored("activation_function.log_jumprelu_threshold", "threshold", ("d_sae",), "exp"),
    Stored("log_jumprelu_threshold", "threshold", ("d_sae",), "exp"),
)
_IGNORED = (
    # Kernels and training. None of these changes what the weights compute.
    "dtype", "device", "top_k", "jump_relu_threshold", "jumprelu_threshold_window", "use_triton_kernel",
    "sparsity_threshold_for_triton_spmm_kernel", "force_unit_decoder_norm", "sae_pretrained_name_or_path",
    "strict_loading",
)  # fmt: skip


class LlamascopiumFormat(Format):
    """`config.json` + `sae_weights.safetensors` of `W_E`, or of `encoder.weight`."""

    name = "llamascopium"
    looks_for = f"{CONFIG} + {WEIGHTS} with W_E, W_D (or encoder.weight, decoder.weight)"

    def recognise(self, place: Place) -> bool:
        """By its two files and the names of the tensors."""
        if place.file not in (None, CONFIG, WEIGHTS) or not (place.folder / CONFIG).is_file():
            return False
        keys = place.keys(WEIGHTS)
        return keys >= {"W_E", "W_D"} or keys >= {"encoder.weight", "decoder.weight"}

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module. `FormatError` for settings without a counterpart."""
        settings = Settings(place, CONFIG, place.json(CONFIG))
        settings.choice("sae_type", "sae", default="sae")
        refuse_glu(settings)
        d = settings.size("d_model")
        sizes = {"d_model": d, "d_sae": int(d * settings.number("expansion_factor", above=0))}
        hooks = [settings.text("hook_point_in")]
        hooks.append(settings.text("hook_point_out", default=hooks[0]))
        activation = _activation(settings)
        state = _state(place, settings, activation["kind"], sizes, hooks)
        by_norm = settings.flag("sparsity_include_decoder_norm", default=True)
        tree = {
            "reads": (from_transformer_lens(hooks[0]),),
            "writes": (from_transformer_lens(hooks[1]),),
            "d_in": d,
            "n_latents": sizes["d_sae"],
            "activation": activation,
            "pre_bias": "tied" if settings.flag("apply_decoder_bias_to_pre_encoder", default=False) else "none",
            "gate_space": "decoder_norm" if by_norm and activation["kind"] != "relu" else "raw",
            **_scaling(place, settings, hooks, d),
            "training": {self.name: settings.tree},
        }
        settings.ignore(*_IGNORED)
        settings.warn_unread()
        return Draft(make_config(tree, f"{place.shown}: {CONFIG}"), state)


def _activation(settings: Settings) -> dict[str, Any]:
    kind = settings.choice("act_fn", "relu", "jumprelu", "topk", "batchtopk", default="relu")
    if kind == "topk":
        return {"kind": kind, "k": settings.size("top_k"), "relu": "before"}
    return {"kind": kind, "k": settings.size("top_k")} if kind == "batchtopk" else {"kind": kind}


def _state(
    place: Place, settings: Settings, activation: str, sizes: dict[str, int], hooks: list[str]
) -> dict[str, Lazy]:
    biased = settings.flag("use_decoder_bias", default=True)
    keymap = [*_KEYMAP, *(_BIAS if biased else ()), *(_THRESHOLD if activation == "jumprelu" else ())]
    keymap += [Stored(_NORM + hook, _NORM + hook, (), kind="ignored") for hook in dict.fromkeys(hooks)]
    state = dict(read_state(place, WEIGHTS, keymap, sizes, source=CONFIG).state)
    if not biased:
        state["b_dec"] = Lazy.of(torch.zeros(sizes["d_model"]))
    if activation == "batchtopk":
        # The files keep no threshold: their own code ranks over the batch at inference too.
        state["threshold"] = Lazy.of(torch.tensor(-1.0))
    return state


def _scaling(place: Place, settings: Settings, hooks: list[str], d: int) -> dict[str, Any]:
    """Input and output scales, or the normalisation of each token."""
    way = settings.choice(
        "norm_activation", "dataset-wise", "token-wise", "inference", "batch-wise", "none", default="dataset-wise"
    )
    if way == "batch-wise":
        raise settings.error("norm_activation is 'batch-wise': codes would depend on the other tokens of a batch")
    if way == "token-wise" and hooks[0] != hooks[1]:
        raise settings.error("norm_activation is 'token-wise': the norm of a transcoder's output is not in its input")
    if way == "token-wise":
        return {"normalise": {"kind": "constant_norm"}}
    if way != "dataset-wise":
        return {}
    norms: list[float] = []
    for hook in hooks:
        if _NORM + hook not in place.keys(WEIGHTS):
            raise settings.error(f"norm_activation is 'dataset-wise', but {WEIGHTS} holds no {_NORM}{hook}")
        norms.append(float(place.store(WEIGHTS).tensor(_NORM + hook)))
        if not 0 < norms[-1] < float("inf"):
            raise settings.error(f"{_NORM}{hook} in {WEIGHTS} is {norms[-1]}, expected a number above 0")
    return {"input_scale": sqrt(d) / norms[0], "output_scale": norms[1] / sqrt(d)}
