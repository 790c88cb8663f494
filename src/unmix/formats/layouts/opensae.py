"""OpenSAE of THU-KEG: `config.json` + `model.safetensors` (or shards and their index), read and written.

x' = (x − mean)/(std + eps) with the unbiased std, u = relu(W(x' − b_dec) + b_enc), the k largest; y = f·W_dec + b_dec.
With `normalize_shift_back` the output times (std + eps) plus mean; without, the output is on the raw scale already.
`jumprelu` has one threshold, and a token with nothing above it keeps its largest. Its trainer saves a plain state dict
`iter_0000200.pt` instead: that is read where a `config.json` lies beside it, which alone says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unmix.coder.config import JumpReLU, Normalise
from unmix.core.atomic import write_json
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import (
    make_config,
    one_draft,
    origin,
    raw_gate,
    refuse,
    refuse_unless,
    tie_input_bias,
)
from unmix.formats.folds import fold_scales
from unmix.formats.hook_names import from_module_path, to_module_path
from unmix.formats.keymap import read_state, write_state
from unmix.formats.layouts.sparsify import KEYMAP, KEYS
from unmix.formats.lazy import Lazy
from unmix.formats.place import Place
from unmix.formats.registry import FileFormat
from unmix.formats.settings import Settings

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_IGNORED = (
    # How it was trained, in what precision it ran, and what Hugging Face's config class adds.
    "multi_topk", "multi_topk_multiplier", "auxk_alpha", "l1_coef", "normalize_decoder", "decoder_impl", "torch_dtype",
    "dtype", "architectures", "model_type", "transformers_version", "_name_or_path",
)  # fmt: skip


class OpenSaeFormat(FileFormat):
    """`config.json` + `model*.safetensors`, or the trainer's `.pt`."""

    name = "opensae"
    looks_for = f"{CONFIG} with feature_size + {WEIGHTS}, its shards, or iter_N.pt"
    writable = True

    def recognise(self, place: Place) -> bool:
        """By the tensors, and a config of this layout or none (then sparsify's weights look the same)."""
        if not super().recognise(place):
            return False
        if (place.folder / CONFIG).is_file():
            return "feature_size" in place.peek(CONFIG)
        return not (place.folder / "cfg.json").is_file()

    def files(self, place: Place) -> list[str]:
        """One; of a trainer's folder, one a checkpoint."""
        return _files(place)

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module."""
        file = self.file_of(place, name)
        if not (place.folder / CONFIG).is_file():
            raise FormatError(
                f"{place.shown}: {file} holds the weights of an OpenSAE, but {CONFIG} is missing, which says k and how "
                "inputs are normalised; put the one of the training run beside it"
            )
        cfg = Settings(place, CONFIG, place.json(CONFIG))
        sizes = {"d_in": cfg.size("hidden_size"), "n_latents": cfg.size("feature_size")}
        activation, threshold = _activation(cfg)
        cfg.ignore(*_IGNORED)
        reads = from_module_path(cfg.text("input_hookpoint", default="layers.0"))
        model = cfg.raw("model_name")
        tree: dict[str, Any] = {
            "reads": (reads,),
            "writes": (from_module_path(cfg.text("output_hookpoint", default="layers.0")),),
            **sizes,
            "activation": activation,
            "normalise": _normalise(cfg),
            "pre_bias": "tied",
            "model": {"name": model} if isinstance(model, str) else None,
            "training": {"opensae": cfg.tree},
        }
        cfg.warn_unread()
        config = make_config(tree, f"{place.shown}: {CONFIG}")
        state = read_state(place, file, KEYMAP, sizes, source=CONFIG).state
        if threshold is not None:
            state["threshold"] = Lazy.of(torch.full((config.n_latents,), threshold))
        return Draft(config, state)

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """One `model.safetensors`, whatever its size."""
        from unmix.formats.stores import write_safetensors

        draft = _expressible(one_draft(drafts))
        write_json(folder / CONFIG, _config(draft))
        write_safetensors(folder / WEIGHTS, write_state(draft.state, KEYMAP), {"format": "pt"})


def _files(place: Place) -> list[str]:
    """The files of a place that hold this layout; a shard stands for its index."""
    if place.file not in (None, CONFIG):
        index = (place.folder / INDEX).is_file() and str(place.file).startswith("model-")
        names = [INDEX if index else str(place.file)]
    else:
        saved = [name for name in (INDEX, WEIGHTS) if (place.folder / name).is_file()]
        names = saved[:1] or sorted(f.name for f in place.folder.glob("*.pt"))
    return [name for name in names if place.keys(name) == KEYS]


def _activation(cfg: Settings) -> tuple[dict[str, Any], float | None]:
    """The activation and its threshold. What the config leaves out has the defaults of the peer's constructor."""
    if cfg.choice("activation", "topk", "jumprelu", default="topk") == "topk":
        cfg.ignore("jumprelu_theta")
        return {"kind": "topk", "k": cfg.size("k", default=128), "relu": "before"}, None
    cfg.ignore("k")
    return {"kind": "jumprelu", "keep_max": True}, cfg.number("jumprelu_theta", default=0.5)


