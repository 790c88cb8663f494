"""Hook names as published configs and paths write them, and the canonical ones.

Four dialects: TransformerLens (`blocks.6.hook_resid_post`), module paths of a Hugging Face model (`layers.10`,
`model.layers.3.mlp.output`: raw inputs and outputs of modules), dictionary_learning's `resid_post_layer_3`, and the
locations in OpenAI's paths (`resid_post_mlp`). A name outside the tables is kept as it is: the language model's own
room resolves or refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_POINTS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out_post": "hook_attn_out",
    "mlp_out_post": "hook_mlp_out",
    "attn_in": "attn.hook_in",
    "attn_out": "attn.hook_out",
    "z": "attn.hook_z",
    "mlp_in": "mlp.hook_in",
    "mlp_act": "mlp.hook_post",
    "mlp_out": "mlp.hook_out",
}
_BACK = {theirs: ours for ours, theirs in _POINTS.items()}
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")

_LAYER = re.compile(r"^(?:[a-z_]+\.)*(?:layers\.|layer\.|h\.|blocks\.|layer_)(\d+)(?:\.(.+))?$")
"""A block of a Hugging Face model, whatever stands before it, and what follows it; `layer_5` is sparsify's of 2024."""
_ATTENTION = r"(?:self_attn|attn|attention|self_attention)"
_MODULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), point)
    for pattern, point in (
        (r"(?:output)?", "resid_post"),
        (r"input", "resid_pre"),
        (r"mlp(?:\.output)?", "mlp_out"),
        (r"mlp\.input", "mlp_in"),
        (r"mlp\.(?:down_proj|c_proj|dense_4h_to_h|fc2)\.input", "mlp_act"),
        (rf"{_ATTENTION}(?:\.output)?", "attn_out"),
        (rf"{_ATTENTION}\.input", "attn_in"),
        (rf"{_ATTENTION}\.(?:o_proj|c_proj|dense|out_proj)\.input", "z"),
        # Gemma's own names: the norm before the MLP hands over its output, the one after it feeds the stream.
        (r"pre_feedforward_layernorm\.output", "mlp_in"),
        (r"post_feedforward_layernorm\.output", "mlp_out_post"),
    )
)
_EMBEDDINGS = re.compile(r"^(?:[a-z_]+\.)*(?:embed_tokens|wte|embed_in|word_embeddings)(?:\.output)?$")
_MODULE_PATHS = {
    "resid_post": "layers.{}",
    "mlp_out": "layers.{}.mlp",
    "attn_out": "layers.{}.self_attn",
}
_DIRECTED_PATHS = {
    "resid_pre": "layers.{}.input",
    "resid_post": "layers.{}.output",
    "mlp_in": "layers.{}.mlp.input",
    "mlp_act": "layers.{}.mlp.down_proj.input",
    "mlp_out": "layers.{}.mlp.output",
    "attn_in": "layers.{}.self_attn.input",
    "attn_out": "layers.{}.self_attn.output",
    "z": "layers.{}.self_attn.o_proj.input",
}

_SUBMODULE_POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_SUBMODULES = {"attention": "attn_out", "attn": "attn_out", "mlp": "mlp_out"}
_SUBMODULE = re.compile(rf"^({'|'.join([*_SUBMODULE_POINTS, *_SUBMODULES])})_layer_?(\d+)$")

_NORMED = {
    "attn_in~normalised": "ln1.hook_normalized",
    "mlp_in~normalised": "ln2.hook_normalized",
    "attn_out_post~normalised": "ln1_post.hook_normalized",
    "mlp_out_post~normalised": "ln2_post.hook_normalized",
}
_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "attn_out_post", "mlp_out", "mlp_out_post")
CENTRED, UNBIASED = "~centred", "~unbiased"
"""Views of a hook (`unmix.lm.views`): less its mean over the width; `z` less what every value has in common."""
_LAYER_NORMED = re.compile(
    r"^(?:distil)?gpt2|^gpt-(?:neo|j)|^pythia|^opt-|^(?:stanford|arwen|battlestar|caprica|darkmatter|expanse)|^bloom|"
    r"^santacoder|^phi-(?:1|2)|^tiny-?stories|^(?:gelu|solu|attn-only|redwood_attn|othello)"
)
"""Models with LayerNorms, whose writing weights TransformerLens centres. It leaves those with RMS norms alone."""

OPENAI_LOCATIONS: Mapping[str, str] = {
    "mlp_post_act": "mlp_act",
    "resid_delta_attn": "attn_out_post",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out_post",
    "resid_post_mlp": "resid_post",
}
_OPENAI_VERSION = re.compile(r"_v\d+(?:_\d+k)?$")
_OPENAI_NAMES = (
    re.compile(r"(?:.*/)?(?!autoencoders\b)(?P<location>\w+?)(?:/autoencoders)?[./](?P<layer>\d+)(?:\.pt)?"),
    re.compile(r"blocks\.(?P<layer>\d+)\.(?P<location>\w+)"),
)


def from_transformer_lens(name: str, head: int | None = None) -> str:
    """`blocks.6.hook_resid_post` → `blocks.6.resid_post`; a head index becomes `#head`."""
    if name == "hook_embed":
        return "embeddings"
    match = _BLOCK.match(name)
    if match is not None and match[2] in _BACK:
        name = f"blocks.{match[1]}.{_BACK[match[2]]}"
    return name if head is None else f"{name}#{head}"


