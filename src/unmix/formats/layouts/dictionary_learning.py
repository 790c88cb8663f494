"""dictionary_learning: `trainer_i/{ae.pt, config.json}`, its six kinds of dictionary, read and written.

Which kind a file is, its tensors say; top-k and batch top-k look the same and need `trainer.dict_class`.
AutoEncoder's decoder is brought to unit norm, as the peer does when it loads one: codes are z·‖w_dec‖. Top-k uses the k
largest, batch top-k and matryoshka the threshold, as the peer does by default; a threshold below 0 was never
calibrated. The science-of-finetuning fork adds activation statistics to batch top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config, one_draft, stored_number
from unmix.formats.folds import unit_decoder
from unmix.formats.hook_names import from_submodule_name
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.activation_statistics import KEYS as STATISTICS
from unmix.formats.layouts.activation_statistics import standardise, statistics_keymap
from unmix.formats.place import Place
from unmix.formats.registry import FileFormat
from unmix.formats.settings import Settings

CONFIG = "config.json"
WEIGHTS = "ae.pt"
COMPILED = "_orig_mod."

_LINEAR = (
    Stored("encoder.weight", "W_enc", ("n_latents", "d_in")),
    Stored("decoder.weight", "W_dec", ("d_in", "n_latents"), "transpose"),
)
_BIAS = Stored("encoder.bias", "b_enc", ("n_latents",))
_MATRICES = (
    Stored("W_enc", "W_enc", ("d_in", "n_latents"), "transpose"),
    Stored("b_enc", "b_enc", ("n_latents",)),
    Stored("W_dec", "W_dec", ("n_latents", "d_in")),
    Stored("b_dec", "b_dec", ("d_in",)),
)
_K = Stored("k", "k", (), kind="ignored")
_THRESHOLD = Stored("threshold", "threshold", ())


@dataclass(frozen=True)
class Kind:
    """What one class of dictionary is here."""

    activation: str
    keymap: tuple[Stored, ...]
    pre_bias: str = "tied"

    @property
    def keys(self) -> frozenset[str]:
        """Names of its tensors."""
        return frozenset(entry.key for entry in self.keymap)


_TOPK = (*_LINEAR, _BIAS, Stored("b_dec", "b_dec", ("d_in",)), _K)
KINDS: Mapping[str, Kind] = {
    "AutoEncoder": Kind("relu", (*_LINEAR, _BIAS, Stored("bias", "b_dec", ("d_in",)))),
    "AutoEncoderNew": Kind("relu", (*_LINEAR, _BIAS, Stored("decoder.bias", "b_dec", ("d_in",))), "none"),
    "GatedAutoEncoder": Kind(
        "gated",
        (
            *_LINEAR,
            Stored("decoder_bias", "b_dec", ("d_in",)),
            Stored("gate_bias", "b_enc", ("n_latents",)),
            Stored("r_mag", "r_mag", ("n_latents",)),
            Stored("mag_bias", "b_mag", ("n_latents",)),
        ),
    ),
    "JumpReluAutoEncoder": Kind("jumprelu", (*_MATRICES, Stored("threshold", "threshold", ("n_latents",))), "none"),
    "AutoEncoderTopK": Kind("topk", (*_TOPK, Stored("threshold", "threshold", (), kind="ignored"))),
    "BatchTopKSAE": Kind("batchtopk", (*_TOPK, _THRESHOLD)),
    "MatryoshkaBatchTopKSAE": Kind(
        "batchtopk", (*_MATRICES, _K, _THRESHOLD, Stored("group_sizes", "group_sizes", ("groups",), kind="ignored"))
    ),
}


_COMMON = {"AutoEncoderNew", "JumpReluAutoEncoder"}
OTHER_CONFIGS = ("cfg.json", "config.json", "hyperparams.json", "config.yaml", "final_config.yaml")
"""Configs that say whose file it is where its tensors do not."""


class DictionaryLearningFormat(FileFormat):
    """`ae.pt`, with or without the trainer's `config.json`."""

    name = "dictionary_learning"
    looks_for = f"{WEIGHTS} (or another .pt) with the tensors of {', '.join(KINDS)}"
    writable = True

    def files(self, place: Place) -> list[str]:
        """By the tensors; four of the kinds have names that other projects use too, so not beside their configs."""
        return _files(place)

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module."""
        file = self.file_of(place, name)
        tree = _config(place)
        trainer = Settings(place, CONFIG, tree).object("trainer")
        cls = _class_of(place, file, trainer)
        kind = KINDS[cls]
        prefix = _prefix(place, file)
        store = place.store(file)
        with_statistics = prefix + STATISTICS[0] in store.headers()
        keymap = (*kind.keymap, *statistics_keymap(("d_in",), ())) if with_statistics else kind.keymap
        found = read_state(place, file, keymap, prefix=prefix)
        activation: dict[str, Any] = {"kind": kind.activation}
        if kind.activation in ("topk", "batchtopk"):
            held = f"{prefix}k" in store.headers()
            activation["k"] = stored_number(place, file, f"{prefix}k") if held else trainer.size("k")
        if kind.activation == "topk":
            activation["relu"] = "before"
        config = make_config(
            {
                **_hooks(trainer),
                "d_in": found.sizes["d_in"],
                "n_latents": found.sizes["n_latents"],
                "activation": activation,
                "pre_bias": kind.pre_bias,
                "training": {"dictionary_learning": tree | {"tensors": _facts(place, file, prefix)}},
            },
            f"{place.shown}: {file}",
        )
        draft = Draft(config, found.state)
        if with_statistics:
            draft = standardise(draft, found, trainer.flag("keep_relative_variance", default=True))
        return unit_decoder(draft) if cls == "AutoEncoder" else draft

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """See `write_dictionary_learning`."""
        from unmix.formats.layouts.dictionary_learning_write import write_dictionary_learning

        write_dictionary_learning(one_draft(drafts), folder)


def _config(place: Place) -> dict[str, Any]:
    """The trainer's config: beside the file, or above the folder `checkpoints`; empty where there is none."""
    if (place.folder / CONFIG).is_file():
        return place.json(CONFIG)
    above = place.folder.parent
    if place.folder.name == "checkpoints" and (above / CONFIG).is_file():
        return Place(above, f"{place.shown}/..").json(CONFIG)
    return {}


