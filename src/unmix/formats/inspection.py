"""What a place holds, told even where `load` refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import UnmixError
from unmix.formats.loading import detect_format, recognised, resolve
from unmix.formats.place import Place


def inspect(place: str | Path) -> dict[str, Any]:
    """Facts about the coder at `place`, fit for JSON.

    `formats` (those that recognise it), `files` (bytes of each), `settings` (raw content of its small JSON
    files), `tensors` (shape and dtype of each, by file), `loadable`, and where it is: `coder` (the config),
    `health` (norms, zero rows, thresholds); where it is not: `refused`, the reason in the words of `load`.
    """
    there = resolve(place)
    formats = recognised(there)
    facts: dict[str, Any] = {
        "place": there.shown,
        "formats": [f.name for f in formats],
        "files": {f.name: f.stat().st_size for f in sorted(there.folder.iterdir()) if f.is_file()},
        "settings": _settings(there),
        "tensors": _tensors(there),
    }
    try:
        coder = detect_format(there).load(there)
    except UnmixError as error:
        return {**facts, "loadable": False, "refused": str(error)}
    return {
        **facts,
        "loadable": True,
        "coder": coder.config.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in coder.parameters()),
        "health": health(coder),
    }


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
        "median_encoder_decoder_cosine": alignment,
        "decoder_bias_norm": float(coder.b_dec.detach().norm()),
        **{name: _spread(value.detach().reshape(-1)) for name, value in coder.extra().items()},
    }


def _spread(values: torch.Tensor) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def _settings(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(place.folder.glob("*.json")):
        if path.stat().st_size > 1_000_000:
            continue
        try:
            found[path.name] = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            found[path.name] = f"not JSON: {error}"
    return found


def _tensors(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(place.folder.glob("*.safetensors")):
        try:
            headers = place.headers(path.name)
        except UnmixError as error:
            found[path.name] = str(error)
        else:
            found[path.name] = {k: {"shape": list(h.shape), "dtype": h.dtype} for k, h in headers.items()}
    return found
