"""Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): one `params.npz` a coder, without a config.

f = relu(z)·1[z > θ], z = x W_enc + b_enc; b_dec is not subtracted. Names are upper or lower case. Model, site and layer
are in the path: `google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`. Attention coders read the
concatenated heads. MLP coders read what the MLP adds to the stream, after the norm that follows it. Transcoders read
the output of the norm before the MLP without its gain, which Gemma 2's authors folded into the MLP: TransformerLens'
`ln2.hook_normalized`. Embedding coders were trained before the embedding is multiplied by √d; the hook `embeddings`
lies behind it, so their input is divided by √d and their output, bias included, multiplied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.scopes import l0_in, layer_in, path_of, published, warn_unsaid
from unmix.formats.place import Place
from unmix.formats.registry import Format

KEYMAP = (
    Stored("W_enc", "W_enc", ("d_in", "n_latents"), "transpose"),
    Stored("w_enc", "W_enc", ("d_in", "n_latents"), "transpose"),
    Stored("b_enc", "b_enc", ("n_latents",)),
    Stored("b_dec", "b_dec", ("d_out",)),
    Stored("W_dec", "W_dec", ("n_latents", "d_out")),
    Stored("w_dec", "W_dec", ("n_latents", "d_out")),
    Stored("threshold", "threshold", ("n_latents",)),
)
_NEEDED = {"w_enc", "b_enc", "w_dec", "b_dec", "threshold"}
_REPO = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)(?![a-z])")
_HOOKS = {
    "res": ("blocks.{}.resid_post",),
    "mlp": ("blocks.{}.mlp_out_post",),
    "att": ("blocks.{}.z",),
    "transcoders": ("blocks.{}.ln2.hook_normalized", "blocks.{}.mlp_out_post"),
}


@dataclass(frozen=True)
class Said:
    """What a path says of its coder; None and empty where it does not."""

    model: str | None
    site: str | None
    layer: int | None
    l0: float | None

    @classmethod
    def by(cls, text: str) -> Said:
        """Read the path `text`."""
        repo = _REPO.search(text)
        layer, l0 = layer_in(text), l0_in(text)
        if repo is None:
            return cls(None, "embedding" if "/embedding/" in text else None, layer, l0)
        size, variant, site = repo.groups()
        model = f"google/gemma-2-{size}" + ("-it" if variant == "it" else "")
        return cls(model, "embedding" if "/embedding/" in text else site, layer, l0)

    @property
    def hooks(self) -> tuple[str, ...]:
        """What it reads, and what it writes where that is another; empty where the path says too little."""
        if self.site == "embedding":
            return ("embeddings",)
        if self.site is None or self.layer is None:
            return ()
        return tuple(hook.format(self.layer) for hook in _HOOKS[self.site])


class GemmaScopeFormat(Format):
    """`params.npz` of `W_enc`, `b_enc`, `W_dec`, `b_dec`, `threshold`, in either case."""

    name = "gemma_scope"
    looks_for = "an .npz of W_enc, b_enc, W_dec, b_dec, threshold"

    def recognise(self, place: Place) -> bool:
        """By the names of the arrays in the only `.npz`."""
        return _file(place) is not None

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module. A log warning says what the path does not tell."""
        file = _file(place) or "params.npz"
        found = read_state(place, file, KEYMAP)
        said = Said.by(path_of(place))
        if not said.hooks:
            unsaid = "the site" if said.site is None else "the layer"
            wanted = "its path (…/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71)"
            warn_unsaid(place, file, f"{unsaid} that it reads", wanted)
        d_in, d_out = found.sizes["d_in"], found.sizes["d_out"]
        kept: dict[str, Any] = {"path": place.shown, "site": said.site, "layer": said.layer}
        tree: dict[str, Any] = {
            "reads": said.hooks[:1] or ("input",),
            "writes": said.hooks[-1:],
            "d_in": d_in,
            "d_out": d_out,
            "n_latents": found.sizes["n_latents"],
            "activation": {"kind": "jumprelu"},
            "pre_bias": "none",
            "model": None if said.model is None else {"name": said.model},
            "training": {"gemma_scope": kept, **published(said.l0)},
        }
        if said.site == "embedding":
            kept["space"] = "trained on embeddings before their factor √d; here its scales are for those after it"
            tree |= {"input_scale": d_in**-0.5, "output_scale": d_out**0.5}
        return Draft(make_config(tree, f"{place.shown}: {file}"), found.state)


def _file(place: Place) -> str | None:
    """The only `.npz` of the place, where it holds this layout."""
    files = place.glob("*.npz")
    if len(files) == 1 and {key.lower() for key in place.keys(files[0])} >= _NEEDED:
        return files[0]
    return None
