"""A coder's config is checked whole before any weight is made."""

from __future__ import annotations

from typing import Any

import pytest

from unmix.coder.config import CoderConfig
from unmix.core.config import build
from unmix.core.errors import ConfigError

BASE: dict[str, Any] = {"d_in": 8, "n_latents": 16, "activation": {"kind": "topk", "k": 4}}


def test_defaults_are_filled_in() -> None:
    """Writes, d_out and name follow from what was said."""
    config = build(CoderConfig, {**BASE, "reads": ["blocks.1.mlp@in"]})
    assert (config.writes, config.d_out, config.width_out, config.name) == (
        ("blocks.1.mlp@in",),
        8,
        8,
        "blocks.1.mlp-in",
    )
    wide = build(CoderConfig, {**BASE, "reads": ["a"], "writes": ["b"], "d_out": 5, "pre_bias": "none", "name": "me"})
    assert (wide.writes, wide.width_out, wide.name) == (("b",), 5, "me")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": {"kind": "topk", "k": 17}}, r"^config: k is 17, larger than n_latents = 16$"),
        ({"activation": {"kind": "batchtopk", "k": 17}}, r"^config: k is 17, larger than n_latents = 16$"),
        ({"activation": {"kind": "topk", "k": 0}}, r"activation\.topk\.k: Input should be greater than 0 \(found 0\)"),
        ({"d_out": 4}, r"^config: pre_bias 'tied' needs d_out = d_in, found 4 and 8; use 'none' or 'own'$"),
        (
            {"activation": {"kind": "topk", "k": 4, "magnitude": True}},
            r"activation\.topk: magnitude selection keeps signs, so relu must be 'none', found 'after'$",
        ),
        ({"activation": {"kind": "jumpreul"}}, r"activation: unknown kind 'jumpreul'\. Did you mean 'jumprelu'"),
        ({"activation": {"kind": "jumprelu", "bandwith": 1}}, r"'activation\.jumprelu\.bandwith'\. Did you mean 'ban"),
        ({"activation": {"k": 4}}, r"activation\.kind: missing"),
        ({"d_in": 0}, r"d_in: Input should be greater than 0"),
        ({"input_scale": 0.0}, r"input_scale: Input should be greater than 0"),
        ({"normalise": {"kind": "layernorm"}}, r"normalise\.kind: Input should be 'none', 'layer_norm', 'constant"),
        ({"gate": "raw"}, r"unknown field 'gate'\. Did you mean 'gate_space'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(changes: dict[str, Any], message: str) -> None:
    """Each message names the field, what was found and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        build(CoderConfig, {**BASE, **changes})


def test_a_config_survives_json() -> None:
    """Numbers too, to the last bit."""
    config = build(CoderConfig, {**BASE, "input_scale": 0.1 + 0.2, "normalise": {"kind": "layer_norm", "eps": 1e-7}})
    assert CoderConfig.model_validate_json(config.model_dump_json()) == config
