"""Crosscoders of science-of-finetuning's fork of dictionary_learning, read and written.

`encoder.weight [L, d, F]`, `decoder.weight [L, F, d]`, biases `[F]` and `[L, d]`: relu(Σ_l x_l·W_enc_l + b), and
nothing is subtracted. Batch top-k keeps z where z·c is above one threshold; the factor c of a latent is by
`code_normalization_id` 1 the sum of its decoder norms, 2 the norm of all of it, 3 a mixture of both, 4 nothing,
5 (decoupled) a norm and a threshold for each hook. Decoupled codes are one a hook, so such a coder has L·F latents
here: latent l·F + i writes to hook l alone. As a folder from the hub (`model.safetensors`, `config.json`) or any `.pt`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmix.coder.config import JumpReLU
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config, one_draft, read_hooks, stored_number
from unmix.formats.keymap import Found, Stored, read_state
from unmix.formats.layouts.activation_statistics import KEYS as STATISTICS
from unmix.formats.layouts.activation_statistics import standardise, statistics_keymap
from unmix.formats.lazy import Lazy, apply
from unmix.formats.place import Place
from unmix.formats.registry import FileFormat
from unmix.formats.settings import Settings

log = logging.getLogger("unmix")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
COMPILED = "_orig_mod."
NORMALISATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""By id, from 1."""

KEYMAP = (
    Stored("encoder.weight", "W_enc", ("hooks", "d", "n_latents")),
    Stored("encoder.bias", "b_enc", ("n_latents",)),
    Stored("decoder.weight", "W_dec", ("hooks", "n_latents", "d")),
    Stored("decoder.bias", "b_dec", ("hooks", "d")),
)
_NEEDED = {entry.key for entry in KEYMAP}
_ID = "code_normalization_id"
_SCALARS = (Stored(_ID, _ID, (), kind="ignored"), Stored("k", "k", (), kind="ignored"))
_GATES = {1: "decoder_norm_sum", 2: "decoder_norm", 3: "own", 4: "raw", 5: "decoder_norm"}


class CrosscoderFormat(FileFormat):
    """`model.safetensors` or `.pt` with `encoder.weight [L, d, F]`."""

    name = "dictionary_learning_crosscoder"
    looks_for = "a .pt or .safetensors with encoder.weight [hooks, d, latents] and decoder.weight [hooks, latents, d]"
    writable = True

    def files(self, place: Place) -> list[str]:
        """By the names of the tensors and the three dimensions of the encoder."""
        return _files(place)

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module."""
        file = self.file_of(place, name)
        settings = Settings(place, CONFIG, place.peek(CONFIG))
        prefix = _prefix(place, file)
        headers = place.store(file).headers()
        decoupled = len(headers[f"{prefix}threshold"].shape) == 1 if f"{prefix}threshold" in headers else False
        threshold = Stored("threshold", "threshold", ("hooks",) if decoupled else (), optional=True)
        keymap = (*KEYMAP, *_SCALARS, threshold, *statistics_keymap(("hooks", "d"), ("hooks",)))
        found = read_state(place, file, keymap, prefix=prefix)
        number = _normalisation(place, file, prefix, settings)
        k = stored_number(place, file, f"{prefix}k") if f"{prefix}k" in headers else None
        if (k is None) != ("threshold" not in found.state):
            raise FormatError(f"{place.shown}: {file}: k and threshold belong together, found one of them")
        _check_settings(settings, found.sizes["hooks"])
        draft = _draft(place, found, number, k, settings)
        if k is not None and number == 3:
            draft.state["gate_scale"] = _mixed(found, *_alphas(settings))
        if k is not None and number == 5:
            draft = _decoupled(draft, found, place, file)
        return standardise(draft, found, settings.flag("keep_relative_variance", default=True))

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """See `write_crosscoder`."""
        from unmix.formats.layouts.dictionary_learning_crosscoder_write import write_crosscoder

        write_crosscoder(one_draft(drafts), folder)


def _prefix(place: Place, file: str) -> str:
    """What stands before the names where the module was saved compiled."""
    keys = place.keys(file)
    return COMPILED if keys and all(key.startswith(COMPILED) for key in keys) else ""


def _files(place: Place) -> list[str]:
    if place.file not in (None, CONFIG):
        names = [str(place.file)]
    else:
        names = sorted(f.name for pattern in ("*.pt", "*.safetensors") for f in place.folder.glob(pattern))
    return [name for name in names if _is_crosscoder(place, name)]


def _is_crosscoder(place: Place, file: str) -> bool:
    prefix, headers = _prefix(place, file), place.headers(file)
    needed = {prefix + key for key in _NEEDED}
    return needed <= headers.keys() and len(headers[f"{prefix}encoder.weight"].shape) == 3


def _normalisation(place: Place, file: str, prefix: str, settings: Settings) -> int:
    """Which factor the gate has, 1 where nothing says it."""
    if prefix + _ID in place.keys(file):
        number = stored_number(place, file, prefix + _ID)
        if number not in _GATES:
            raise FormatError(f"{place.shown}: {file}: {_ID} is {number}, expected one of 1, 2, 3, 4, 5")
        return number
    return 1 + NORMALISATIONS.index(settings.choice("code_normalization", *NORMALISATIONS, default="CROSSCODER"))


def _check_settings(settings: Settings, hooks: int) -> None:
    """`FormatError` for a constructor's option that would change the maths; a warning for keys nobody knows."""
    if settings.raw("encoder_layers") not in (None, list(range(hooks))):
        raise settings.error(f"encoder_layers is {settings.raw('encoder_layers')}, expected all {hooks} in order")
    _alphas(settings)
    settings.flag("keep_relative_variance", default=True)
    settings.ignore(
        "trainer", "buffer", "activation_dim", "dict_size", "num_layers", "num_decoder_layers", "k", "target_rms",
        "activation_mean", "activation_std", "code_normalization", "init_with_transpose", "latent_processor",
        "norm_init_scale", "same_init_for_all_layers",
    )  # fmt: skip
    settings.warn_unread()


