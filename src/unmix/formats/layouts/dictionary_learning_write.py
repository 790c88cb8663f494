"""Writing a coder as a trainer's folder of dictionary_learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from unmix.coder.config import TopK
from unmix.core.atomic import write_json
from unmix.formats.draft import Draft
from unmix.formats.equivalents import (
    origin,
    raw_gate,
    refuse,
    refuse_unless,
    refuse_unless_sae,
    tie_input_bias,
)
from unmix.formats.folds import fold_input_bias, fold_scales
from unmix.formats.hook_names import to_submodule_name
from unmix.formats.keymap import write_state
from unmix.formats.layouts.dictionary_learning import CONFIG, KINDS, WEIGHTS
from unmix.formats.lazy import Lazy
from unmix.formats.stores import write_torch

_CLASSES = {
    "gated": "GatedAutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
}


def write_dictionary_learning(draft: Draft, folder: Path) -> None:
    """Write `ae.pt` and `config.json` in float32; codes and outputs are those of the coder.

    Scales, standardisation and input biases are folded where the class has none of its own. A relu coder becomes an
    AutoEncoder where its decoder is at unit norm, which the peer would otherwise change, else an AutoEncoderNew.
    `FormatError` for what no class says.
    """
    refuse_unless(draft, "dictionary_learning", ("relu", *_CLASSES))
    refuse_unless_sae(draft, "dictionary_learning")
    if isinstance(draft.config.activation, TopK) and draft.config.activation.magnitude:
        raise refuse(draft, "dictionary_learning", "selection by magnitude")
    draft = raw_gate(fold_scales(draft))
    cls, facts = _class_for(draft)
    draft = tie_input_bias(draft) if KINDS[cls].pre_bias == "tied" else fold_input_bias(draft)
    stored: dict[str, Any] = dict(write_state(draft.state, KINDS[cls].keymap))
    k = getattr(draft.config.activation, "k", None)
    if k is not None:
        stored["k"] = Lazy.of(torch.tensor(k, dtype=torch.int32))
    if cls == "AutoEncoderTopK":
        stored["threshold"] = Lazy.of(torch.tensor(float(facts.get("threshold", -1.0))))
    if cls == "MatryoshkaBatchTopKSAE":
        stored["group_sizes"] = Lazy.of(torch.tensor(facts["group_sizes"]))
    write_json(folder / CONFIG, _config(draft, cls, k))
    write_torch(folder / WEIGHTS, stored)


def _class_for(draft: Draft) -> tuple[str, dict[str, Any]]:
    """The class that says this coder, and what its own file said of thresholds and groups."""
    facts: Any = origin(draft, "dictionary_learning").get("tensors") or {}
    facts = cast("dict[str, Any]", facts)
    kind = draft.config.activation.kind
    if kind == "relu":
        norms = draft.state["W_dec"]().norm(dim=-1)
        unit = bool(torch.allclose(norms, torch.ones_like(norms)))
        return "AutoEncoder" if unit and draft.config.pre_bias == "tied" else "AutoEncoderNew", facts
    groups = facts.get("group_sizes")
    if kind == "batchtopk" and isinstance(groups, list) and sum(cast("list[int]", groups)) == draft.config.n_latents:
        return "MatryoshkaBatchTopKSAE", facts
    return _CLASSES[kind], facts


def _config(draft: Draft, cls: str, k: int | None) -> dict[str, Any]:
    config = draft.config
    said = {key: value for key, value in origin(draft, "dictionary_learning").items() if key != "tensors"}
    trainer: dict[str, Any] = said.get("trainer") or {}
    name, layer = to_submodule_name(config.reads[0])
    known: dict[str, Any] = {
        "dict_class": cls,
        "activation_dim": config.d_in,
        "dict_size": config.n_latents,
        "layer": layer,
        "submodule_name": name,
        "lm_name": config.model.name if config.model is not None else trainer.get("lm_name", ""),
    }
    if k is not None:
        known["k"] = k
    return {**said, "trainer": {**trainer, **known}, "buffer": said.get("buffer") or {}}
