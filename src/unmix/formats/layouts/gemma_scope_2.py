"""Gemma Scope 2, one layer at a time: `config.json` + `params.safetensors` of SAEs and transcoders of Gemma 3.

f = relu(z)·1[z > θ], z = x w_enc + b_enc, x̂ = f w_dec + b_dec, and for affine transcoders + x·affine_skip_connection
(stored `[d_in, d_out]`). Hooks are module paths in the config; folders without one say them in their names
(`resid_post/layer_12_width_16k_l0_small`). The whole config is kept under `training["gemma_scope_2"]`.
"""

from __future__ import annotations

import re
from typing import Any

from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config
from unmix.formats.hook_names import from_module_path
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.scopes import layer_in, path_of, published, warn_unsaid
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

CONFIG = "config.json"
WEIGHTS = "params.safetensors"
KEYMAP = (
    Stored("w_enc", "W_enc", ("d_in", "n_latents"), "transpose"),
    Stored("b_enc", "b_enc", ("n_latents",)),
    Stored("b_dec", "b_dec", ("d_out",)),
    Stored("w_dec", "W_dec", ("n_latents", "d_out")),
    Stored("threshold", "threshold", ("n_latents",)),
    Stored("affine_skip_connection", "W_skip", ("d_in", "d_out"), "transpose", optional=True),
)
NEEDED = {entry.key for entry in KEYMAP if not entry.optional}
BEFORE, AFTER = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
_SITES = {
    "resid_post": ("output", "output"),
    "mlp_out": (AFTER, AFTER),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "transcoder": (BEFORE, AFTER),
}
_SITE = re.compile(rf"(?:^|/)({'|'.join(_SITES)})(?:_all)?/")
_REPO = re.compile(r"gemma-scope-2-(\d+[mb])-(pt|it)")


class GemmaScope2Format(Format):
    """`params.safetensors` of `w_enc`, `b_enc`, `w_dec`, `b_dec`, `threshold`."""

    name = "gemma_scope_2"
    looks_for = f"{WEIGHTS} with w_enc, b_enc, w_dec, b_dec, threshold"

    def recognise(self, place: Place) -> bool:
        """By the names of the tensors."""
        return place.file in (None, CONFIG, WEIGHTS) and place.keys(WEIGHTS) >= NEEDED

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module. `FormatError` for another architecture, or a promised skip that is not there."""
        found = read_state(place, WEIGHTS, KEYMAP)
        settings = config_of(place, WEIGHTS)
        skip = "W_skip" in found.state
        require_skip(settings, skip)
        reads, writes = (_hook(settings, place, index) for index in (0, 1))
        if reads is None:
            wanted = "config.json or its path (…/resid_post/layer_12_width_16k_l0_small)"
            warn_unsaid(place, WEIGHTS, "the hook that it reads", wanted)
        tree = {
            "reads": (reads or "input",),
            "writes": () if reads is None else (writes or reads,),
            "d_in": found.sizes["d_in"],
            "d_out": found.sizes["d_out"],
            "n_latents": found.sizes["n_latents"],
            "activation": {"kind": "jumprelu"},
            "pre_bias": "none",
            "skip": skip,
            **provenance(settings, self.name),
        }
        settings.warn_unread()
        return Draft(make_config(tree, f"{place.shown}: {WEIGHTS}"), found.state)


def config_of(place: Place, weights: str) -> Settings:
    """`config.json`, or what the path says where there is none."""
    if (place.folder / CONFIG).is_file():
        settings = Settings(place, CONFIG, place.json(CONFIG))
    else:
        repo = _REPO.search(path_of(place))
        model = {} if repo is None else {"model_name": f"google/gemma-3-{repo[1]}-{repo[2]}"}
        settings = Settings(place, weights, model)
    settings.choice("architecture", "jump_relu", default="jump_relu")
    settings.ignore("width", "type")
    return settings


def require_skip(settings: Settings, there: bool) -> None:
    """`FormatError` where the config promises an affine connection that the file does not hold."""
    if settings.flag("affine_connection", default=there) and not there:
        raise settings.error("affine_connection is true, but there is no tensor affine_skip_connection")


def provenance(settings: Settings, format: str) -> dict[str, Any]:
    """Model, published L0 and the config itself."""
    model = settings.text("model_name", default="")
    l0 = settings.number("l0", default=0.0)
    return {
        "model": {"name": model} if model else None,
        "training": {format: settings.tree, **published(l0 or None)},
    }


def _hook(settings: Settings, place: Place, index: int) -> str | None:
    """What is read (0) or written (1); None where neither config nor path says."""
    key = ("hf_hook_point_in", "hf_hook_point_out")[index]
    stated = settings.text(key, default="")
    if stated:
        return from_module_path(stated)
    site, layer = _SITE.search(path_of(place)), layer_in(path_of(place))
    if "hf_hook_point_in" in settings or site is None or layer is None:
        return None
    return from_module_path(f"model.layers.{layer}.{_SITES[site[1]][index]}")
