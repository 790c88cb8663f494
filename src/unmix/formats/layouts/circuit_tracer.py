"""circuit-tracer's transcoder sets: `config.yaml` + `layer_{i}.safetensors`, one transcoder a layer, read and written.

z = W_enc x + b_enc, x̂ = f W_dec + b_dec (+ W_skip x); b_dec is not subtracted. A file with thresholds is a jumprelu,
one without a relu, and `activation: topk` with `k` in the config keeps the k largest z, negative ones too. Files of
mid-2025 hold the decoder as `[d, latents]`: its shape says which. The config names the hooks of a block
(`mlp.hook_in`); the whole of it is kept under `training["circuit_tracer"]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from unmix.coder.config import TopK
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config, origin, raw_gate, refuse, refuse_unless
from unmix.formats.folds import batchtopk_as_jumprelu, fold_input_bias, fold_scales
from unmix.formats.hook_names import from_transformer_lens, to_transformer_lens
from unmix.formats.keymap import Stored, read_state, write_state
from unmix.formats.layouts.scopes import warn_unsaid
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

CONFIG = "config.yaml"
KIND = "transcoder_set"
_KEYMAP = (
    Stored("b_enc", "b_enc", ("n_latents",)),
    Stored("b_dec", "b_dec", ("d_out",)),
    Stored("W_enc", "W_enc", ("n_latents", "d_in")),
    Stored("W_dec", "W_dec", ("n_latents", "d_out")),
    Stored("W_dec", "W_dec", ("d_out", "n_latents"), "transpose"),
    Stored("W_skip", "W_skip", ("d_out", "d_in"), optional=True),
    Stored("activation_function.threshold", "threshold", ("n_latents",), optional=True),
)
_NEEDED = {"W_enc", "W_dec", "b_enc", "b_dec"}
_FILE = re.compile(r"^layer_(\d+)\.safetensors$")
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
IGNORED = ("scan", "revision", "repo_id", "subfolder", "model_kind")
_ELSEWHERE = "transcoders"


class CircuitTracerFormat(Format):
    """`config.yaml` + `layer_{i}.safetensors`."""

    name = "circuit_tracer"
    looks_for = f"layer_0.safetensors, … with W_enc, b_enc, W_dec, b_dec (+ {CONFIG})"
    writable = True
    many = True

    def recognise(self, place: Place) -> bool:
        """By the names of the files and of their tensors; or by a config that lists files elsewhere."""
        files = _files(place)
        if files:
            return place.keys(next(iter(files.values()))) >= _NEEDED
        config = place.peek(CONFIG) if place.file in (None, CONFIG) else {}
        return _ELSEWHERE in config and config.get("model_kind") in (KIND, "cross_layer_transcoder")

    def coders(self, place: Place) -> tuple[str, ...]:
        """`layer_0`, …; a file that was named has no other name."""
        files = _files(place)
        return ("",) if not files or place.file in files.values() else tuple(f"layer_{i}" for i in files)

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module. `FormatError` where the config is of another kind, or the files lie elsewhere."""
        settings = _settings(place)
        files = _files(place)
        if not files:
            listed = ", ".join(str(entry) for entry in settings.raw(_ELSEWHERE) or ())
            raise settings.error(f"the transcoders of this set lie elsewhere; load them one by one: {listed}")
        layer = int(name.removeprefix("layer_")) if name else next(iter(files))
        sizes = _sizes(place, files[layer])
        found = read_state(place, files[layer], _KEYMAP, sizes, source="its biases")
        if settings.tree:
            hooks = {key: block_hook(settings, f"feature_{key}_hook", layer) for key in ("input", "output")}
        else:
            warn_unsaid(place, files[layer], "the hooks of this transcoder", f"a {CONFIG} beside it")
            hooks = {"input": "input", "output": "output"}
        tree = {
            "reads": (hooks["input"],),
            "writes": (hooks["output"],),
            "d_in": found.sizes["d_in"],
            "d_out": found.sizes["d_out"],
            "n_latents": found.sizes["n_latents"],
            "activation": _activation(settings, "threshold" in found.state),
            "pre_bias": "none",
            "skip": "W_skip" in found.state,
            **provenance(settings, self.name),
        }
        settings.ignore(_ELSEWHERE, *IGNORED)
        settings.warn_unread()
        return Draft(make_config(tree, f"{place.shown}: {files[layer]}"), found.state)

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """A set of every layer from 0 on; `FormatError` for one that lacks some, or for what the layout cannot say."""
        from unmix.formats.stores import write_safetensors

        ready = {_layer(draft, self.name): _expressible(draft) for draft in drafts.values()}
        layers = sorted(ready)
        first = ready[layers[0]]
        if layers != list(range(len(drafts))):
            raise refuse(first, self.name, f"the layers {', '.join(map(str, layers))}: a set has every layer from 0 on")
        if len({draft.config.n_latents for draft in ready.values()}) > 1:
            raise refuse(first, self.name, "transcoders of different widths in one set")
        rules = {draft.config.activation.model_dump_json() for draft in ready.values() if _is_topk(draft)}
        if rules and (len(rules) > 1 or not all(map(_is_topk, ready.values()))):
            raise refuse(first, self.name, "a top-k of its own for each layer")
        chosen = {"activation": "topk", "k": getattr(first.config.activation, "k", None)} if rules else {}
        write_config(folder, KIND, ready, self.name, chosen)
        keymap = [entry for entry in _KEYMAP if entry.transform == "same"]
        for layer, draft in sorted(ready.items()):
            write_safetensors(folder / f"layer_{layer}.safetensors", write_state(draft.state, keymap))


