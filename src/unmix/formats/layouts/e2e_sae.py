"""e2e_sae (Braun et al. 2024, arXiv 2405.12241): `final_config.yaml` + `samples_{n}.pt`, read and written.

c = relu(Wx + b), x̂ = D̂c + b_d, where D̂ is the decoder with each latent's vector at unit norm, at every forward.
Nothing is subtracted from the input. One file may hold several coders, one a position, under the position's name
with "-" for "."; the flat form holds one without a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor

from unmix.core.atomic import write_text
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import (
    make_config,
    origin,
    raw_gate,
    refuse,
    refuse_unless,
    refuse_unless_sae,
)
from unmix.formats.folds import fold_input_bias, fold_scales, unit_decoder
from unmix.formats.hook_names import as_processed, from_transformer_lens, to_transformer_lens
from unmix.formats.keymap import Stored, read_state, write_state
from unmix.formats.layouts.dictionary_learning import OTHER_CONFIGS
from unmix.formats.lazy import Lazy, apply
from unmix.formats.place import Place
from unmix.formats.registry import Format

CONFIG = "final_config.yaml"
_REST = (
    Stored("decoder.weight", "W_dec", ("d_in", "n_latents"), "transpose"),
    Stored("decoder.bias", "b_dec", ("d_in",)),
)
KEYMAP = (
    Stored("encoder.0.weight", "W_enc", ("n_latents", "d_in")),
    Stored("encoder.0.bias", "b_enc", ("n_latents",)),
    *_REST,
)
FLAT = (
    Stored("encoder.weight", "W_enc", ("n_latents", "d_in")),
    Stored("encoder.bias", "b_enc", ("n_latents",)),
    *_REST,
)
_FLAT_KEYS = frozenset(entry.key for entry in FLAT)
_FIRST = ".encoder.0.weight"
_POSITION = re.compile(r"\w[\w-]*")
_SAMPLES = re.compile(r"_(\d+)\.pt$")


class E2eSaeFormat(Format):
    """`samples_{n}.pt`, with or without its yaml."""

    name = "e2e_sae"
    looks_for = f"{CONFIG} + a .pt with POSITION.encoder.0.weight, or encoder.weight and decoder.bias"
    writable = True
    many = True

    def recognise(self, place: Place) -> bool:
        """By the tensors; the flat form too where nothing beside it says that it is another's."""
        file = _file(place)
        return file is not None and (bool(_positions(place, file)) or _is_flat(place, file))

    def coders(self, place: Place) -> tuple[str, ...]:
        """One a position, by its TransformerLens name."""
        file = _file(place)
        names = _positions(place, file) if file is not None else []
        return ("",) if len(names) < 2 else tuple(name.replace("-", ".") for name in names)

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module."""
        file = _file(place)
        assert file is not None
        positions = _positions(place, file)
        settings = place.yaml(CONFIG) if (place.folder / CONFIG).is_file() else {}
        if positions:
            position = next(p for p in positions if not name or p.replace("-", ".") == name)
            _refuse_unknown(place, file, positions)
            found = read_state(place, file, KEYMAP, prefix=f"{position}.", whole=False)
            hook: str | None = position.replace("-", ".")
        else:
            found = read_state(place, file, FLAT)
            hook = _only_position(settings)
        state = dict(found.state)
        state["W_dec"] = apply(_unit_rows, state["W_dec"])
        model = settings.get("tlens_model_name")
        tree: dict[str, Any] = {
            # A model named rather than given as a file is taken with TransformerLens' default processing.
            **({"reads": (as_processed(from_transformer_lens(hook), model),)} if hook else {}),
            "d_in": found.sizes["d_in"],
            "n_latents": found.sizes["n_latents"],
            "activation": {"kind": "relu"},
            "pre_bias": "none",
            "model": {"name": model} if isinstance(model, str) else None,
            "training": {"e2e_sae": settings},
        }
        return Draft(make_config(tree, f"{place.shown}: {file}"), state)

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """All coders in one file, the decoders at unit norm, as the peer's forward makes them."""
        from unmix.formats.stores import write_torch

        said = [_expressible(draft) for draft in drafts.values()]
        names = [_position(draft) for draft in said]
        if len(set(names)) != len(names):
            raise refuse(said[0], "e2e_sae", f"two coders at one position, found {', '.join(names)}")
        tensors: dict[str, Lazy] = {}
        for name, draft in zip(names, said, strict=True):
            stored = write_state(draft.state, KEYMAP)
            tensors |= {f"{name.replace('.', '-')}.{key}": lazy for key, lazy in stored.items()}
        settings = {k: v for k, v in origin(said[0], "e2e_sae").items() if k != "saes"}
        fresh = {
            "tlens_model_name": said[0].config.model.name if said[0].config.model else None,
            "tlens_model_path": None,
        }
        saes = {"dict_size_to_input_ratio": _ratio(said), "sae_positions": names}
        text = yaml.safe_dump({**fresh, **settings, "saes": saes})
        write_text(folder / CONFIG, text)
        samples = settings.get("n_samples")
        write_torch(folder / f"samples_{samples if isinstance(samples, int) else 0}.pt", tensors)


