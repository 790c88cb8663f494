"""Places that are nearly one of the layouts: recognisers never raise, and readers raise errors of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unmix.core.errors import UnmixError
from unmix.formats.layouts.dictionary_learning import KINDS
from unmix.formats.layouts.openai import KEYMAP as OPENAI
from unmix.formats.place import Place
from unmix.formats.registry import format_of

FORMATS = ("openai", "sparsify", "opensae", "e2e_sae", "dictionary_learning", "dictionary_learning_crosscoder")
NAMES = ("ae.pt", "samples_3.pt", "sae.safetensors", "model.safetensors", "model_final.pt", "iter_0000002.pt")
CONFIGS = ("cfg.json", "config.json", "final_config.yaml", "unmix.json")


def fill(folder: Path, tensor: torch.Tensor, keys: set[str]) -> None:
    tensors: dict[str, Any] = {key: tensor.clone() for key in keys}
    for name in NAMES:
        if name.endswith(".pt"):
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name)


def garbage(folder: Path) -> None:
    for name in (*NAMES, *CONFIGS):
        (folder / name).write_bytes(b"\x80\x02garbage" * 9)


def lists(folder: Path) -> None:
    for name in CONFIGS:
        (folder / name).write_text("[1, 2]")
    fill(folder, torch.ones(3, 2), {"encoder.weight", "encoder.bias", "W_dec", "b_dec"})


def wrong_types(folder: Path) -> None:
    text = '{"trainer": 3, "saes": [], "d_in": "x", "k": [], "feature_size": {}, "hidden_size": null, "reads": 5}'
    for name in CONFIGS:
        (folder / name).write_text(text)
    fill(folder, torch.ones(3, 2), {"encoder.weight", "encoder.bias", "W_dec", "b_dec"})


def shapes(keys: set[str], *shape: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        fill(folder, torch.ones(shape), keys)

    return make


PLACES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "garbage": garbage,
    "lists": lists,
    "wrong_types": wrong_types,
    "folders": lambda folder: [(folder / name).mkdir() for name in (*NAMES, *CONFIGS)],  # type: ignore[return-value]
    "openai_scalars": shapes({entry.key for entry in OPENAI}),
    "openai_vectors": shapes({entry.key for entry in OPENAI}, 4),
    "sparsify_vectors": shapes({"encoder.weight", "encoder.bias", "W_dec", "b_dec"}, 4),
    "flat_scalars": shapes({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}),
    "cubes": shapes({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}, 2, 2, 2),
    "positions": shapes({"a.encoder.0.weight", "b.encoder.0.weight"}, 2),
    **{name: shapes(set(kind.keys), 2, 2) for name, kind in KINDS.items()},
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_nothing_but_our_own_errors(tmp_path, make):
    make(tmp_path)
    places = [Place(tmp_path), *(Place(f) for f in sorted(tmp_path.iterdir()) if f.is_file())]
    for name in FORMATS:
        format = format_of(name)
        for place in places:
            if not format.recognise(place):
                continue
            for coder in format.coders(place):
                try:
                    format.read(place, coder).coder()
                except UnmixError as error:
                    assert len(str(error)) < 1500