def block_hook(settings: Settings, key: str, layer: int) -> str:
    """The canonical hook of a block's hook that the config names."""
    return from_transformer_lens(f"blocks.{layer}.{settings.text(key)}")


def provenance(settings: Settings, format: str) -> dict[str, Any]:
    """Model, and the config itself."""
    model = settings.text("model_name", default="")
    return {"model": {"name": model} if model else None, "training": {format: settings.tree}}


def write_config(
    folder: Path, kind: str, drafts: Mapping[int, Draft], format: str, more: Mapping[str, Any] | None = None
) -> None:
    """`config.yaml`: hooks as TransformerLens names them in a block, the same in every layer, or `FormatError`."""
    first = drafts[0]
    kept = {k: v for k, v in origin(first, format).items() if k not in (_ELSEWHERE, "activation", "k")}
    tree = {**kept, "model_name": first.config.model.name if first.config.model else "unknown", "model_kind": kind}
    for key, side in (("feature_input_hook", "reads"), ("feature_output_hook", "writes")):
        names = {_in_block(str(getattr(draft.config, side)[0])) for draft in drafts.values()}
        if len(names) > 1:
            raise refuse(first, format, f"layers with different hooks: {', '.join(sorted(names))}")
        tree[key] = names.pop()
    (folder / CONFIG).write_text(yaml.safe_dump({**tree, **(more or {})}, sort_keys=False), encoding="utf-8")


def affine(draft: Draft, format: str, activations: tuple[str, ...]) -> Draft:
    """The draft as z = W x + b, a raw gate and nothing around it; `FormatError` where it cannot be said so."""
    draft = batchtopk_as_jumprelu(draft)
    refuse_unless(draft, format, activations, signed=True)
    if draft.config.normalise.kind == "standardise" and draft.config.normalise.restore:
        raise refuse(draft, format, "an output that is put back on the scale of its input")
    return raw_gate(fold_input_bias(fold_scales(draft)))


def _files(place: Place) -> dict[int, str]:
    """The files by layer; of a named file, it alone."""
    names = place.glob("layer_*.safetensors")
    if place.file == CONFIG:
        names = sorted(f.name for f in place.folder.glob("layer_*.safetensors"))
    found = {int(match[1]): name for name in names if (match := _FILE.match(name))}
    return dict(sorted(found.items()))


def _sizes(place: Place, file: str) -> dict[str, int]:
    """Sizes that the biases say: the decoder, which may lie either way, is told by them."""
    headers = place.headers(file)
    named = {"n_latents": "b_enc", "d_out": "b_dec"}
    shapes = {size: headers[key].shape for size, key in named.items() if key in headers}
    return {size: shape[0] for size, shape in shapes.items() if len(shape) == 1}


def _settings(place: Place) -> Settings:
    there = (place.folder / CONFIG).is_file()
    settings = Settings(place, CONFIG, place.yaml(CONFIG) if there else {})
    settings.choice("model_kind", KIND, default=KIND)
    return settings


def _activation(settings: Settings, thresholds: bool) -> dict[str, Any]:
    there = "jumprelu" if thresholds else "relu"
    kind = settings.choice("activation", "relu", "jumprelu", "topk", default=there)
    if kind == "topk" and not thresholds:
        return {"kind": "topk", "k": settings.size("k"), "relu": "none"}
    if kind != there:
        raise settings.error(f"activation is {kind!r}, but the files hold {'' if thresholds else 'no '}thresholds")
    return {"kind": kind}


def _is_topk(draft: Draft) -> bool:
    return isinstance(draft.config.activation, TopK)


def _expressible(draft: Draft) -> Draft:
    config = draft.config
    if len(config.reads) != 1 or len(config.writes) != 1:
        raise refuse(draft, "circuit_tracer", f"{len(config.reads)} reads and {len(config.writes)} writes")
    if isinstance(config.activation, TopK) and (config.activation.relu != "none" or config.activation.magnitude):
        raise refuse(draft, "circuit_tracer", "a top-k other than of the largest values, negative ones kept")
    return affine(draft, "circuit_tracer", ("relu", "jumprelu", "topk"))


def _layer(draft: Draft, format: str) -> int:
    match = _BLOCK.match(draft.config.reads[0])
    if match is None:
        raise FormatError(
            f"{draft.config.name}: the {format} format needs a hook of a block, found {draft.config.reads[0]}"
        )
    return int(match[1])


def _in_block(hook: str) -> str:
    name, _ = to_transformer_lens(hook)
    match = _BLOCK.match(name)
    return name if match is None else match[2]
