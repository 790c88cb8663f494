"""OpenAI's sparse_autoencoder (Gao et al. 2024, arXiv 2406.04093): one pickled state dict `.pt`, read and written.

TopK files: x' = (x − mean)/(std + 1e-5) with the unbiased std, z = W(x' − pre_bias) + latent_bias, the k largest, then
ReLU (or nothing, `postact_fn: Identity`), and the output times std plus mean. ReLU files (v1, v4) have no layer norm;
the first of them do not name an activation. The hook is in the path: `{location}/autoencoders/{layer}.pt`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmix.coder.config import TopK
from unmix.core.errors import FormatError, did_you_mean
from unmix.formats.draft import Draft
from unmix.formats.equivalents import (
    make_config,
    one_draft,
    origin,
    raw_gate,
    read_hooks,
    refuse,
    refuse_unless,
    refuse_unless_sae,
    tie_input_bias,
    write_hooks,
)
from unmix.formats.folds import fold_scales
from unmix.formats.hook_names import from_openai_location, to_openai_location
from unmix.formats.keymap import Stored, read_state, write_state
from unmix.formats.lazy import Lazy
from unmix.formats.place import Place
from unmix.formats.registry import FileFormat
from unmix.formats.settings import Settings

EPS = 1e-5
ACTIVATIONS = ("ReLU", "TopK", "Identity")
KEYMAP = (
    Stored("pre_bias", "b_dec", ("d_in",)),
    Stored("encoder.weight", "W_enc", ("n_latents", "d_in")),
    Stored("latent_bias", "b_enc", ("n_latents",)),
    Stored("decoder.weight", "W_dec", ("d_in", "n_latents"), "transpose"),
    Stored("stats_last_nonzero", "stats_last_nonzero", ("n_latents",), kind="statistic"),
    Stored("latents_activation_frequency", "latents_activation_frequency", ("n_latents",), kind="statistic"),
    Stored("latents_mean_square", "latents_mean_square", ("n_latents",), kind="statistic"),
)
_NEEDED = {entry.key for entry in KEYMAP if entry.kind == "weight"}
_PATTERNS = ("*.pt", "autoencoders/*.pt", "*/autoencoders/*.pt")
_PATH = re.compile(r"([^/]+)/autoencoders/(\d+)\.\w+$")


class OpenAIFormat(FileFormat):
    """`.pt` of `pre_bias`, `encoder.weight`, `latent_bias`, `decoder.weight`."""

    name = "openai"
    looks_for = "a .pt with pre_bias, latent_bias, encoder.weight, decoder.weight"
    writable = True

    def files(self, place: Place) -> list[str]:
        """By the names of the tensors; of a folder, also where the files lie in `LOCATION/autoencoders`."""
        return _files(place)

    def called(self, file: str) -> str:
        """By its path."""
        return file.removesuffix(".pt")

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module."""
        file = self.file_of(place, name)
        found = read_state(place, file, KEYMAP)
        values = Settings(place, file, dict(place.store(file).values))
        activation, kept = _activation(values)
        values.warn_unread()
        layered = activation["kind"] == "topk"
        hooks, kept["location"] = _hooks(place, file)
        tree = {
            **hooks,
            "d_in": found.sizes["d_in"],
            "n_latents": found.sizes["n_latents"],
            "activation": activation,
            "normalise": {"kind": "layer_norm", "eps": EPS, "ddof": 1} if layered else {"kind": "none"},
            "pre_bias": "tied",
            "training": {"openai": kept},
        }
        return Draft(make_config(tree, f"{place.shown}: {file}"), found.state, found.statistics)

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """`LOCATION/autoencoders/LAYER.pt` where the hook has a location, else `autoencoder.pt`."""
        from unmix.formats.stores import write_torch

        draft = _expressible(one_draft(drafts))
        place = to_openai_location(draft.config.reads[0])
        said = origin(draft, "openai").get("location")
        if place is None:
            path = folder / "autoencoder.pt"
        else:
            location, layer = place
            same = isinstance(said, str) and from_openai_location(said, layer) == draft.config.reads[0]
            path = folder / (str(said) if same else location) / "autoencoders" / f"{layer}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_hooks(draft, folder)
        write_torch(path, {**write_state(draft.state, KEYMAP), **_statistics(draft), **_said(draft)})


