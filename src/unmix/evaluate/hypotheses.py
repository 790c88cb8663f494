"""Other ways to read the same published files: the mistakes that raise nothing and spoil every number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.coder.config import CoderConfig, Normalise
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ModelError
from unmix.lm.model import LanguageModel

_POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "attn_out_post", "mlp_out", "mlp_out_post")
_INPUTS = ("mlp_in", "resid_mid", "attn_in", "resid_pre")
_LAYER = re.compile(r"^blocks\.(\d+)\.(\w+)$")


@dataclass(frozen=True)
class Hypothesis:
    """One reading: a coder, and where it would read and write."""

    what: str
    coder: SparseCoder
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    cause: str = ""


def hook_hypotheses(coder: SparseCoder, lm: LanguageModel) -> Iterator[Hypothesis]:
    """The coder as it is, at other points of its layer and the layers beside it. For one read and one write.

    A coder that reads and writes one hook moves as a whole; a transcoder's input or output moves alone.
    """
    config = coder.config
    if len(config.reads) != 1 or len(config.writes) != 1:
        return
    read, write = config.reads[0], config.writes[0]
    if read == write:
        for hook in _nearby(read, lm, config.d_in, _POINTS):
            yield Hypothesis(f"at {hook}", coder, (hook,), (hook,), f"wrong hook: the coder fits {hook}, not {read}")
        return
    for hook in _nearby(read, lm, config.d_in, _INPUTS):
        cause = f"wrong hook: the coder reads {hook}, not {read}"
        yield Hypothesis(f"reading {hook}", coder, (hook,), (write,), cause)
    for hook in _nearby(write, lm, config.width_out, _POINTS):
        cause = f"wrong hook: the coder writes {hook}, not {write}"
        yield Hypothesis(f"writing {hook}", coder, (read,), (hook,), cause)


def coder_hypotheses(
    coder: SparseCoder, x: Float[Tensor, "rows d"], reads: tuple[str, ...], writes: tuple[str, ...]
) -> Iterator[Hypothesis]:
    """The same weights with another config, at one place. `x` are activations there, to measure scales by."""
    config = coder.config
    elsewhere = reads != config.reads
    where, also = (f" at {' + '.join(reads)}", f", and the hook is {reads[0]}") if elsewhere else ("", "")
    for what, cause, changed in _readings(coder, x):
        if changed is not None:
            yield Hypothesis(what + where, changed, reads, writes, cause + also)


def _readings(coder: SparseCoder, x: Tensor) -> Iterator[tuple[str, str, SparseCoder | None]]:
    config = coder.config
    root = config.d_in**0.5
    if config.normalise.kind == "none" and config.input_scale == 1.0:
        mean_norm = root / float(x.norm(dim=-1).mean())
        for what, scale, cause in (
            ("input scaled to a mean norm of √d", mean_norm, "missing scale: it was trained on inputs of mean norm √d"),
            ("input × √d", root, "missing scale: it was trained on activations √d times larger (Gemma's embeddings)"),
            ("input ÷ √d", 1 / root, "missing scale: it was trained on activations √d times smaller"),
        ):
            yield what, cause, _with(coder, input_scale=scale, output_scale=1 / scale)
        layer_norm = Normalise(kind="layer_norm")
        yield (
            "layer-normed input",
            "missing normalisation: it was trained on layer-normed inputs",
            _with(coder, normalise=layer_norm),
        )
        yield (
            "centred input",
            "missing centring: it was trained on activations less their mean over the width",
            _with(coder, normalise=layer_norm, centre_only=True),
        )
    elif config.normalise.kind != "none":
        yield (
            "raw input",
            "normalisation that does not belong: it was trained on raw activations",
            _with(coder, normalise=Normalise()),
        )
    else:
        yield (
            "unscaled input",
            "a scale that does not belong, or was folded in already",
            _with(coder, input_scale=1.0, output_scale=1.0),
        )
    if config.width_out == config.d_in and config.pre_bias != "own":
        other = "none" if config.pre_bias == "tied" else "tied"
        says = "is not subtracted from its input" if other == "none" else "is subtracted from its input"
        yield (
            f"b_dec {'not ' if other == 'none' else ''}subtracted",
            f"input bias: b_dec {says}",
            _with(coder, pre_bias=other),
        )
    norms = coder.W_dec.detach().norm(dim=-1)
    if float(norms.std()) > 1e-3 * float(norms.mean()) or abs(float(norms.mean()) - 1) > 1e-3:
        yield (
            "unit-norm decoder rows",
            "folded norm: its decoder rows are meant at unit norm",
            _with(coder, weights=lambda c: {"W_dec": c.dictionary}),
        )
        other = "raw" if config.gate_space == "decoder_norm" else "decoder_norm"
        if config.gate_space in ("raw", "decoder_norm") and config.activation.kind != "relu":
            yield (
                f"gate on {'z' if other == 'raw' else 'z × decoder norm'}",
                (
                    "folded norm: its thresholds or ranking act on "
                    + ("z alone" if other == "raw" else "z times the decoder norm")
                ),
                _with(coder, gate_space=other),
            )


def _with(
    coder: SparseCoder,
    weights: Callable[[SparseCoder], dict[str, Tensor]] | None = None,
    centre_only: bool = False,
    **changes: Any,
) -> SparseCoder | None:
    """A coder of the same tensors under another config; None where that config cannot be."""
    if centre_only:
        return _Centred(coder) if coder.config.width_out == coder.config.d_in else None
    try:
        config = CoderConfig.model_validate({**coder.config.model_dump(), **changes})
    except ValueError:
        return None
    state = {name: t.detach() for name, t in coder.state_dict().items()}
    for name in ("norm_mean", "norm_scale"):
        if config.normalise.kind != "standardise":
            state.pop(name, None)
    return SparseCoder.from_state(config, {**state, **(weights(coder) if weights else {})})


class _Centred(SparseCoder):
    """The coder on activations whose mean over the width was taken out, and put back after."""

    def __init__(self, coder: SparseCoder) -> None:
        with torch.device("meta"):
            super().__init__(coder.config)
        self.load_state_dict(coder.state_dict(), assign=True)
        self.eval()

    def prepare(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the width is remembered for the way back."""
        mean = x.mean(-1, keepdim=True)
        s, context = super().prepare(x - mean)
        return s, {**context, "mean": mean}

    def finish(
        self, y: Tensor, mean: Tensor | None = None, std: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """The mean is put back."""
        out = super().finish(y, None, std, skip)
        return out if mean is None else out + mean.reshape(-1, 1)


def _nearby(hook: str, lm: LanguageModel, width: int, points: tuple[str, ...]) -> Iterator[str]:
    """Other points of the hook's layer and its neighbours that are `width` wide, each tensor once."""
    match = _LAYER.match(lm.hook(hook).name)
    if match is None:
        return
    layer = int(match[1])
    seen = {lm.hook(hook).read}
    for near in (layer, layer - 1, layer + 1):
        for point in points:
            name = f"blocks.{near}.{point}"
            try:
                found = lm.hook(name)
            except ModelError:
                continue
            if found.read not in seen and lm.width(name) == width:
                seen.add(found.read)
                yield name