def _alphas(settings: Settings) -> tuple[float, float]:
    """Weights of the two norms in the mixture; the tensors do not hold them."""
    return (
        settings.number("code_normalization_alpha_sae", default=1.0),
        settings.number("code_normalization_alpha_cc", default=0.1),
    )


def _draft(place: Place, found: Found, number: int, k: int | None, settings: Settings) -> Draft:
    hooks, d, n = (found.sizes[name] for name in ("hooks", "d", "n_latents"))
    reads = tuple(f"input.{i}" for i in range(hooks))
    tree: dict[str, Any] = {
        "reads": reads,
        "name": "crosscoder",
        **read_hooks(place),
        "d_in": hooks * d,
        "n_latents": n,
        "activation": {"kind": "relu"} if k is None else {"kind": "batchtopk", "k": k},
        "pre_bias": "none",
        # Of relu codes, whose gate is their own sign, the factor changes nothing.
        "gate_space": "raw" if k is None else _GATES[number],
        "training": {"dictionary_learning_crosscoder": {**settings.tree, _ID: number}},
    }
    state = dict(found.state)
    state["W_enc"] = apply(lambda W: W.permute(2, 0, 1).flatten(1), found.state["W_enc"])
    state["W_dec"] = apply(lambda W: W.permute(1, 0, 2).flatten(1), found.state["W_dec"])
    state["b_dec"] = apply(torch.flatten, found.state["b_dec"])
    return Draft(make_config(tree, place.shown), state)


def _mixed(found: Found, alpha_sae: float, alpha_cc: float) -> Lazy:
    """The factor of the mixture [F]."""

    def factor(W: Tensor) -> Tensor:
        return alpha_sae * W.norm(dim=(0, 2)) + alpha_cc * W.norm(dim=2).sum(0)

    return apply(factor, found.state["W_dec"])


def _decoupled(draft: Draft, found: Found, place: Place, file: str) -> Draft:
    """One latent for each pair of hook and latent: the encoder repeated, the decoder's parts apart."""
    hooks, d, n = (found.sizes[name] for name in ("hooks", "d", "n_latents"))
    if "threshold" in found.state and len(found.state["threshold"].shape) != 1:
        raise FormatError(f"{place.shown}: {file}: threshold is one number, expected one for each of {hooks} hooks")
    if not bool(found.statistics[STATISTICS[0]]().isnan().any() if STATISTICS[0] in found.statistics else True):
        raise FormatError(
            f"{place.shown}: {file}: a decoupled coder with activation statistics is not supported: its own encoder "
            "applies them twice and its decoder undoes them once"
        )

    def apart(W: Tensor) -> Tensor:
        whole = W.new_zeros(hooks, n, hooks, d)
        for hook in range(hooks):
            whole[hook, :, hook] = W[hook]
        return whole.reshape(hooks * n, hooks * d)

    if bool((found.state["threshold"]() < 0).any()):
        log.warning("%s: %s: a threshold below 0 was never calibrated: its hook keeps all that is above 0", place.shown,
                    file)  # fmt: skip
    config = draft.config.model_copy(update={"n_latents": hooks * n, "activation": JumpReLU()})
    state = {
        "W_enc": apply(lambda W: W.repeat(hooks, 1), draft.state["W_enc"]),
        "b_enc": apply(lambda b: b.repeat(hooks), draft.state["b_enc"]),
        "W_dec": apply(apart, found.state["W_dec"]),
        "b_dec": draft.state["b_dec"],
        "threshold": apply(lambda t: t.repeat_interleave(n), found.state["threshold"]),
    }
    return Draft(config, state)
