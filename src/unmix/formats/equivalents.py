"""More ways to say the same coder, for layouts that insist on one: tied biases, gates inside the codes, one hook.

As `folds`: config and tensors are rewritten together, and each says what becomes of the codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from unmix.coder.config import CoderConfig, Gated, JumpReLU, TopK
from unmix.core.atomic import write_json
from unmix.core.config import build
from unmix.core.errors import ConfigError, FormatError
from unmix.formats.draft import Draft
from unmix.formats.folds import (
    fold_input_bias,
    gate_factor,
    gate_to_raw,
    replace_config,
    unit_decoder,
)
from unmix.formats.lazy import apply
from unmix.formats.place import Place

SIDE_NOTE = "unmix.json"
"""Beside a layout without a field for hooks: what the coder reads and writes, and its model's name."""


def make_config(tree: Mapping[str, Any], source: str) -> CoderConfig:
    """The config that a reader put together; `FormatError` where its values do not go together."""
    try:
        return build(CoderConfig, tree, source=source)
    except ConfigError as error:
        raise FormatError(str(error)) from error


def refuse(draft: Draft, format: str, reason: str) -> FormatError:
    """The error for what a layout has no field for."""
    return FormatError(f"{draft.config.name}: the {format} format cannot express {reason}")


def refuse_unless(
    draft: Draft,
    format: str,
    activations: Sequence[str],
    normalise: Sequence[str] = ("none", "standardise"),
    signed: bool = False,
    keep_max: bool = False,
) -> None:
    """`FormatError` where the activation or the normalisation is not one of those that the layout has.

    A standardisation is fixed, so it can be folded into the weights of every layout.
    """
    config = draft.config
    if config.activation.kind not in activations:
        raise refuse(draft, format, f"the activation {config.activation.kind!r}; it has {', '.join(activations)}")
    if config.normalise.kind not in normalise:
        raise refuse(draft, format, f"the normalisation {config.normalise.kind!r}; it has {_own(normalise)}")
    if isinstance(config.activation, TopK) and config.activation.relu == "none" and not signed:
        raise refuse(draft, format, "signed codes")
    if isinstance(config.activation, JumpReLU) and config.activation.keep_max and not keep_max:
        raise refuse(draft, format, "a jumprelu that keeps the largest of a token with nothing above its threshold")


def _own(normalise: Sequence[str]) -> str:
    """The normalisations that a layout has itself."""
    return ", ".join(kind for kind in normalise if kind != "standardise")


def refuse_unless_sae(draft: Draft, format: str) -> None:
    """`FormatError` unless the coder writes, at the same width, the one hook that it reads, without a skip matrix."""
    config = draft.config
    if len(config.reads) != 1 or len(config.writes) != 1:
        raise refuse(draft, format, f"{len(config.reads)} reads and {len(config.writes)} writes")
    if config.reads != config.writes:
        raise refuse(draft, format, f"a coder that reads {config.reads[0]} and writes {config.writes[0]}")
    if config.width_out != config.d_in:
        raise refuse(draft, format, f"d_out = {config.width_out} beside d_in = {config.d_in}")
    if config.skip:
        raise refuse(draft, format, "a skip matrix")


def raw_gate(draft: Draft) -> Draft:
    """A gate on z alone. Outputs stay; codes too, save that kinds which rank latents have the factor in their codes."""
    ranks = draft.config.activation.kind in ("topk", "batchtopk", "groupmax")
    return gate_into_codes(draft) if ranks else gate_to_raw(draft)


def gate_into_codes(draft: Draft) -> Draft:
    """Codes become z times the factor of their gate, the decoder is divided by it. Outputs stay.

    A latent whose factor is 0 never fires, before and after.
    """
    config, state = draft.config, draft.state
    if config.gate_space == "raw":
        return draft
    if config.gate_space == "decoder_norm":
        return unit_decoder(draft)
    if isinstance(config.activation, Gated):
        return gate_to_raw(draft)
    factor = gate_factor(draft)
    changed = replace_config(draft, gate_space="raw")
    changed.state.pop("gate_scale", None)
    changed.state["W_enc"] = apply(lambda W, g: W * g[:, None], state["W_enc"], factor)
    changed.state["b_enc"] = apply(torch.mul, state["b_enc"], factor)
    changed.state["W_dec"] = apply(lambda W, g: W / torch.where(g > 0, g, 1.0)[:, None], state["W_dec"], factor)
    return changed


def tie_input_bias(draft: Draft) -> Draft:
    """The decoder's bias subtracted from the input, the encoder's adjusted to it. Codes and outputs stay.

    Wx + c = W(x − b) + (c + Wb). Needs `d_out = d_in`.
    """
    if draft.config.pre_bias == "tied":
        return draft
    draft = fold_input_bias(draft)
    state = draft.state
    changed = replace_config(draft, pre_bias="tied")
    moved = apply(torch.mv, state["W_enc"], state["b_dec"])
    changed.state["b_enc"] = apply(torch.add, state["b_enc"], moved)
    if isinstance(draft.config.activation, Gated):
        changed.state["b_mag"] = apply(lambda b, r, m: b + r.exp() * m, state["b_mag"], state["r_mag"], moved)
    return changed


def one_draft(drafts: Mapping[str, Draft]) -> Draft:
    """The draft of a format that writes one."""
    (draft,) = drafts.values()
    return draft


def origin(draft: Draft, format: str) -> dict[str, Any]:
    """What the same format's files said when the coder was read from them; empty for a coder from elsewhere."""
    kept: Any = draft.config.training.get(format)
    return dict(cast("dict[str, Any]", kept)) if isinstance(kept, dict) else {}


def stored_number(place: Place, file: str, key: str) -> int:
    """A whole number that a file holds as a tensor of one element, like k."""
    value = float(place.store(file).tensor(key))
    if not value.is_integer():
        raise FormatError(f"{place.shown}: {file}: {key} is {value:g}, expected a whole number")
    return int(value)


def write_hooks(draft: Draft, folder: Path) -> None:
    """Put what the coder reads and writes, and its model's name, beside it."""
    config = draft.config
    note = {"name": config.name, "reads": list(config.reads), "writes": list(config.writes)}
    write_json(folder / SIDE_NOTE, note | ({"model": config.model.name} if config.model is not None else {}))


def read_hooks(place: Place) -> dict[str, Any]:
    """Config fields from the note, where there is one."""
    note = place.peek(SIDE_NOTE)
    fields: dict[str, Any] = {k: tuple(map(str, note[k])) for k in ("reads", "writes") if isinstance(note.get(k), list)}
    fields |= {"name": str(note["name"])} if note.get("name") else {}
    return fields | ({"model": {"name": str(note["model"])}} if note.get("model") else {})
