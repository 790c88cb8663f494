"""Take a language model apart into sparse, nameable latents, and put it back together.

Names load on first use: `import unmix` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from unmix._version import __version__
from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.coder.coder_set import CoderSet
    from unmix.coder.codes import Codes
    from unmix.coder.config import CoderConfig
    from unmix.coder.identity import IdentityCoder
    from unmix.coder.sparse_coder import SparseCoder
    from unmix.core.policy import InputPolicy
    from unmix.evaluate import evaluate
    from unmix.explain import explain, score
    from unmix.formats import convert, inspect, load, load_all
    from unmix.index import open_index
    from unmix.lm.attribute import (
        JacobianLens,
        ablation_effect,
        attribute,
        decoder_neighbours,
        direct_logits,
        find_circuit,
        fit_jacobian,
        head_sources,
        token_set_enrichment,
    )
    from unmix.lm.intervene import (
        Ablate,
        Add,
        Clamp,
        Fires,
        LatentDistribution,
        Multiply,
        Set,
        Steer,
        interventions_from_json,
        interventions_to_json,
        measure_latents,
    )
    from unmix.lm.load import load_model
    from unmix.run.config import RunConfig, TrainConfig
    from unmix.run.public import run, train, view
    from unmix.train.anything import train_on
    from unmix.train.session import load_session

_NAMES = {
    "CoderSet": "unmix.coder.coder_set",
    "Codes": "unmix.coder.codes",
    "CoderConfig": "unmix.coder.config",
    "IdentityCoder": "unmix.coder.identity",
    "SparseCoder": "unmix.coder.sparse_coder",
    "InputPolicy": "unmix.core.policy",
    "evaluate": "unmix.evaluate",
    "explain": "unmix.explain",
    "score": "unmix.explain",
    "convert": "unmix.formats",
    "inspect": "unmix.formats",
    "load": "unmix.formats",
    "load_all": "unmix.formats",
    "open_index": "unmix.index",
    "JacobianLens": "unmix.lm.attribute",
    "ablation_effect": "unmix.lm.attribute",
    "attribute": "unmix.lm.attribute",
    "decoder_neighbours": "unmix.lm.attribute",
    "direct_logits": "unmix.lm.attribute",
    "find_circuit": "unmix.lm.attribute",
    "fit_jacobian": "unmix.lm.attribute",
    "head_sources": "unmix.lm.attribute",
    "token_set_enrichment": "unmix.lm.attribute",
    "Ablate": "unmix.lm.intervene",
    "Add": "unmix.lm.intervene",
    "Clamp": "unmix.lm.intervene",
    "Multiply": "unmix.lm.intervene",
    "Set": "unmix.lm.intervene",
    "Fires": "unmix.lm.intervene",
    "LatentDistribution": "unmix.lm.intervene",
    "Steer": "unmix.lm.intervene",
    "interventions_from_json": "unmix.lm.intervene",
    "interventions_to_json": "unmix.lm.intervene",
    "measure_latents": "unmix.lm.intervene",
    "load_model": "unmix.lm.load",
    "RunConfig": "unmix.run.config",
    "TrainConfig": "unmix.run.config",
    "run": "unmix.run.public",
    "train": "unmix.run.public",
    "view": "unmix.run.public",
    "train_on": "unmix.train.anything",
    "load_session": "unmix.train.session",
}

__all__ = [
    "Ablate", "Add", "Clamp", "CoderConfig", "CoderSet", "Codes", "Fires", "IdentityCoder", "InputPolicy",
    "JacobianLens", "LatentDistribution", "Multiply", "RunConfig", "Set", "SparseCoder", "Steer", "TrainConfig",
    "__version__", "ablation_effect", "attribute", "convert", "decoder_neighbours", "direct_logits", "evaluate",
    "explain", "find_circuit", "fit_jacobian", "head_sources", "inspect", "interventions_from_json",
    "interventions_to_json", "load", "load_all", "load_model", "load_session", "measure_latents", "open_index", "run",
    "score", "token_set_enrichment", "train", "train_on", "view",
]  # fmt: skip

_CALLABLE = ("evaluate", "explain", "run", "train")
"""Rooms that share their name with the function that users call: `unmix.train(config)` and `unmix.train.trainer`."""

_exports = lazy_exports(_NAMES)


class _CallableRoom(ModuleType):
    """A package that is also the function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _exports("unmix", self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Face(ModuleType):
    """This package: makes the rooms of `_CALLABLE` callable as they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and isinstance(value, ModuleType):
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"unmix.{name}")
    return _exports(__name__, name)


def __dir__() -> list[str]:
    return __all__
