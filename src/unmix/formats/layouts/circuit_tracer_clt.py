"""circuit-tracer's cross-layer transcoders: `config.yaml`, `W_enc_{i}` and `W_dec_{i}.safetensors`, read and written.

`W_enc_{i}` holds `W_enc_i [latents, d]`, `b_enc_i`, `b_dec_i` and, of a jumprelu, `threshold_i`; `W_dec_{i}` holds
`W_dec_i [latents, layers − i, d]`. Layer i's latents read block i and write it and those after it; the output of
layer j is Σ_{i≤j} f_i W_dec_i[:, j−i] + b_dec_j. Each layer is a coder and their writes add up: `load_all` gives a
`CoderSet`. Layer i's coder carries b_dec_i. The config is kept under `training["circuit_tracer_clt"]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config, refuse
from unmix.formats.keymap import Stored, read_state
from unmix.formats.layouts.circuit_tracer import CONFIG, IGNORED, affine, block_hook, provenance, write_config
from unmix.formats.layouts.gemma_scope_2_layers import padded
from unmix.formats.lazy import Lazy, apply
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

KIND = "cross_layer_transcoder"
_FILE = re.compile(r"^W_enc_(\d+)\.safetensors$")
_WRITES = re.compile(r"^blocks\.(\d+)\.")


class CircuitTracerCltFormat(Format):
    """`config.yaml` + `W_enc_{i}.safetensors` + `W_dec_{i}.safetensors`."""

    name = "circuit_tracer_clt"
    looks_for = f"{CONFIG} + W_enc_0.safetensors, W_dec_0.safetensors, …"
    writable = True
    many = True

    def recognise(self, place: Place) -> bool:
        """By the names of the files, and of the tensors in the first."""
        if place.file not in (None, CONFIG) or not _files(place):
            return False
        return place.keys("W_enc_0.safetensors") >= {"W_enc_0", "b_enc_0", "b_dec_0"}

    def coders(self, place: Place) -> tuple[str, ...]:
        """`layer_0`, …"""
        return tuple(f"layer_{i}" for i in range(len(_files(place))))

    def joint(self, place: Place) -> bool:
        """Always."""
        return True

    def read(self, place: Place, name: str = "") -> Draft:
        """One layer's coder. `FormatError` where a layer is missing, or the config, which names the hooks."""
        files = _files(place)
        if files != list(range(len(files))):
            raise FormatError(
                f"{place.shown}: W_enc files of the layers {', '.join(map(str, files))}, expected 0, 1, …"
            )
        settings = Settings(place, CONFIG, place.yaml(CONFIG))
        settings.choice("model_kind", KIND, default=KIND)
        i = int(name.removeprefix("layer_") or 0)
        first = read_state(place, f"W_enc_{i}.safetensors", _encoder(i))
        sizes = {**first.sizes, "layers": len(files) - i}
        source = f"W_enc_{i}.safetensors and the number of files"
        second = read_state(place, f"W_dec_{i}.safetensors", _decoder(i), sizes, source=source)
        state = {**first.state, **second.state}
        state["b_dec"] = apply(lambda b: padded(b, sizes["layers"]), state["b_dec"])
        tree = {
            "reads": (block_hook(settings, "feature_input_hook", i),),
            "writes": tuple(block_hook(settings, "feature_output_hook", j) for j in range(i, len(files))),
            "d_in": sizes["d_in"],
            "d_out": sizes["d_out"] * sizes["layers"],
            "n_latents": sizes["n_latents"],
            "activation": {"kind": "jumprelu" if "threshold" in state else "relu"},
            "pre_bias": "none",
            **provenance(settings, self.name),
        }
        settings.ignore(*IGNORED)
        settings.warn_unread()
        return Draft(make_config(tree, f"{place.shown}: W_enc_{i}.safetensors"), state)

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """Every layer of a set; `FormatError` where they are not a cross-layer transcoder, or cannot be said so."""
        from unmix.formats.stores import write_safetensors

        ready = _in_order([affine(draft, self.name, ("relu", "jumprelu")) for draft in drafts.values()], self.name)
        write_config(folder, KIND, dict(enumerate(ready)), self.name)
        jumps = any("threshold" in draft.state for draft in ready)
        for i, draft in enumerate(ready):
            stored = {f"W_enc_{i}": draft.state["W_enc"], f"b_enc_{i}": draft.state["b_enc"]}
            stored[f"b_dec_{i}"] = _written_bias(ready, i)
            if jumps:
                still = Lazy.of(torch.zeros(draft.config.n_latents))
                stored[f"threshold_{i}"] = draft.state.get("threshold", still)
            write_safetensors(folder / f"W_enc_{i}.safetensors", stored)
            parts = len(ready) - i
            W_dec = apply(lambda W, parts=parts: W.unflatten(1, (parts, -1)), draft.state["W_dec"])
            write_safetensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": W_dec})


def _files(place: Place) -> list[int]:
    """The layers that have an encoder."""
    names = (f.name for f in place.folder.glob("W_enc_*.safetensors"))
    return sorted(int(match[1]) for name in names if (match := _FILE.match(name)))


def _encoder(i: int) -> tuple[Stored, ...]:
    return (
        Stored(f"W_enc_{i}", "W_enc", ("n_latents", "d_in")),
        Stored(f"b_enc_{i}", "b_enc", ("n_latents",)),
        Stored(f"b_dec_{i}", "b_dec", ("d_out",)),
        Stored(f"threshold_{i}", "threshold", ("n_latents",), optional=True),
    )


def _decoder(i: int) -> tuple[Stored, ...]:
    return (Stored(f"W_dec_{i}", "W_dec", ("n_latents", "layers", "d_out"), "join_hooks"),)


def _in_order(drafts: list[Draft], format: str) -> list[Draft]:
    """The drafts by layer; `FormatError` unless draft i reads block i and writes it and every later one."""
    drafts = sorted(drafts, key=lambda draft: -len(draft.config.writes))
    for i, draft in enumerate(drafts):
        config = draft.config
        written = [match[1] if (match := _WRITES.match(hook)) else None for hook in config.writes]
        read = _WRITES.match(config.reads[0])
        expected = [str(j) for j in range(i, len(drafts))]
        if len(config.reads) != 1 or read is None or read[1] != str(i) or written != expected or config.skip:
            raise refuse(
                draft, format,
                f"{', '.join(config.reads)} → {', '.join(config.writes)}"
                f"{' with a skip matrix' if config.skip else ''}: of {len(drafts)} layers, layer {i} reads block {i} "
                "and writes it and all that follow",
            )  # fmt: skip
        if len(set(config.parts())) != 1:
            raise refuse(draft, format, f"writes of different widths {list(config.parts())}")
    return drafts


def _written_bias(drafts: list[Draft], layer: int) -> Lazy:
    """Layer `layer`'s bias: what every coder adds there."""
    width = drafts[0].config.parts()[0]

    def add(*biases: torch.Tensor) -> torch.Tensor:
        parts = [b[(layer - i) * width : (layer - i + 1) * width] for i, b in enumerate(biases)]
        return torch.stack(parts).sum(0)

    return apply(add, *(draft.state["b_dec"] for draft in drafts[: layer + 1]))
