"""Gemma Scope 2, several layers together: cross-layer transcoders and weakly causal crosscoders.

`config.json` + one `params_layer_{i}.safetensors` for each layer, `w_dec [latents, layers, d]`. In both kinds a latent
reads one layer (technical report §2.6) and writes that layer and those after it, so each layer is a coder and their
writes add up: `load_all` gives a `CoderSet`. Layer i's coder carries `b_dec` and the affine connection of layer i.
What a file holds for earlier layers is left out, with a log warning where it is not zero. The config names the layers:
`model.layers.{all}.…` of a transcoder, `model.layers.{5,9,12,15}.output` of a crosscoder.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import torch
from torch import Tensor

from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config
from unmix.formats.hook_names import from_module_path
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.gemma_scope_2 import (
    AFTER,
    BEFORE,
    CONFIG,
    KEYMAP,
    NEEDED,
    config_of,
    provenance,
    require_skip,
)
from unmix.formats.layouts.scopes import path_of
from unmix.formats.lazy import apply
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

log = logging.getLogger("unmix")

_KEYMAP = (
    *(entry for entry in KEYMAP if entry.key != "w_dec"),
    Stored("w_dec", "W_dec", ("n_latents", "layers", "d_out")),
)
_FILE = re.compile(r"^params_layer_(\d+)\.safetensors$")
_SEVERAL = re.compile(r"\{([^{}]*)\}")
_CROSSCODER = re.compile(r"/crosscoder(?:_all)?/layer((?:_\d+)+)_width")


class GemmaScope2LayersFormat(Format):
    """`params_layer_{i}.safetensors` whose `w_dec` has three dimensions."""

    name = "gemma_scope_2_layers"
    looks_for = "params_layer_0.safetensors, … with w_enc, b_enc, w_dec [latents, layers, d], b_dec, threshold"

    def recognise(self, place: Place) -> bool:
        """By the names of the files and of their tensors."""
        files = _files(place)
        if not files:
            return False
        headers = place.headers(next(iter(files.values())))
        return set(headers) >= NEEDED and len(headers["w_dec"].shape) == 3

    def coders(self, place: Place) -> tuple[str, ...]:
        """`layer_5`, …: by the model's layers, which a crosscoder has only some of."""
        files = _files(place)
        if place.file in files.values():
            return ("",)
        layers = _layers(_settings(place), place, len(files))
        return tuple(f"layer_{layers[i]}" if i < len(layers) else f"layer_{i}" for i in files)

    def joint(self, place: Place) -> bool:
        """Unless one layer's file was named."""
        return len(self.coders(place)) > 1

    def read(self, place: Place, name: str = "") -> Draft:
        """One layer's coder. `FormatError` where layers are missing, or named differently in config and files."""
        files = _files(place)
        index = list(files)[self.coders(place).index(name)]
        file = files[index]
        found = read_state(place, file, _KEYMAP)
        count = found.sizes["layers"]
        settings = _settings(place)
        layers = _layers(settings, place, count)
        if len(layers) != count or index >= count or (not place.file and sorted(files) != list(range(count))):
            raise FormatError(
                f"{place.shown}: {file}: w_dec writes {count} layers, found {len(files)} files and the layers "
                f"{', '.join(map(str, layers))} in {CONFIG} or the path"
            )
        skip = "W_skip" in found.state
        require_skip(settings, skip)
        rest = count - index
        state = dict(found.state)
        state["W_dec"] = apply(_from_layer(index, f"{place.shown}: {file}"), state["W_dec"])
        state["b_dec"] = apply(lambda b: padded(b, rest), state["b_dec"])
        if skip:
            state["W_skip"] = apply(lambda W: padded(W, rest), state["W_skip"])
        read, written = _patterns(settings, place)
        tree = {
            "reads": (_at(read, layers[index]),),
            "writes": tuple(_at(written, layer) for layer in layers[index:]),
            "d_in": found.sizes["d_in"],
            "d_out": found.sizes["d_out"] * rest,
            "n_latents": found.sizes["n_latents"],
            "activation": {"kind": "jumprelu"},
            "pre_bias": "none",
            "skip": skip,
            **provenance(settings, self.name),
        }
        settings.warn_unread()
        return Draft(make_config(tree, f"{place.shown}: {file}"), state)


def _files(place: Place) -> dict[int, str]:
    """The files by the index in their names, in that order; of a named file, it alone."""
    names = place.glob("params_layer_*.safetensors")
    if place.file == CONFIG:
        names = sorted(f.name for f in place.folder.glob("params_layer_*.safetensors"))
    found = {int(match[1]): name for name in names if (match := _FILE.match(name))}
    return dict(sorted(found.items()))


def _settings(place: Place) -> Settings:
    return config_of(place, next(iter(_files(place).values())))


def _patterns(settings: Settings, place: Place) -> tuple[str, str]:
    """Hooks read and written, with the layer in braces."""
    if "hf_hook_point_in" in settings:
        read = settings.text("hf_hook_point_in")
        return read, settings.text("hf_hook_point_out", default=read)
    if _CROSSCODER.search(path_of(place)):
        return "model.layers.{}.output", "model.layers.{}.output"
    if "/clt/" in path_of(place):
        return f"model.layers.{{}}.{BEFORE}", f"model.layers.{{}}.{AFTER}"
    raise settings.error(
        f"which hooks these layers read and write is in no {CONFIG} beside them and not in their path (…/clt/…, "
        "…/crosscoder/layer_5_9_12_15_width_…)"
    )


def _layers(settings: Settings, place: Place, count: int) -> list[int]:
    """The layers of the model, in the order of the files."""
    stated = _SEVERAL.search(_patterns(settings, place)[0])
    listed = re.findall(r"\d+", stated[1]) if stated else []
    if not listed and (match := _CROSSCODER.search(path_of(place))):
        listed = re.findall(r"\d+", match[1])
    return [int(layer) for layer in listed] or list(range(count))


def _at(pattern: str, layer: int) -> str:
    return from_module_path(_SEVERAL.sub(str(layer), pattern))


def _from_layer(index: int, where: str) -> Callable[[Tensor], Tensor]:
    """Of `[latents, layers, d]`, the layers from `index` on, side by side."""

    def cut(W: Tensor) -> Tensor:
        if not W.is_meta and bool(W[:, :index].any()):
            log.warning("%s: w_dec also holds weights to earlier layers; they are left out", where)
        return W[:, index:].flatten(1)

    return cut


def padded(part: Tensor, parts: int) -> Tensor:
    """What goes to the first of `parts` writes, and zeros for the others."""
    return torch.cat([part, part.new_zeros((parts - 1) * part.shape[0], *part.shape[1:])])