def _prefix(place: Place, file: str) -> str:
    """What stands before the names where the module was saved compiled."""
    keys = place.keys(file)
    return COMPILED if keys and all(key.startswith(COMPILED) for key in keys) else ""


def _kinds_of(place: Place, file: str) -> list[str]:
    """The classes whose tensors a file holds; `k` and `threshold` came later, so top-k files may lack them."""
    prefix = _prefix(place, file)
    headers = {key.removeprefix(prefix): header for key, header in place.headers(file).items()}
    keys = frozenset(headers.keys() - set(STATISTICS))
    flat = all(len(headers[key].shape) == 2 for key in ("encoder.weight", "W_enc") if key in headers)
    if not flat:
        return []
    if len(keys) < len(headers):
        return ["BatchTopKSAE"] if keys == KINDS["BatchTopKSAE"].keys else []
    topk = KINDS["AutoEncoderTopK"].keys
    found = [cls for cls, kind in KINDS.items() if kind.keys == keys]
    return found or (["AutoEncoderTopK"] if topk - {"k", "threshold"} <= keys <= topk else [])


def _files(place: Place) -> list[str]:
    """The files of a place that hold this layout."""
    if place.file not in (None, CONFIG):
        names = [str(place.file)]
    elif (place.folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        names = sorted(f.name for f in place.folder.glob("*.pt"))
    said = "trainer" in place.peek(CONFIG)
    return [name for name in names if _kinds_of(place, name) and (said or _unclaimed(place, name))]


def _unclaimed(place: Place, file: str) -> bool:
    """Whether a file without this project's config can be its own: others have files like two of the kinds."""
    if not set(_kinds_of(place, file)) <= _COMMON:
        return True
    return file.endswith(".pt") and not any((place.folder / name).is_file() for name in OTHER_CONFIGS)


def _class_of(place: Place, file: str, trainer: Settings) -> str:
    """The class of a file. `FormatError` where its tensors and the config disagree, or leave it open."""
    kinds = _kinds_of(place, file)
    said = trainer.raw("dict_class")
    if said in kinds:
        return str(said)
    if said is not None:
        raise trainer.error(
            f"trainer.dict_class is {said!r}, but {file} holds the tensors of {' or '.join(kinds)}; "
            f"known classes: {', '.join(KINDS)}"
        )
    if len(kinds) > 1:
        raise FormatError(
            f"{place.shown}: {file} can be {' or '.join(kinds)}: the tensors are the same, and {CONFIG} with "
            "trainer.dict_class is missing"
        )
    return kinds[0]


def _hooks(trainer: Settings) -> dict[str, Any]:
    name = trainer.raw("submodule_name")
    model = trainer.raw("lm_name")
    fields: dict[str, Any] = {"reads": (from_submodule_name(name),)} if isinstance(name, str) and name else {}
    return fields | ({"model": {"name": model}} if isinstance(model, str) and model else {})


def _facts(place: Place, file: str, prefix: str) -> dict[str, Any]:
    """What the file holds beside the maths: top-k's threshold, matryoshka's group sizes."""
    store = place.store(file)
    small = [k for k in ("threshold", "group_sizes") if prefix + k in store.headers()]
    held = {k: store.tensor(prefix + k) for k in small if store.headers()[prefix + k].nbytes < 4096}
    return {k: tensor.tolist() for k, tensor in held.items() if bool(torch.isfinite(tensor).all())}