def to_transformer_lens(name: str) -> tuple[str, int | None]:
    """The published name and head index of a canonical hook."""
    base, _, head = name.partition("#")
    # Centring and value biases are of the model there, not of the hook.
    base = base.removesuffix(CENTRED).removesuffix(UNBIASED)
    match = _BLOCK.match(base)
    if match is not None and match[2] in _NORMED:
        base = f"blocks.{match[1]}.{_NORMED[match[2]]}"
    elif base == "embeddings":
        base = "hook_embed"
    elif match is not None and match[2] in _POINTS:
        base = f"blocks.{match[1]}.{_POINTS[match[2]]}"
    return base, int(head) if head else None


def as_processed(hook: str, model: str | None, centred: bool = True, value_biases: bool = True) -> str:
    """The view of a canonical hook that TransformerLens shows of `model` after its default processing.

    `centred`: with `center_writing_weights`, which it does to models with LayerNorms alone, told by the model's name.
    `value_biases`: with `fold_ln` and `fold_value_biases`. OpenAI's coders, for one, were trained without the first.
    """
    name = (model or "").rstrip("/").rsplit("/", 1)[-1].lower()
    point = hook.rpartition(".")[2]
    if centred and (point in _STREAM or hook == "embeddings") and _LAYER_NORMED.match(name):
        return hook + CENTRED
    # Heads are cut out of the tensor as it is: a view of one has no columns of its own.
    return hook + UNBIASED if value_biases and point == "z" else hook


def from_module_path(name: str) -> str:
    """`layers.10` → `blocks.10.resid_post`, `model.layers.3.self_attn.o_proj.input` → `blocks.3.z`.

    A module without `.input` or `.output` stands for its raw output. TransformerLens' names are understood too.
    """
    known = from_transformer_lens(name)
    if known != name or _is_canonical(name):
        return known
    if _EMBEDDINGS.match(name):
        return "embeddings"
    match = _LAYER.match(name)
    if match is None:
        return name
    for pattern, point in _MODULES:
        if pattern.fullmatch(match[2] or ""):
            return f"blocks.{match[1]}.{point}"
    return name


def to_module_path(name: str, directed: bool = False) -> str:
    """`blocks.10.resid_post` → `layers.10`, relative to the base model; `directed` adds `.input` or `.output`.

    A hook that no module of a block carries is kept as it is.
    """
    match = _BLOCK.match(name)
    paths = _DIRECTED_PATHS if directed else _MODULE_PATHS
    return paths[match[2]].format(match[1]) if match is not None and match[2] in paths else name


def canonical(name: str) -> str:
    """The hook that a name of any dialect means; a name of none is kept.

    Beside the dialects above: OpenAI's locations with their layer (`resid_post_mlp.8`, `resid_post_mlp_v5_32k/8`,
    `…/resid_post_mlp/autoencoders/8.pt`, `blocks.8.resid_post_mlp`), and names that start with a dot.
    """
    plain = name.strip().lstrip(".")
    for pattern in _OPENAI_NAMES:
        match = pattern.fullmatch(plain)
        if match is not None:
            base = _OPENAI_VERSION.sub("", match["location"])
            if base in OPENAI_LOCATIONS:
                return f"blocks.{match['layer']}.{OPENAI_LOCATIONS[base]}"
    return from_submodule_name(plain)


def module_input(name: str) -> str:
    """The hook of what goes into the module that a canonical hook is the raw output of; other names are kept."""
    for out, into in ((".mlp_out", ".mlp_in"), (".attn_out", ".attn_in"), (".resid_post", ".resid_pre")):
        if name.endswith(out):
            return name.removesuffix(out) + into
    return name


def from_submodule_name(name: str) -> str:
    """dictionary_learning's `resid_post_layer_3` → `blocks.3.resid_post`; anything else as `from_module_path`."""
    match = _SUBMODULE.match(name)
    if match is None:
        return from_module_path(name)
    return f"blocks.{match[2]}.{_SUBMODULES.get(match[1], match[1])}"


def to_submodule_name(name: str) -> tuple[str, int | None]:
    """`blocks.3.resid_post` → `resid_post_layer_3` and the layer; a hook outside a block is kept, without one."""
    match = _BLOCK.match(name)
    if match is None or match[2] not in _SUBMODULE_POINTS:
        return name, int(match[1]) if match is not None else None
    return f"{match[2]}_layer_{match[1]}", int(match[1])


def from_openai_location(location: str, layer: int) -> str:
    """`resid_post_mlp_v5_32k`, 8 → `blocks.8.resid_post`; a location outside the table is kept, with its layer."""
    base = _OPENAI_VERSION.sub("", location)
    return f"blocks.{layer}.{OPENAI_LOCATIONS.get(base, base)}"


def to_openai_location(name: str) -> tuple[str, int] | None:
    """`blocks.8.resid_post` → `("resid_post_mlp", 8)`; `None` for a hook that OpenAI has no location for."""
    match = _BLOCK.match(name)
    if match is None:
        return None
    for location, point in OPENAI_LOCATIONS.items():
        if point == match[2]:
            return location, int(match[1])
    return None


def _is_canonical(name: str) -> bool:
    match = _BLOCK.match(name.partition("#")[0])
    return match is not None and match[2] in _POINTS
