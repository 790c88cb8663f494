"""What the families of published coders share: facts that stand in the names of their folders, and nowhere else."""

from __future__ import annotations

import logging
import re
from typing import Any

from unmix.formats.place import Place

log = logging.getLogger("unmix")

_LAYER = re.compile(r"(?:^|[/_])layer_?(\d+)(?![^/_.])")
_L0 = re.compile(r"(?:average_l0|L0)_(\d+(?:\.\d+)?)(?![^/_.])")


def path_of(place: Place) -> str:
    """The path of a place, as text; the repository and folder that it was fetched from, where known, come first."""
    repo = place.origin.get("repo")
    fetched = "" if repo is None else f"{repo}/{place.origin.get('path') or ''}/\n"
    return fetched + place.hints


def layer_in(text: str) -> int | None:
    """20 of `…/layer_20/width_16k/…`, 3 of `…/layer3.sae.pt`: the last layer that a path names."""
    found = _LAYER.findall(text)
    return int(found[-1]) if found else None


def l0_in(text: str) -> float | None:
    """71.0 of `…/average_l0_71/…`, 50.0 of `…-W32K-L0_50/…`."""
    found = _L0.findall(text)
    return float(found[-1]) if found else None


def published(l0: float | None) -> dict[str, Any]:
    """The part of `training` that says which L0 was published; empty where none was."""
    return {} if l0 is None else {"published": {"l0": float(l0)}}


def warn_unsaid(place: Place, file: str, what: str, where: str) -> None:
    """Say what the files of a place do not say, and where it was looked for."""
    log.warning("%s: %s: %s is not in the file, and was not found in %s", place.shown, file, what, where)
