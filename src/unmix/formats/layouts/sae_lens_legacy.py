"""SAELens before version 6: the same two files, another `cfg.json`. Read only; `sae_lens` writes.

Versions 3 to 5: a flat config (`hook_name`, `activation_fn_str`, `normalize_activations` a choice or yes/no). Versions
0.2 to 2: the whole config of the training run (`hook_point`, `activation_fn`). `apply_b_dec_to_input` missing means
true; `activation_fn_str: topk` makes it topk whatever `architecture` says. A fine-tuned `scaling_factor` multiplies the
codes at decoding alone, so it goes into the decoder. Noise that versions 1 and 2 added to codes is left out. The whole
config is kept in `config.training["sae_lens_legacy"]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from unmix.coder.config import CoderConfig
from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.sae_lens import both_files, generation
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
)
from unmix.formats.lazy import State, apply
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

_KEYMAPS: Mapping[str, tuple[Stored, ...]] = {
    "relu": AFFINE,
    "topk": AFFINE,
    "gated": GATED,
    "jumprelu": (*AFFINE, *THRESHOLD),
}
_FINETUNED = (
    Stored("scaling_factor", "finetuned", ("d_sae",), optional=True),
    Stored("finetuning_scaling_factor", "finetuned", ("d_sae",), optional=True),
)
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn": "activation_fn_str",
}
"""What versions 0.2 to 2 called what versions 3 to 5 call otherwise."""

_IGNORED = (
    # How and where it ran and was trained. None of these changes what the weights compute.
    "act_store_device", "adam_beta1", "adam_beta2", "autocast", "autocast_lm", "b_dec_init_method",
    "cached_activations_path", "checkpoint_path", "compile_llm", "compile_sae", "dataset_trust_remote_code",
    "dead_feature_estimation_method", "dead_feature_threshold", "dead_feature_window", "decoder_heuristic_init",
    "decoder_heuristic_init_norm", "decoder_orthogonal_init", "device", "dtype", "eval_batch_size_prompts",
    "eval_every_n_wandb_logs", "feature_reinit_scale", "feature_sampling_method", "feature_sampling_window",
    "finetuning_method", "finetuning_tokens", "from_pretrained_path", "hook_eval", "hook_point_eval",
    "init_encoder_as_decoder_transpose", "is_dataset_tokenized", "jumprelu_bandwidth", "jumprelu_init_threshold",
    "l1_coefficient", "l1_warm_up_steps", "llm_compilation_mode", "log_activations_store_to_wandb",
    "log_optimizer_state_to_wandb", "log_to_wandb", "lp_norm", "lr", "lr_decay_steps", "lr_end", "lr_scheduler_name",
    "lr_warm_up_steps", "model_batch_size", "model_class_name", "model_from_pretrained_kwargs", "model_kwargs",
    "mse_loss_normalization", "n_batches_in_buffer", "n_checkpoints", "n_eval_batches", "n_restart_cycles",
    "neuronpedia", "neuronpedia_id", "noise_scale", "normalize_sae_decoder", "resample_batches", "resume", "run_name",
    "sae_compilation_mode", "sae_lens_training_version", "sae_lens_version", "scale_sparsity_penalty_by_decoder_norm",
    "seed", "store_batch_size", "store_batch_size_prompts", "streaming", "tokens_per_buffer", "total_training_tokens",
    "train_batch_size", "train_batch_size_tokens", "training_tokens", "use_cached_activations", "use_ghost_grads",
    "verbose", "wandb_entity", "wandb_id", "wandb_log_frequency", "wandb_project",
)  # fmt: skip


class SaeLensLegacyFormat(Format):
    """SAELens 0.2 to 5."""

    name = "sae_lens_legacy"
    looks_for = f"{CFG} (hook_name or hook_point at its top) + {WEIGHTS}"

    def recognise(self, place: Place) -> bool:
        """By its two files, and what stands at the top of the config."""
        return both_files(place) and generation(place.peek(CFG)) == "older"

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module. `FormatError` for a setting that is not supported, or what does not fit."""
        tree = place.json(CFG)
        draft = read_older(Settings(place, CFG, renamed(tree)), tree, self.name, WEIGHTS)
        return Draft(draft.config, draft.state, statistics(place, draft.config.n_latents))


def renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The config under the names of versions 3 to 5."""
    old = {_RENAMED[key]: value for key, value in tree.items() if key in _RENAMED}
    return old | {key: value for key, value in tree.items() if key not in _RENAMED}


def read_older(settings: Settings, tree: Mapping[str, Any], format: str, weights: str, prefix: str = "") -> Draft:
    """A coder of before version 6: `settings` are those of `renamed(tree)`, its tensors in `weights` after `prefix`."""
    config = _config(settings, tree, format)
    flagged = settings.flag("finetuning_scaling_factor", default=False)
    settings.warn_unread()
    sizes = {"d_in": config.d_in, "d_sae": config.n_latents, "d_out": config.d_in}
    keymap = (*_KEYMAPS[config.activation.kind], *_FINETUNED)
    state = read_state(settings.place, weights, keymap, sizes, settings.file, prefix, whole=not prefix).state
    # Until version 3 the factor was always there and always used.
    return Draft(config, _finetuned(settings, state, used=flagged or "hook_point" in tree))


def _config(settings: Settings, tree: Mapping[str, Any], format: str) -> CoderConfig:
    settings.ignore(*_IGNORED)
    d_in = settings.size("d_in")
    expansion = settings.raw("expansion_factor")
    n_latents = settings.size("d_sae", default=d_in * expansion if isinstance(expansion, int) else None)
    training: dict[str, Any] = {format: dict(tree), **data(settings)}
    if run := runner(settings.place):
        training["sae_lens_runner"] = run
    fields: dict[str, Any] = {
        **hooks(settings, transcoder=False, processed=_processed(settings, format)),
        **model(settings),
        **normalisation(settings, _normalised(settings), transcoder=False, skip=False),
        "d_in": d_in,
        "n_latents": n_latents,
        "activation": _activation(settings),
        "pre_bias": "tied" if settings.flag("apply_b_dec_to_input", default=True) else "none",
        "input_policy": policy(settings, bos_default=True),
        "training": training,
    }
    return make_config(fields, f"{settings.place.shown}: {settings.file}")


def _processed(settings: Settings, format: str) -> bool:
    """Whether it was trained on a model as TransformerLens' defaults rewrite it: before SAELens 3.19, where said."""
    if format == "mats_sae_training":
        return True
    version = re.match(r"(\d+)\.(\d+)", str(settings.raw("sae_lens_training_version") or ""))
    return version is not None and (int(version[1]), int(version[2])) < (3, 19)


def _normalised(settings: Settings) -> str:
    value = settings.raw("normalize_activations")
    if isinstance(value, bool):
        return "expected_average_only_in" if value else "none"
    return settings.choice("normalize_activations", *NORMALISATIONS[:-1], default="none")


def _activation(settings: Settings) -> dict[str, Any]:
    architecture = settings.choice("architecture", "standard", "gated", "jumprelu", "topk", default="standard")
    function = settings.choice("activation_fn_str", "relu", "topk", "tanh-relu", default="relu")
    extra = settings.object("activation_fn_kwargs")
    if function == "tanh-relu":
        raise settings.error("activation_fn_str is 'tanh-relu': codes of tanh(relu(z)) are not supported")
    if function == "topk":
        return {"kind": "topk", "k": extra.size("k"), "relu": "after"}
    if architecture == "topk":
        raise settings.error("architecture is 'topk', but activation_fn_str is 'relu', which has no k")
    return {"kind": "relu" if architecture == "standard" else architecture}


def _finetuned(settings: Settings, state: State, used: bool) -> State:
    """The state with a fine-tuned factor in the decoder; one of all ones says nothing."""
    factor = state.pop("finetuned", None)
    if factor is None or torch.allclose(factor(), torch.ones(factor.shape)):
        return state
    if not used:
        raise settings.error("finetuning_scaling_factor is false, but the weights hold a factor that is not all ones")
    state["W_dec"] = apply(lambda W, f: W * f[:, None], state["W_dec"], factor)
    return state
