"""What a place holds, told even where `load` refuses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import UnmixError
from unmix.formats.detection import TENSORS, choose_format, recognised
from unmix.formats.loading import read_draft, resolve
from unmix.formats.place import Place
from unmix.formats.stores import Store

_SETTINGS = (".json", ".yaml", ".yml")
_SETTINGS_BYTES = 1_000_000
_CHUNK = 2**22


def inspect(place: str | Path, format: str | None = None) -> dict[str, Any]:
    """Facts about the coders at `place`, fit for JSON.

    `formats` (those that recognise it), `origin` (where it was fetched from), `files` (bytes of each), `settings` (raw
    content of its small JSON and YAML files), `tensors` (shape, dtype and count of NaN and infinities of each, by
    file), `loadable`, and where it is: `coders`, for each by name its `coder` (the config), `parameters` and `health`
    (norms, zero rows, thresholds); where it is not: `refused`, the reason in the words of `load`.
    """
    there = resolve(place)
    facts: dict[str, Any] = {
        "place": there.shown,
        "origin": there.origin,
        "formats": [f.name for f in recognised(there)],
        "files": {f.name: f.stat().st_size for f in sorted(there.folder.iterdir()) if f.is_file()},
        "settings": _settings(there),
        "tensors": _tensors(there),
    }
    try:
        chosen = choose_format(there, format)
        coders = {name: _described(read_draft(chosen, there, name).coder()) for name in chosen.coders(there)}
    except UnmixError as error:
        return {**facts, "loadable": False, "refused": str(error)}
    named = {name or described["coder"]["name"]: described for name, described in coders.items()}
    return {**facts, "loadable": True, "joint": chosen.joint(there), "coders": named}


def health(coder: SparseCoder) -> dict[str, Any]:
    """Numbers that show a coder loaded wrongly or trained badly."""
    decoder, encoder = (w.detach().float().norm(dim=-1) for w in (coder.W_dec, coder.W_enc))
    alignment = None
    if coder.config.d_in == coder.config.width_out:
        # Near 0 for every latent: the decoder or the encoder was read transposed or from another coder.
        cosines = torch.nn.functional.cosine_similarity(coder.W_enc.detach(), coder.W_dec.detach(), dim=-1)
        alignment = float(cosines.median())
    return {
        "decoder_norms": _spread(decoder),
        "encoder_norms": _spread(encoder),
        "zero_decoder_rows": int((decoder == 0).sum()),
        "zero_encoder_rows": int((encoder == 0).sum()),
        "median_encoder_decoder_cosine": alignment,
        "decoder_bias_norm": float(coder.b_dec.detach().norm()),
        **{name: _spread(value.detach().reshape(-1)) for name, value in coder.extra().items()},
        **{name: _spread(value.float().reshape(-1)) for name, value in coder.statistics.items() if value.numel()},
    }


def _described(coder: SparseCoder) -> dict[str, Any]:
    return {
        "coder": coder.config.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in coder.parameters()),
        "health": health(coder),
    }


def _spread(values: Tensor) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def _settings(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(place.folder.iterdir()):
        if not path.name.endswith(_SETTINGS) or not path.is_file() or path.stat().st_size > _SETTINGS_BYTES:
            continue
        try:
            found[path.name] = place.yaml(path.name) if path.suffix != ".json" else place.json(path.name)
        except UnmixError as error:
            found[path.name] = str(error).removeprefix(f"{place.shown}: ")
    return found


def _tensors(place: Place) -> dict[str, Any]:
    """Of every file of tensors: what is in it, or why it cannot be opened."""
    found: dict[str, Any] = {}
    for name in sorted({name for pattern in TENSORS for name in place.glob(pattern)}):
        try:
            store = place.store(name)
            found[name] = {key: _counted(store, key) for key in store.headers()}
        except UnmixError as error:
            found[name] = str(error).removeprefix(f"{place.shown}: ")
    return found


def _counted(store: Store, key: str) -> dict[str, Any]:
    header = store.headers()[key]
    facts: dict[str, Any] = {"shape": list(header.shape), "dtype": str(header.dtype).removeprefix("torch.")}
    if header.dtype.is_floating_point:
        flat = store.tensor(key).reshape(-1)
        parts = [flat[start : start + _CHUNK] for start in range(0, len(flat), _CHUNK)]
        facts["nan"] = sum(int(part.float().isnan().sum()) for part in parts)
        facts["inf"] = sum(int(part.float().isinf().sum()) for part in parts)
    return facts
