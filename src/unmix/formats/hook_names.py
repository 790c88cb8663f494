"""TransformerLens' hook names, as published configs use them, and the canonical ones.

A name outside the table is kept as it is: the language model's own room resolves or refuses it.
"""

from __future__ import annotations

import re

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
    match = _BLOCK.match(base)
    if base == "embeddings":
        base = "hook_embed"
    elif match is not None and match[2] in _POINTS:
        base = f"blocks.{match[1]}.{_POINTS[match[2]]}"
    return base, int(head) if head else None