def _normalise(cfg: Settings) -> dict[str, Any]:
    back = cfg.flag("normalize_shift_back", default=False)
    eps = cfg.number("input_normalize_eps", default=1e-5)
    if cfg.flag("input_normalize", default=True):
        return {"kind": "layer_norm", "eps": eps, "ddof": 1, "eps_back": True, "restore": back}
    if back:
        raise cfg.error("normalize_shift_back is true without input_normalize: there is nothing to shift back")
    return {"kind": "none"}


def _expressible(draft: Draft) -> Draft:
    """The draft as this layout says it."""
    config, rule = draft.config, draft.config.normalise
    refuse_unless(draft, "opensae", ("topk", "jumprelu"), ("none", "standardise", "layer_norm"), keep_max=True)
    if len(config.reads) != 1 or len(config.writes) != 1:
        raise refuse(draft, "opensae", f"{len(config.reads)} reads and {len(config.writes)} writes")
    if config.width_out != config.d_in:
        raise refuse(draft, "opensae", f"d_out = {config.width_out} beside d_in = {config.d_in}")
    if config.skip:
        raise refuse(draft, "opensae", "a skip matrix")
    if rule.kind == "layer_norm" and (rule.ddof != 1 or (rule.restore and not rule.eps_back)):
        raise refuse(draft, "opensae", f"a layer norm other than ddof=1, undone with eps; found {rule!r}")
    draft = tie_input_bias(raw_gate(fold_scales(draft)))
    if isinstance(draft.config.activation, JumpReLU):
        if not draft.config.activation.keep_max:
            raise refuse(draft, "opensae", "a jumprelu that leaves a token with nothing above its threshold empty")
        theta = draft.state["threshold"]()
        if not bool((theta == theta[0]).all()):
            raise refuse(draft, "opensae", "a threshold of its own for each latent")
    return draft


def _config(draft: Draft) -> dict[str, Any]:
    config, said = draft.config, origin(draft, "opensae")
    rule = config.normalise if config.normalise.kind == "layer_norm" else Normalise()
    known = {
        "architectures": ["OpenSae"],
        "hidden_size": config.d_in,
        "feature_size": config.n_latents,
        "input_normalize": rule.kind == "layer_norm",
        "normalize_shift_back": rule.kind == "layer_norm" and rule.restore,
        "input_normalize_eps": rule.eps,
        "input_hookpoint": to_module_path(config.reads[0]),
        "output_hookpoint": to_module_path(config.writes[0]),
        "model_name": config.model.name if config.model is not None else said.get("model_name", ""),
        "activation": config.activation.kind,
        "torch_dtype": "float32",
    }
    if isinstance(config.activation, JumpReLU):
        known["jumprelu_theta"] = float(draft.state["threshold"]()[0])
    else:
        known["k"] = getattr(config.activation, "k", 0)
    fresh = {
        "normalize_decoder": False,
        "decoder_impl": "torch",
        "multi_topk": None,
        "auxk_alpha": 0.0,
        "l1_coef": None,
    }
    return {**fresh, **{k: v for k, v in said.items() if k not in ("dtype", "k", "jumprelu_theta")}, **known}
