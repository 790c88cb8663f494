"""EleutherAI's sparsify: `cfg.json` + `sae.safetensors` in a folder named after the hookpoint, read and written.

relu(W(x − b_dec) + b_enc), then the k largest, or the largest of each of k groups (`groupmax`); y = f·W_dec + b_dec,
plus x·W_skipᵀ. A transcoder (`transcode`) subtracts nothing. Configs of mid-2024 may say `signed`: no relu, and the k
largest by magnitude. The decoder is stored latent by latent. `multi_topk` and `normalize_decoder` concern training.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmix.coder.config import TopK
from unmix.core.atomic import write_json
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import (
    make_config,
    one_draft,
    origin,
    raw_gate,
    read_hooks,
    refuse,
    refuse_unless,
    tie_input_bias,
    write_hooks,
)
from unmix.formats.folds import fold_input_bias, fold_scales
from unmix.formats.hook_names import from_module_path, module_input
from unmix.formats.keymap import Stored, read_state, write_state
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

log = logging.getLogger("unmix")

CFG = "cfg.json"
WEIGHTS = "sae.safetensors"
KEYMAP = (
    Stored("encoder.weight", "W_enc", ("n_latents", "d_in")),
    Stored("encoder.bias", "b_enc", ("n_latents",)),
    Stored("W_dec", "W_dec", ("n_latents", "d_in")),
    Stored("b_dec", "b_dec", ("d_in",)),
)
SKIP = Stored("W_skip", "W_skip", ("d_in", "d_in"))
KEYS = frozenset(entry.key for entry in KEYMAP)


class SparsifyFormat(Format):
    """`cfg.json` + `sae.safetensors`."""

    name = "sparsify"
    looks_for = f"{CFG} + {WEIGHTS} with encoder.weight, encoder.bias, W_dec, b_dec"
    writable = True

    def recognise(self, place: Place) -> bool:
        """By the tensors, and a config of this layout or none (then OpenSAE's weights look the same)."""
        file = _weights(place)
        if not KEYS <= place.keys(file) <= KEYS | {SKIP.key}:
            return False
        if (place.folder / CFG).is_file():
            return {"d_in", "k"} <= set(place.peek(CFG))
        return not (place.folder / "config.json").is_file()

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module."""
        file = _weights(place)
        if not (place.folder / CFG).is_file():
            raise FormatError(f"{place.shown}: {file} holds sparsify's tensors, but {CFG} is missing, which says k")
        cfg = Settings(place, CFG, place.json(CFG))
        d_in, k = cfg.size("d_in"), cfg.size("k")
        # 0, the default, means that the expansion factor says it.
        said = cfg.raw("num_latents") not in (None, 0)
        n_latents = cfg.size("num_latents") if said else d_in * cfg.size("expansion_factor")
        signed, transcode = cfg.flag("signed", default=False), cfg.flag("transcode", default=False)
        skip = cfg.flag("skip_connection", default=False)
        cfg.ignore("normalize_decoder", "multi_topk", "expansion_factor")
        activation: dict[str, Any]
        if cfg.choice("activation", "topk", "groupmax", default="topk") == "groupmax":
            activation = {"kind": "groupmax", "k": k}
        elif signed:
            activation = {"kind": "topk", "k": k, "relu": "none", "magnitude": True}
        else:
            activation = {"kind": "topk", "k": k, "relu": "before"}
        cfg.warn_unread()
        tree = {
            **_hooks(place, transcode),
            "d_in": d_in,
            "n_latents": n_latents,
            "activation": activation,
            "pre_bias": "none" if transcode else "tied",
            "skip": skip,
            "training": {"sparsify": cfg.tree},
        }
        config = make_config(tree, f"{place.shown}: {CFG}")
        keymap = (*KEYMAP, SKIP) if skip else KEYMAP
        found = read_state(place, file, keymap, {"d_in": d_in, "n_latents": n_latents}, source=CFG)
        return Draft(config, found.state)

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """Signed coders with the keys of mid-2024, the only sparsify that reads them right."""
        from unmix.formats.stores import write_safetensors

        draft = _expressible(one_draft(drafts))
        config = draft.config
        keymap = (*KEYMAP, SKIP) if config.skip else KEYMAP
        write_json(folder / CFG, _cfg(draft))
        write_safetensors(folder / WEIGHTS, write_state(draft.state, keymap))
        write_hooks(draft, folder)


def _weights(place: Place) -> str:
    return WEIGHTS if place.file in (None, CFG) else str(place.file)


def _hooks(place: Place, transcode: bool) -> dict[str, Any]:
    """From the name of the folder, past `seedN`; a transcoder reads what goes into the module it is named after."""
    noted = read_hooks(place)
    if noted:
        return noted
    parts = [part for part in place.hints.split("/") if not re.fullmatch(r"seed\d+", part)]
    named = [part for part in parts if part != place.file]
    folder = named[-1] if named else ""
    hook = from_module_path(folder)
    if hook == folder:
        return {"name": folder} if folder else {}
    return {"reads": (module_input(hook),), "writes": (hook,)} if transcode else {"reads": (hook,)}


def _expressible(draft: Draft) -> Draft:
    """The draft as this layout says it."""
    config = draft.config
    refuse_unless(draft, "sparsify", ("topk", "groupmax"), signed=True)
    if len(config.reads) != 1 or len(config.writes) != 1:
        raise refuse(draft, "sparsify", f"{len(config.reads)} reads and {len(config.writes)} writes")
    if config.width_out != config.d_in:
        raise refuse(draft, "sparsify", f"d_out = {config.width_out} beside d_in = {config.d_in}")
    activation = config.activation
    if isinstance(activation, TopK) and activation.relu == "none" and not activation.magnitude:
        raise refuse(draft, "sparsify", "signed codes that are not selected by magnitude")
    draft = raw_gate(fold_scales(draft))
    if config.reads != config.writes:
        return fold_input_bias(draft)
    return tie_input_bias(draft)


def _cfg(draft: Draft) -> dict[str, Any]:
    config, said = draft.config, origin(draft, "sparsify")
    activation = config.activation
    k = getattr(activation, "k", 0)
    common = {
        "expansion_factor": max(1, config.n_latents // config.d_in),
        "normalize_decoder": bool(said.get("normalize_decoder", False)),
        "k": k,
        "d_in": config.d_in,
    }
    if isinstance(activation, TopK) and activation.magnitude:
        log.warning("%s: signed codes are read by sparsify of June to August 2024 only; later ones cut them at 0",
                    config.name)  # fmt: skip
        exact = config.n_latents == config.d_in * common["expansion_factor"]
        return {**common, "signed": True} | ({} if exact else {"num_latents": config.n_latents})
    return {
        **common,
        "activation": "groupmax" if activation.kind == "groupmax" else "topk",
        "num_latents": config.n_latents,
        "multi_topk": bool(said.get("multi_topk", False)),
        "skip_connection": config.skip,
        "transcode": config.reads != config.writes,
    }
