"""mats_sae_training (2024), which became SAELens: pickles `.pt`, `.pkl`, `.pkl.gz`. Read only; nothing in them is run.

One coder: `{"cfg": <config object>, "state_dict": {W_enc [d, F], b_enc, W_dec [F, d], b_dec[, scaling_factor]}}`. A
sweep: a group object whose `autoencoders` are modules with a config each. b_dec is subtracted from the input unless the
config says otherwise, which the first ones could not. `STEM_log_feature_sparsity.pt` beside them holds how often each
latent fired. The config's attributes are kept in `config.training["mats_sae_training"]`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from unmix.formats.draft import Draft
from unmix.formats.hook_names import from_transformer_lens
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.sae_lens_legacy import read_older, renamed
from unmix.formats.layouts.sae_lens_parts import FREQUENCY
from unmix.formats.lazy import Lazy
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings
from unmix.formats.stores import Bag

_SUFFIXES = (".pt", ".pkl", ".pkl.gz")
_SPARSITY = "_log_feature_sparsity"
_OWN = ("sae_training.", "sae_lens.", "mats_sae_training.")
_MEMBER = re.compile(r"^autoencoders\.(.+)\._parameters\.W_enc$")


@dataclass(frozen=True)
class _Coder:
    """One coder of a file."""

    file: str
    prefix: str
    """Before the names of its tensors."""
    config: Bag
    member: str = ""
    """Its place in a group."""


class MatsFormat(Format):
    """Pickles of mats_sae_training, and those that SAELens 0.2 to 2 could still write."""

    name = "mats_sae_training"
    looks_for = "a .pt, .pkl or .pkl.gz of cfg + state_dict, or of a group of autoencoders, by sae_training or sae_lens"

    def recognise(self, place: Place) -> bool:
        """By the names of the tensors and the class of the config."""
        return bool(_coders(place))

    def coders(self, place: Place) -> tuple[str, ...]:
        """The files' names, and each coder's hook where a file holds a group."""
        return tuple(_named(place))

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module. `FormatError` for a setting that is not supported, or what does not fit."""
        coder = _named(place)[name]
        tree = cast("dict[str, Any]", _plain(coder.config))
        settings = Settings(place, coder.file, renamed(tree))
        draft = read_older(settings, tree, self.name, coder.file, coder.prefix)
        return Draft(draft.config, draft.state, _frequencies(place, coder, draft.config.n_latents))


def _coders(place: Place) -> list[_Coder]:
    """Every coder of the place's files."""
    files = [place.file] if place.file is not None else place.glob("*")
    named = [f for f in files if f.endswith(_SUFFIXES) and not _stem(f).endswith(_SPARSITY)]
    return [coder for file in named for coder in _in_file(place, file)]


def _in_file(place: Place, file: str) -> list[_Coder]:
    keys = place.keys(file)
    found = [("state_dict.", "cfg", "")] if {"state_dict.W_enc", "state_dict.W_dec"} <= keys else []
    members = [match[1] for key in keys if (match := _MEMBER.match(key))]
    found += [
        (f"autoencoders.{member}._parameters.", f"autoencoders.{member}.cfg", member)
        for member in sorted(members, key=lambda m: (len(m), m))
    ]
    if not found:
        return []
    values = place.store(file).values
    configs = [values.get(config) for _, config, _ in found]
    return [
        _Coder(file, prefix, config, member)
        for (prefix, _, member), config in zip(found, configs, strict=True)
        if isinstance(config, Bag) and config.kind.startswith(_OWN)
    ]


def _named(place: Place) -> dict[str, _Coder]:
    """Coders by name: of a lone one the empty string."""
    coders = _coders(place)
    if len(coders) == 1:
        return {"": coders[0]}
    files = {coder.file for coder in coders}
    names = [_name(coder, with_file=len(files) > 1) for coder in coders]
    several = {name for name, n in Counter(names).items() if n > 1}
    return {
        f"{name}.{coder.member}" if name in several else name: coder for name, coder in zip(names, coders, strict=True)
    }


def _name(coder: _Coder, with_file: bool) -> str:
    hook = from_transformer_lens(str(coder.config.get("hook_point") or coder.member))
    if not with_file:
        return hook
    return f"{_stem(coder.file)}/{hook}" if coder.member else _stem(coder.file)


def _frequencies(place: Place, coder: _Coder, n_latents: int) -> dict[str, Lazy]:
    """The statistic from the file beside it: one tensor, or one a member of the group."""
    file = f"{_stem(coder.file)}{_SPARSITY}.pt"
    keys = place.keys(file)
    key = next((key for key in (coder.member, "") if key in keys), None)
    if key is None:
        return {}
    keymap = (Stored(key, FREQUENCY, ("n_latents",), kind="statistic"),)
    sizes = {"n_latents": n_latents}
    return read_state(place, file, keymap, sizes, source=coder.file, whole=False).statistics


def _stem(file: str) -> str:
    return next((file.removesuffix(suffix) for suffix in reversed(_SUFFIXES) if file.endswith(suffix)), file)


def _plain(value: Any) -> Any:
    """What a config object holds, as JSON could say it."""
    if isinstance(value, Bag):
        return {key: _plain(item) for key, item in value.attributes.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, str | int | float | bool | None) else str(value)
