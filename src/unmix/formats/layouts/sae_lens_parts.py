"""What every generation of SAELens' files has in common: hooks, input policy, normalisation, statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from unmix.coder.config import Gated
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import gate_into_codes
from unmix.formats.folds import replace_config
from unmix.formats.hook_names import as_processed, from_module_path, from_transformer_lens
from unmix.formats.keymap import Stored, read_state
from unmix.formats.lazy import Lazy, apply
from unmix.formats.place import Place
from unmix.formats.settings import Settings

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
BUFFER = "activations_store_state.safetensors"
RUNNER = "runner_cfg.json"
FREQUENCY = "log_feature_sparsity"
"""The statistic's name: log10 of how often each latent fired, plus 1e-10."""

AFFINE = (
    Stored("W_enc", "W_enc", ("d_in", "d_sae"), "transpose"),
    Stored("b_enc", "b_enc", ("d_sae",)),
    Stored("W_dec", "W_dec", ("d_sae", "d_out")),
    Stored("b_dec", "b_dec", ("d_out",)),
)
GATED = (
    Stored("W_enc", "W_enc", ("d_in", "d_sae"), "transpose"),
    Stored("b_gate", "b_enc", ("d_sae",)),
    Stored("r_mag", "r_mag", ("d_sae",)),
    Stored("b_mag", "b_mag", ("d_sae",)),
    Stored("W_dec", "W_dec", ("d_sae", "d_out")),
    Stored("b_dec", "b_dec", ("d_out",)),
)
THRESHOLD = (
    Stored("threshold", "threshold", ("d_sae",)),
    Stored("log_threshold", "threshold", ("d_sae",), "exp"),
)

NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening")
_KINDS = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
_WHITENING = (
    Stored("mean", "mean", ("d_in",), kind="statistic"),
    Stored("matrix", "matrix", ("d_in", "d_in"), kind="statistic"),
    Stored("inverse_matrix", "inverse_matrix", ("d_in", "d_in"), kind="statistic"),
)


def hooks(said: Settings, transcoder: bool, processed: bool = False) -> dict[str, Any]:
    """`reads` and `writes` of the config, or the folder's name where no hook is said.

    As the views that TransformerLens' processing of the model makes them: all of it where the coder was `processed`,
    else what `model_from_pretrained_kwargs` asks for.
    """
    read = said.raw("hook_name")
    written = said.raw("hook_name_out") if transcoder else None
    head, head_out = said.raw("hook_head_index"), said.raw("hook_head_index_out")
    layer = said.raw("hook_layer")
    if read is None:
        return {"name": said.place.folder.name}
    kwargs = said.raw("model_from_pretrained_kwargs")
    options = cast("dict[str, Any]", kwargs) if isinstance(kwargs, dict) else {}
    name = said.raw("model_name")
    seen = {
        "model": name if isinstance(name, str) else None,
        "centred": bool(options.get("center_writing_weights", processed)),
        "value_biases": bool(options.get("fold_value_biases", processed)),
    }
    reads = _hook(str(read), head, layer, seen)
    return {"reads": (reads,), "writes": (reads if written is None else _hook(str(written), head_out, layer, seen),)}


def _hook(name: str, head: Any, layer: Any, seen: Mapping[str, Any]) -> str:
    """The canonical name; runs over several layers wrote `blocks.{layer}.hook_resid_pre`."""
    plain = name.replace("{layer}", str(layer)) if isinstance(layer, int) else name
    known = from_transformer_lens(plain)
    known = from_module_path(plain) if known == plain else known
    return as_processed(known, **seen) if head is None else f"{known}#{head}"


def policy(said: Settings, bos_default: bool | None = None) -> dict[str, Any]:
    """BOS, and which positions counted, as far as they are said; the rest keeps our defaults."""
    found: dict[str, Any] = {}
    bos = said.raw("prepend_bos", bos_default)
    if isinstance(bos, bool):
        found["bos"] = "context" if bos else "none"
    positions = said.raw("seqpos_slice")
    if isinstance(positions, list):
        start = cast("list[Any]", positions)[0] if positions else None
        found["skip_first"] = int(start) if isinstance(start, int) and start >= 0 else 0
    special = said.raw("exclude_special_tokens")
    if isinstance(special, list):
        found["skip_ids"] = tuple(int(i) for i in cast("list[Any]", special))
    return found


def model(said: Settings) -> dict[str, Any]:
    """The language model's name, where it is said."""
    name = said.raw("model_name")
    return {"model": {"name": name}} if isinstance(name, str) and name else {}


