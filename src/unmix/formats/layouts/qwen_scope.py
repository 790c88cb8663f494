"""Qwen Scope: one `layer{n}.sae.pt` for each layer of a model, and one `config.json` for all.

f = TopK_k(x W_encᵀ + b_enc) without a relu, x̂ = f W_decᵀ + b_dec; b_dec is not subtracted. k and the hook are in the
config, and k in the repository's name too (`SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`), which serves where a file was
fetched alone. The config is kept under `training["qwen_scope"]`.
"""

from __future__ import annotations

import re
from typing import Any

from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.scopes import l0_in, path_of, published, warn_unsaid
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

CONFIG = "config.json"
_KEYMAP = (
    Stored("W_enc", "W_enc", ("d_sae", "d_model")),
    Stored("b_enc", "b_enc", ("d_sae",)),
    Stored("W_dec", "W_dec", ("d_model", "d_sae"), "transpose"),
    Stored("b_dec", "b_dec", ("d_model",)),
)
_FILE = re.compile(r"^layer(\d+)\.sae\.pt$")
_REPO = re.compile(r"SAE-Res-(Qwen[\w.-]+?)-W\d+K?-L0_\d+")


class QwenScopeFormat(Format):
    """`layer{n}.sae.pt` of `W_enc`, `b_enc`, `W_dec`, `b_dec`."""

    name = "qwen_scope"
    looks_for = "layer0.sae.pt, … with W_enc, b_enc, W_dec, b_dec"

    def recognise(self, place: Place) -> bool:
        """By the names of the files, and of the tensors in the first."""
        files = _files(place)
        return bool(files) and place.keys(next(iter(files.values()))) >= {entry.key for entry in _KEYMAP}

    def coders(self, place: Place) -> tuple[str, ...]:
        """`layer3`, …; a file that was named has no other name."""
        files = _files(place)
        return ("",) if len(files) == 1 else tuple(files)

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module. `FormatError` where neither a config nor the path says k."""
        files = _files(place)
        file = files[name] if name else next(iter(files.values()))
        settings = Settings(place, CONFIG, place.peek(CONFIG))
        if CONFIG in place.problems:
            place.json(CONFIG)
        sizes = {key: settings.size(key) for key in ("d_model", "d_sae") if key in settings}
        found = read_state(place, file, _KEYMAP, sizes, source=CONFIG)
        layer = int(file.removeprefix("layer").removesuffix(".sae.pt"))
        tree: dict[str, Any] = {
            "reads": (f"blocks.{layer}.{_point(place, settings, file)}",),
            "d_in": found.sizes["d_model"],
            "n_latents": found.sizes["d_sae"],
            "activation": {"kind": "topk", "k": _k(place, settings, file), "relu": "none"},
            "pre_bias": "none",
            "model": _model(place, settings),
            "training": {self.name: settings.tree, **published(l0_in(path_of(place)))},
        }
        settings.ignore("num_layers", "dtype")
        settings.warn_unread()
        return Draft(make_config(tree, f"{place.shown}: {file}"), found.state)


def _files(place: Place) -> dict[str, str]:
    """The files by their names without the ending, by layer; of a named file, it alone."""
    names = place.glob("layer*.sae.pt")
    if place.file == CONFIG:
        names = sorted(f.name for f in place.folder.glob("layer*.sae.pt"))
    found = {int(match[1]): name for name in names if (match := _FILE.match(name))}
    return {name.removesuffix(".sae.pt"): name for _, name in sorted(found.items())}


def _k(place: Place, settings: Settings, file: str) -> int:
    settings.choice("model_type", "topk_sae", default="topk_sae")
    if "k" in settings:
        return settings.size("k")
    stated = l0_in(path_of(place))
    if stated is None:
        raise settings.error(
            f"how many latents a token keeps is not said for {file}: neither as k here, nor in the path "
            '(…-W32K-L0_50/…); fetch the release\'s config.json too, or write {"k": …} into one beside the file'
        )
    return int(stated)


def _point(place: Place, settings: Settings, file: str) -> str:
    """The hook's point; the path says it as `SAE-Res`."""
    if "hook_point" not in settings and not _REPO.search(path_of(place)):
        warn_unsaid(place, file, "the hook (taken for resid_post)", "config.json or the path (…/SAE-Res-Qwen3-…)")
    return settings.text("hook_point", default="resid_post")


def _model(place: Place, settings: Settings) -> dict[str, str] | None:
    repo = _REPO.search(path_of(place))
    name = settings.text("base_model", default=f"Qwen/{repo[1]}" if repo else "")
    return {"name": name} if name else None
