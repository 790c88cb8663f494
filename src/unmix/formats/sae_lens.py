"""SAELens, version 6: `cfg.json` + `sae_weights.safetensors`, read and written.

Reads inference folders and training checkpoints of the kinds in `KINDS`. `s = norm_in(x) − b_dec` where
`apply_b_dec_to_input`; codes are relu, top-k after relu, or relu(z)·1[z > θ]. Where its coder ranks z·‖w_dec‖
(`rescale_acts_by_decoder_norm`) its codes are that product and its decoder divides by the norm again: the norms
are folded into encoder and decoder, so codes and outputs are its own. `sparsity.safetensors` and
`runner_cfg.json` are not read. The whole `cfg.json` is kept under `config.training["sae_lens"]`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from unmix.coder.config import CoderConfig
from unmix.core.config import build
from unmix.core.errors import ConfigError, FormatError
from unmix.formats.draft import Draft
from unmix.formats.folds import unit_decoder
from unmix.formats.hook_names import from_transformer_lens
from unmix.formats.keymap import Stored, read_state
from unmix.formats.place import Place
from unmix.formats.registry import Format

log = logging.getLogger("unmix")

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
RESCALE = "rescale_acts_by_decoder_norm"

_AFFINE = (
    Stored("W_enc", "W_enc", ("d_in", "d_sae"), "transpose"),
    Stored("b_enc", "b_enc", ("d_sae",)),
    Stored("W_dec", "W_dec", ("d_sae", "d_out")),
    Stored("b_dec", "b_dec", ("d_out",)),
)
_THRESHOLD = (
    Stored("threshold", "threshold", ("d_sae",)),
    Stored("log_threshold", "threshold", ("d_sae",), "exp"),
)
_SKIP = (Stored("W_skip", "W_skip", ("d_out", "d_in")),)


@dataclass(frozen=True)
class Kind:
    """What one `architecture` of SAELens is here."""

    activation: str
    keymap: tuple[Stored, ...] = _AFFINE
    transcoder: bool = False
    skip: bool = False

    @property
    def ranks(self) -> bool:
        """Whether latents are ranked against each other."""
        return self.activation in ("topk", "batchtopk")


_BATCHTOPK = Kind("batchtopk", (*_AFFINE, Stored("topk_threshold", "threshold", ())))
KINDS: Mapping[str, Kind] = {
    "standard": Kind("relu"),
    "topk": Kind("topk"),
    "jumprelu": Kind("jumprelu", (*_AFFINE, *_THRESHOLD)),
    "batchtopk": _BATCHTOPK,
    "matryoshka_batchtopk": _BATCHTOPK,
    "transcoder": Kind("relu", transcoder=True),
    "skip_transcoder": Kind("relu", (*_AFFINE, *_SKIP), transcoder=True, skip=True),
    "jumprelu_transcoder": Kind("jumprelu", (*_AFFINE, *_THRESHOLD), transcoder=True),
    "jumprelu_skip_transcoder": Kind("jumprelu", (*_AFFINE, *_THRESHOLD, *_SKIP), transcoder=True, skip=True),
}

_USED = {
    "architecture", "d_in", "d_sae", "d_out", "k", "apply_b_dec_to_input", "normalize_activations",
    "rescale_acts_by_decoder_norm", "reshape_activations", "metadata",
}  # fmt: skip
_IGNORED = {
    # Where and in what precision it ran; how it was trained. None of these changes what the weights compute.
    "dtype", "device", "decoder_init_norm", "use_sparse_activations", "aux_loss_coefficient", "topk_threshold_lr",
    "l1_coefficient", "l1_warm_up_steps", "lp_norm", "l0_coefficient", "l0_warm_up_steps",
    "pre_act_loss_coefficient", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale", "jumprelu_ste_to_input", "target_l0", "matryoshka_widths",
}  # fmt: skip


class SaeLensFormat(Format):
    """SAELens v6."""

    name = "sae_lens"
    looks_for = f"{CFG} + {WEIGHTS}"
    writable = True

    def recognise(self, place: Place) -> bool:
        """By its two files, of any version of the layout; `read` says which versions it reads."""
        both = (place.folder / CFG).is_file() and (place.folder / WEIGHTS).is_file()
        return both and place.file in (None, CFG, WEIGHTS)

    def read(self, place: Place, name: str = "") -> Draft:
        """The coder. `FormatError` for a kind or setting that is not supported, or what does not fit."""
        reader = _Reader(place)
        config = reader.config()
        sizes = {"d_in": config.d_in, "d_sae": config.n_latents, "d_out": config.width_out}
        found = read_state(place, WEIGHTS, reader.kind.keymap, sizes, source=CFG)
        draft = Draft(config, found.state)
        return unit_decoder(draft) if config.gate_space == "decoder_norm" else draft

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """See `write_sae_lens`."""
        from unmix.formats.sae_lens_write import write_sae_lens

        (draft,) = drafts.values()
        write_sae_lens(draft, folder)


class _Reader:
    """Turns one `cfg.json` into a `CoderConfig`; every complaint names the file, the key, and what is allowed."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.cfg = place.json(CFG)
        architecture = self.cfg.get("architecture")
        if "activation_fn_str" in self.cfg or "hook_point" in self.cfg or architecture is None:
            raise self._error("this is a layout of SAELens before version 6, which is not supported yet")
        if architecture not in KINDS:
            raise self._error(f"architecture {architecture!r} is not supported yet; supported: {', '.join(KINDS)}")
        self.kind = KINDS[architecture]
        unknown = sorted(set(self.cfg) - _USED - _IGNORED)
        if unknown:
            log.warning("%s: %s: keys kept but not understood: %s", place.shown, CFG, ", ".join(unknown))

    def config(self) -> CoderConfig:
        """The coder's config; `FormatError` where a setting has no counterpart."""
        metadata = self._object("metadata")
        scale = self._input_scale()
        tree: dict[str, Any] = {
            **self._hooks(metadata),
            "d_in": self._size("d_in"),
            "d_out": self._size("d_out") if self.kind.transcoder else self._size("d_in"),
            "n_latents": self._size("d_sae"),
            "activation": self._activation(),
            "normalise": {"kind": self._normalise()},
            "input_scale": scale,
            "output_scale": 1 / scale,
            "pre_bias": "tied" if self._subtracts_bias() else "none",
            "gate_space": "decoder_norm" if self.kind.ranks and self.cfg.get(RESCALE) else "raw",
            "skip": self.kind.skip,
            "input_policy": self._policy(metadata),
            "training": {"sae_lens": self.cfg},
        }
        try:
            return build(CoderConfig, tree, source=f"{self.place.shown}: {CFG}")
        except ConfigError as error:
            raise FormatError(str(error)) from error

    def _activation(self) -> dict[str, Any]:
        if self.kind.activation == "topk":
            return {"kind": "topk", "k": self._size("k"), "relu": "before"}
        if self.kind.activation == "batchtopk":
            return {"kind": "batchtopk", "k": self._size("k")}
        return {"kind": self.kind.activation}

    def _subtracts_bias(self) -> bool:
        value = self.cfg.get("apply_b_dec_to_input", True)
        if not isinstance(value, bool):
            raise self._error(f"apply_b_dec_to_input is {value!r}, expected true or false")
        # A transcoder never subtracts it, whatever the key says: b_dec lives where it writes.
        return value and not self.kind.transcoder

    def _normalise(self) -> str:
        value = self.cfg.get("normalize_activations", "none")
        reshape = self.cfg.get("reshape_activations", "none")
        if reshape not in ("none", "hook_z"):  # heads flattened: what the point z is anyway
            raise self._error(f"reshape_activations is {reshape!r}; supported: none, hook_z")
        if value == "layer_norm" and self.kind.transcoder:
            raise self._error("normalize_activations 'layer_norm' of a transcoder is not supported yet")
        if value in ("none", "layer_norm"):
            return value
        if value == "expected_average_only_in":
            return "none"  # `_input_scale` has found its factor
        raise self._error(
            f"normalize_activations {value!r} is not supported yet; supported: none, layer_norm, "
            f"expected_average_only_in with {SCALER}"
        )

    def _input_scale(self) -> float:
        if self.cfg.get("normalize_activations") != "expected_average_only_in":
            return 1.0
        if self.kind.transcoder:
            raise self._error("normalize_activations 'expected_average_only_in' of a transcoder is not supported yet")
        if not (self.place.folder / SCALER).is_file():
            raise self._error(
                "normalize_activations is 'expected_average_only_in', but the factor is not in the folder "
                f"({SCALER} is missing); export an inference folder, which has it folded in"
            )
        factor = self.place.json(SCALER).get("scaling_factor")
        if not isinstance(factor, (int, float)) or not factor > 0:
            raise FormatError(f"{self.place.shown}: {SCALER}: scaling_factor is {factor!r}, expected a number above 0")
        return float(factor)

    def _hooks(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        read = metadata.get("hook_name")
        if read is None:
            return {"name": self.place.folder.name}
        head = metadata.get("hook_head_index")
        reads = from_transformer_lens(str(read), head)
        written = metadata.get("hook_name_out") if self.kind.transcoder else None
        head_out = metadata.get("hook_head_index_out")
        writes = reads if written is None else from_transformer_lens(str(written), head_out)
        return {"reads": (reads,), "writes": (writes,)}

    def _policy(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """BOS, and which positions counted, as far as the metadata say; the rest keeps our defaults."""
        policy: dict[str, Any] = {}
        if isinstance(bos := metadata.get("prepend_bos"), bool):
            policy["bos"] = "context" if bos else "none"
        positions = metadata.get("seqpos_slice")
        if isinstance(positions, list):
            start = cast("list[Any]", positions)[0] if positions else None
            policy["skip_first"] = int(start) if isinstance(start, int) and start >= 0 else 0
        special = metadata.get("exclude_special_tokens")
        if isinstance(special, list):
            policy["skip_ids"] = tuple(int(i) for i in cast("list[Any]", special))
        return policy

    def _size(self, key: str) -> int:
        value = self.cfg.get(key)
        # SAELens writes k as 16.0.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
            raise self._error(f"{key} is {json.dumps(value)}, expected a whole number above 0")
        return int(value)

    def _object(self, key: str) -> dict[str, Any]:
        value = self.cfg.get(key) or {}
        if not isinstance(value, dict):
            raise self._error(f"{key} is a {type(value).__name__}, expected an object")
        return cast("dict[str, Any]", value)

    def _error(self, message: str) -> FormatError:
        return FormatError(f"{self.place.shown}: {CFG}: {message}")
