"""Random coders in float64 and inputs that provoke them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder

ACTIVATIONS = (
    "topk-after", "topk-before", "topk-none", "topk-magnitude", "batchtopk", "batchtopk-eval", "jumprelu",
    "jumprelu-max", "gated", "groupmax", "relu", "identity",
)  # fmt: skip
NORMALISES: tuple[dict[str, Any], ...] = (
    {},
    {"kind": "layer_norm"},
    {"kind": "layer_norm", "ddof": 0, "eps": 0.5, "eps_back": True},
    {"kind": "layer_norm", "restore": False},
    {"kind": "constant_norm"},
    {"kind": "standardise"},
)
GATE_SPACES = ("raw", "decoder_norm", "decoder_norm_sum", "own")


def activation(name: str, k: int) -> dict[str, Any]:
    """The config behind one of `ACTIVATIONS`."""
    kind, _, variant = name.partition("-")
    if kind == "topk":
        rule = {"relu": "none", "magnitude": True} if variant == "magnitude" else {"relu": variant}
        return {"kind": "topk", "k": k, **rule}
    if kind in ("batchtopk", "groupmax"):
        return {"kind": kind, "k": k}
    if kind == "jumprelu":
        return {"kind": "jumprelu", "bandwidth": 0.8, "keep_max": variant == "max"}
    return {"kind": kind}


def make_coder(
    name: str, d_in: int, n_latents: int, k: int = 2, whole: bool = False, seed: int = 0, **config: Any
) -> SparseCoder:
    """A float64 coder with every parameter random; `whole` numbers make its arithmetic exact, so that ties are ties."""
    full = CoderConfig(d_in=d_in, n_latents=n_latents, activation=activation(name, k), **config)
    coder = SparseCoder(full).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in coder.named_parameters():
            if key == "threshold" and parameter.ndim == 0:
                parameter.fill_(0.5)
            elif key == "threshold":
                choices = torch.tensor([0.75, 1.0, 2.0], dtype=parameter.dtype)
                parameter.copy_(choices[torch.randint(0, 3, parameter.shape, generator=generator)])
            elif key in ("norm_scale", "gate_scale"):
                choices = torch.tensor([0.5, 1.0, 4.0], dtype=parameter.dtype)
                parameter.copy_(choices[torch.randint(0, 3, parameter.shape, generator=generator)])
            else:
                parameter.copy_(_random(tuple(parameter.shape), whole, generator))
    return coder.train(not name.endswith("-eval"))


def make_input(rows: int, d: int, style: str, seed: int = 0) -> Tensor:
    """`[rows, d]` in float64: `normal`, `zeros`, or `whole` small numbers with repeated rows."""
    generator = torch.Generator().manual_seed(seed + 1)
    if style == "zeros":
        return torch.zeros(rows, d, dtype=torch.float64)
    x = _random((rows, d), style == "whole", generator)
    return x[torch.randint(0, max(rows // 2, 1), (rows,), generator=generator)] if style == "whole" and rows else x


def _random(shape: tuple[int, ...], whole: bool, generator: torch.Generator) -> Tensor:
    if whole:
        return torch.randint(-2, 3, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> Callable[[], tuple[SparseCoder, Tensor]]:
    """Makes a coder of any make and an input for it; rows beyond 16 need more than one (smallest) tile.

    Made by the test and not while drawing: the run-time type checks of tuples use `random`, forbidden there.
    """
    style = draw(st.sampled_from(["normal", "normal", "whole", "zeros"]))
    whole = style != "normal"
    d = draw(st.integers(2, 6))
    F = draw(st.integers(1, 12))
    name = draw(st.sampled_from(ACTIVATIONS))
    k = draw(st.sampled_from([1, F, F // 2] if name == "groupmax" and F % 2 == 0 else [1, F]))
    k = k if name == "groupmax" else draw(st.sampled_from([1, F, (F + 1) // 2]))
    transcoder = draw(st.booleans())
    several = draw(st.booleans())
    rules = [rule for rule in NORMALISES if not (transcoder and rule.get("kind") == "standardise")]
    make = partial(
        make_coder, name, d, F, k, whole, draw(st.integers(0, 1000)),
        d_out=draw(st.sampled_from([2, 4, 6])) if transcoder else None,
        # Whole numbers stay exact without normalisation only, and batch-wide ties need exactness.
        normalise={} if whole else draw(st.sampled_from(rules)),
        input_scale=draw(st.sampled_from([1.0, 0.5])), output_scale=draw(st.sampled_from([1.0, 4.0])),
        pre_bias=draw(st.sampled_from(["none", "own"] if transcoder else ["none", "tied", "own"])),
        gate_space=draw(st.sampled_from(GATE_SPACES)), skip=draw(st.booleans()),
        reads=("a", "b") if several else ("a",), write_widths=(1, d - 1) if several and not transcoder else (),
    )  # fmt: skip
    rows = draw(st.sampled_from([0, 1, 2, 5, 16, 17, 40]))
    seed = draw(st.integers(0, 1000))
    return lambda: (make(), make_input(rows, d, style, seed))