def _file(place: Place) -> str | None:
    """The file that was named, or the one after the most samples, as the peer chooses."""
    if place.file is not None and place.file != CONFIG:
        return place.file
    files = sorted(f.name for f in place.folder.glob("*.pt"))
    return max(files, key=lambda f: int(m[1]) if (m := _SAMPLES.search(f)) else -1) if files else None


def _positions(place: Place, file: str) -> list[str]:
    names = (key.removesuffix(_FIRST) for key in place.keys(file) if key.endswith(_FIRST))
    # Names become folders where each coder is written to its own.
    return sorted(name for name in names if _POSITION.fullmatch(name))


def _is_flat(place: Place, file: str) -> bool:
    if place.keys(file) != _FLAT_KEYS or len(place.headers(file)["encoder.weight"].shape) != 2:
        return False
    if (place.folder / CONFIG).is_file():
        return "saes" in place.peek(CONFIG)
    # Other projects' files hold the same four names; theirs come with a config of their own.
    return not any((place.folder / name).is_file() for name in OTHER_CONFIGS)


def _only_position(settings: Mapping[str, Any]) -> str | None:
    saes = settings.get("saes")
    positions: Any = cast("dict[str, Any]", saes).get("sae_positions") if isinstance(saes, dict) else None
    listed = cast("list[Any]", positions) if isinstance(positions, list) else [positions]
    return str(listed[0]) if len(listed) == 1 and listed[0] else None


def _refuse_unknown(place: Place, file: str, positions: list[str]) -> None:
    known = {f"{position}.{entry.key}" for position in positions for entry in KEYMAP}
    unknown = sorted(place.keys(file) - known)
    if unknown:
        raise FormatError(
            f"{place.shown}: {file}: unknown tensor {', '.join(unknown[:8])}; expected "
            f"{', '.join(entry.key for entry in KEYMAP)} for each of {', '.join(positions)}"
        )


def _unit_rows(W: Tensor) -> Tensor:
    return torch.nn.functional.normalize(W, dim=-1)


def _expressible(draft: Draft) -> Draft:
    """The draft as this layout says it: codes become z·‖w_dec‖, outputs stay."""
    refuse_unless(draft, "e2e_sae", ("relu",))
    refuse_unless_sae(draft, "e2e_sae")
    return unit_decoder(raw_gate(fold_input_bias(fold_scales(draft))))


def _position(draft: Draft) -> str:
    name, head = to_transformer_lens(draft.config.reads[0])
    if head is not None or "-" in name:
        raise refuse(draft, "e2e_sae", f"the position {draft.config.reads[0]}: it has no heads, and '-' stands for '.'")
    return name


def _ratio(drafts: list[Draft]) -> float:
    """The peer makes `int(ratio · d_in)` latents at every position."""
    ratios = {draft.config.n_latents / draft.config.d_in for draft in drafts}
    if len(ratios) != 1:
        raise refuse(drafts[0], "e2e_sae", f"different ratios of latents to inputs, found {sorted(ratios)}")
    (ratio,) = ratios
    config = drafts[0].config
    return ratio if int(ratio * config.d_in) == config.n_latents else math.nextafter(ratio, math.inf)