def _files(place: Place) -> list[str]:
    """The files of a place that hold this layout."""
    if place.file is not None:
        names = [place.file]
    else:
        names = [str(f.relative_to(place.folder)) for pattern in _PATTERNS for f in sorted(place.folder.glob(pattern))]
    return [name for name in names if place.keys(name) >= _NEEDED]


def _activation(values: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The activation, and what the file says of it. `FormatError` for one that is not known: never ReLU by default."""
    name = values.raw("activation")
    k, after = values.raw("activation_state_dict.k"), values.raw("activation_state_dict.postact_fn")
    # Saved by recent versions of torch, the state holds the activation's own twice.
    values.ignore("activation_state_dict", "activation.k", "activation.postact_fn")
    kept = {"activation": name, "k": k, "postact_fn": after}
    if name is None and k is None:
        return {"kind": "relu"}, kept
    if name not in ACTIVATIONS:
        raise values.error(f"activation is {name!r}. {did_you_mean(str(name), ACTIVATIONS)}")
    if name != "TopK":
        return {"kind": "relu" if name == "ReLU" else "identity"}, kept
    values.choice("activation_state_dict.postact_fn", "ReLU", "Identity", default="ReLU")
    size = values.size("activation_state_dict.k")
    return {"kind": "topk", "k": size, "relu": "none" if after == "Identity" else "after"}, kept


def _hooks(place: Place, file: str) -> tuple[dict[str, Any], str | None]:
    written = place.hints if place.file is not None else f"{place.hints}/{file}"
    match = _PATH.search(written)
    noted = read_hooks(place)
    if match is None:
        return noted, None
    model = {"model": {"name": "gpt2"}} if "gpt2-small/" in written else {}
    return {"reads": (from_openai_location(match[1], int(match[2])),), **model, **noted}, match[1]


def _expressible(draft: Draft) -> Draft:
    """The draft as this layout says it."""
    refuse_unless(draft, "openai", ("relu", "topk", "identity"), ("none", "layer_norm", "standardise"), signed=True)
    refuse_unless_sae(draft, "openai")
    draft = tie_input_bias(raw_gate(fold_scales(draft)))
    activation, rule = draft.config.activation, draft.config.normalise
    layered = rule.kind == "layer_norm"
    if layered and (rule.ddof, rule.eps, rule.eps_back, rule.restore) != (1, EPS, False, True):
        raise refuse(
            draft, "openai", f"a layer norm other than eps={EPS:g}, ddof=1, undone without eps; found {rule!r}"
        )
    if layered != isinstance(activation, TopK):
        with_it = "with" if layered else "without"
        raise refuse(draft, "openai", f"{activation.kind} {with_it} layer norm: its topk has it, its relu has not")
    if isinstance(activation, TopK) and activation.magnitude:
        raise refuse(draft, "openai", "selection by magnitude")
    return draft


def _statistics(draft: Draft) -> dict[str, Lazy]:
    """The file's own statistics where the coder has them; the state dict of the peer needs all three."""
    import torch

    n = draft.config.n_latents
    fresh = {
        "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(n),
        "latents_mean_square": torch.zeros(n),
    }
    return {name: draft.statistics.get(name, Lazy.of(value)) for name, value in fresh.items()}


def _said(draft: Draft) -> dict[str, Any]:
    activation = draft.config.activation
    if isinstance(activation, TopK):
        after = "Identity" if activation.relu == "none" else "ReLU"
        return {"activation": "TopK", "activation_state_dict": {"k": activation.k, "postact_fn": after}}
    names = {"relu": "ReLU", "identity": "Identity"}
    if activation.kind not in names:
        raise FormatError(f"{draft.config.name}: activation {activation.kind!r}")
    return {"activation": names[activation.kind], "activation_state_dict": {}}