def data(said: Settings) -> dict[str, Any]:
    """What it was trained on: tokens a context and the dataset, where they are said."""
    found = {"context_size": said.raw("context_size"), "dataset": said.raw("dataset_path")}
    return {key: value for key, value in found.items() if value}


def normalisation(settings: Settings, choice: str, transcoder: bool, skip: bool) -> dict[str, Any]:
    """Config fields for one of `NORMALISATIONS`: `normalise`, `input_scale`, `output_scale`."""
    kind = _KINDS.get(choice)
    if kind is None:
        scale = average_norm_scale(settings) if choice == "expected_average_only_in" else 1.0
        return {"input_scale": scale, "output_scale": 1 / scale}
    if skip:
        raise settings.error(
            f"normalize_activations {choice!r} of a transcoder with W_skip: its skip reads the raw input beside an "
            "encoder that reads the normalised one, which is not supported"
        )
    # A transcoder's output is of another hook: it is not scaled back.
    return {"normalise": {"kind": kind, "restore": not transcoder}}


def average_norm_scale(settings: Settings) -> float:
    """The factor that brings the average input to norm √d: SAELens writes it beside training checkpoints alone.

    `FormatError` where it is not in the folder.
    """
    place = settings.place
    if (place.folder / SCALER).is_file():
        scaler = Settings(place, SCALER, place.json(SCALER))
        return scaler.number("scaling_factor", above=0.0)
    if (place.folder / BUFFER).is_file() and "estimated_norm_scaling_factor" in place.keys(BUFFER):
        factor = float(place.store(BUFFER).tensor("estimated_norm_scaling_factor"))
        if factor > 0:
            return factor
        raise FormatError(
            f"{place.shown}: {BUFFER}: estimated_norm_scaling_factor is {factor}, expected a number above 0"
        )
    raise settings.error(
        "normalize_activations is 'expected_average_only_in', but the factor is not in the folder "
        f"({SCALER} is missing); export an inference folder, which has it folded in"
    )


def whitened(draft: Draft, settings: Settings) -> Draft:
    """The whitening of a training checkpoint folded into the weights: inputs and outputs become raw.

    z = (x − mean)·M on the way in, x̂ = ẑ·M⁻¹ + mean on the way back. Codes stay, save that kinds which rank latents
    have their decoder norms in the codes already. Computed in float64, as the statistics are stored.
    """
    place = settings.place
    if not (place.folder / WHITENING).is_file():
        raise settings.error(
            "normalize_activations is 'covariance_whitening', but the statistics are not in the folder "
            f"({WHITENING} is missing); export an inference folder, which has them folded in"
        )
    draft = gate_into_codes(draft)
    config, state = draft.config, draft.state
    found = read_state(place, WHITENING, _WHITENING, {"d_in": config.d_in}, source=CFG).statistics
    mean, matrix, inverse = found["mean"], found["matrix"], found["inverse_matrix"]
    changed = replace_config(draft)
    changed.state["W_enc"] = apply(lambda W, M: (W.double() @ M.double().T).float(), state["W_enc"], matrix)
    changed.state["W_dec"] = apply(lambda W, back: (W.double() @ back.double()).float(), state["W_dec"], inverse)
    changed.state["b_dec"] = apply(
        lambda b, back, m: (b.double() @ back.double() + m.double()).float(), state["b_dec"], inverse, mean
    )
    if config.pre_bias == "none":
        moved = apply(lambda W, M, m: (W.double() @ (M.double().T @ m.double())).float(), state["W_enc"], matrix, mean)
        changed.state["b_enc"] = apply(torch.sub, state["b_enc"], moved)
        if isinstance(config.activation, Gated):
            changed.state["b_mag"] = apply(_less, state["b_mag"], state["r_mag"], moved)
    return changed


def _less(bias: Tensor, log_factor: Tensor, moved: Tensor) -> Tensor:
    return bias - log_factor.exp() * moved


def statistics(place: Place, n_latents: int) -> dict[str, Lazy]:
    """How often each latent fired, from `sparsity.safetensors`; empty where there is no such file."""
    if not (place.folder / SPARSITY).is_file():
        return {}
    keymap = (Stored("sparsity", FREQUENCY, ("d_sae",), kind="statistic"),)
    return read_state(place, SPARSITY, keymap, {"d_sae": n_latents}, source=CFG).statistics


def runner(place: Place) -> dict[str, Any]:
    """The training run's config, for provenance; empty where there is none."""
    return place.json(RUNNER) if (place.folder / RUNNER).is_file() else {}
