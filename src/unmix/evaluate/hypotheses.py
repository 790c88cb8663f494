"""Other ways to read the same published files: the mistakes that raise nothing and spoil every number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.coder.config import CoderConfig, Normalise
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ModelError
from unmix.lm.model import LanguageModel

_POINTS = ("resid_post", "resid_mid", "resid_pre", "mlp_out_post", "mlp_out", "attn_out_post", "attn_out")
_INPUTS = ("mlp_in", "resid_mid", "attn_in", "resid_pre")
_LAYER = re.compile(r"^blocks\.(\d+)\.(\w+)$")
_SPACES = {
    "raw": "z alone",
    "decoder_norm": "z times the decoder norm",
    "decoder_norm_sum": "z times the sum of the decoder norms of its writes",
}
_Change = tuple[str, str, SparseCoder | None]
"""What is done differently, what it would mean, and the coder so changed (None where it cannot be)."""


@dataclass(frozen=True)
class Hypothesis:
    """One reading: a coder, and where it would read and write."""

    what: str
    coder: SparseCoder
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    cause: str = ""
    """What it means, if this is the reading that fits."""
    steps: int = 0
    """How many things differ from what is stated."""

    def then(self, what: str, cause: str, **changes: Any) -> Hypothesis:
        """One thing more done differently."""
        return replace(
            self,
            what=what if self.steps == 0 else f"{self.what}, {what}",
            cause=f"{self.cause}; and {cause}" if self.cause else cause,
            steps=self.steps + 1,
            **changes,
        )


def hook_hypotheses(base: Hypothesis, lm: LanguageModel) -> Iterator[Hypothesis]:
    """The coder at other points of its layer and of the layers beside it. For one read and one write.

    A coder that reads and writes one hook moves as a whole; a transcoder's input or output moves alone.
    """
    if len(base.reads) != 1 or len(base.writes) != 1:
        return
    config, read, write = base.coder.config, base.reads[0], base.writes[0]
    if read == write:
        for hook in _nearby(read, lm, config.d_in, _POINTS):
            cause = f"wrong hook: it fits {hook}, not {read}"
            yield base.then(f"at {hook}", cause, reads=(hook,), writes=(hook,))
        return
    for hook in _nearby(read, lm, config.d_in, _INPUTS):
        yield base.then(f"reading {hook}", f"wrong hook: it reads {hook}, not {read}", reads=(hook,))
    for hook in _nearby(write, lm, config.width_out, _POINTS):
        yield base.then(f"writing {hook}", f"wrong hook: it writes {hook}, not {write}", writes=(hook,))


def coder_hypotheses(
    base: Hypothesis, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"]
) -> Iterator[Hypothesis]:
    """The same weights under another config, at one place; scales are measured on its activations `x` and `target`."""
    coder = base.coder
    for changes in (_inputs(coder, x, target), _biases(coder), _norms(coder)):
        for what, cause, changed in changes:
            if changed is not None:
                yield base.then(what, cause, coder=changed)


def _inputs(coder: SparseCoder, x: Tensor, target: Tensor) -> Iterable[_Change]:
    """Other normalisations and scales of the input."""
    config = coder.config
    if config.normalise.kind != "none":
        yield (
            "raw input",
            "normalisation that does not belong: it was trained on raw activations",
            _with(coder, normalise=Normalise()),
        )
        return
    if config.input_scale != 1.0 or config.output_scale != 1.0:
        yield (
            "unscaled",
            "a scale that does not belong, or was folded into the weights already",
            _with(coder, input_scale=1.0, output_scale=1.0),
        )
        return
    for what, cause, scale, back in _scales(coder, x, target):
        yield what, cause, _with(coder, input_scale=scale, output_scale=back)
    if len(config.reads) > 1:
        return
    yield (
        "layer-normed input",
        "missing normalisation: it was trained on layer-normed activations",
        # What a transcoder writes is another hook's: it is not scaled back by its input.
        _with(coder, normalise=Normalise(kind="layer_norm", restore=config.reads == config.writes)),
    )
    yield (
        "centred input",
        "missing centring: it was trained on activations less their mean over the width (TransformerLens' default)",
        _Centred(coder) if config.width_out == config.d_in else None,
    )


def _scales(coder: SparseCoder, x: Tensor, target: Tensor) -> Iterator[tuple[str, str, float, float]]:
    """`(what, cause, input scale, output scale)`."""
    root = coder.config.d_in**0.5
    norm_in, norm_out = float(x.norm(dim=-1).mean()), float(target.norm(dim=-1).mean())
    if norm_in > 0:
        cause = "missing scale: it was trained on inputs scaled to a mean norm of √d"
        yield "scaled to a mean norm of √d", cause, root / norm_in, norm_out / coder.config.width_out**0.5
    yield "× √d", "missing scale: it was trained on activations √d times larger", root, 1 / root
    cause = "missing scale: it was trained on activations √d times smaller (Gemma's embeddings before their own scale)"
    yield "÷ √d", cause, 1 / root, root


def _biases(coder: SparseCoder) -> Iterable[_Change]:
    """b_dec subtracted from the input, or not."""
    if coder.config.width_out != coder.config.d_in or coder.config.pre_bias == "own":
        return
    tied = coder.config.pre_bias == "tied"
    yield (
        f"b_dec {'not ' if tied else ''}subtracted",
        f"input bias: b_dec {'is not' if tied else 'is'} subtracted from its input",
        _with(coder, pre_bias="none" if tied else "tied"),
    )


def _norms(coder: SparseCoder) -> Iterable[_Change]:
    """Decoder norms folded into the codes, or not."""
    norms = coder.W_dec.detach().norm(dim=-1)
    mean = float(norms.mean())
    if float(norms.std(correction=0)) <= 1e-3 * mean and abs(mean - 1) <= 1e-3:
        return
    yield (
        "decoder rows at unit norm",
        "folded norm: its decoder rows are meant at unit norm",
        _with(coder, weights=lambda c: {"W_dec": c.dictionary}),
    )
    space, several = coder.config.gate_space, len(coder.config.writes) > 1
    if space not in _SPACES or coder.config.activation.kind in ("relu", "identity", "gated"):
        return
    for other, said in _SPACES.items():
        if other != space and (several or other != "decoder_norm_sum"):
            yield f"gate on {said}", f"folded norm: its gate acts on {said}", _with(coder, gate_space=other)


def _with(
    coder: SparseCoder, weights: Callable[[SparseCoder], dict[str, Tensor]] | None = None, **changes: Any
) -> SparseCoder | None:
    """A coder of the same tensors under another config; None where that config cannot be."""
    try:
        config = CoderConfig.model_validate({**coder.config.model_dump(), **changes})
    except ValueError:
        return None
    state = {name: t.detach() for name, t in coder.state_dict().items()}
    if config.normalise.kind != "standardise":
        state = {name: t for name, t in state.items() if name not in ("norm_mean", "norm_scale")}
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
    """Other tensors of the hook's layer and its neighbours that are `width` wide: its own point one layer off first."""
    stated = lm.hook(hook)
    match = _LAYER.match(stated.name)
    if match is None:
        return
    layer, own = int(match[1]), match[2]
    beside = [f"blocks.{layer + step}.{own}" for step in (-1, 1)]
    others = [_as(own, near, point, lm.n_layers) for near in (layer, layer - 1, layer + 1) for point in points]
    seen = {_tensor(stated.name, lm)}
    for name in (*beside, *others):
        try:
            tensor = _tensor(name, lm)
        except ModelError:
            continue
        if tensor not in seen and lm.width(name) == width:
            seen.add(tensor)
            yield name


def _as(own: str, layer: int, point: str, n_layers: int) -> str:
    """The name of a point; of the stream between two blocks, the one of its two names that the coder's own hook has."""
    if own == "resid_post" and point == "resid_pre" and layer > 0:
        return f"blocks.{layer - 1}.resid_post"
    if own == "resid_pre" and point == "resid_post" and layer + 1 < n_layers:
        return f"blocks.{layer + 1}.resid_pre"
    return f"blocks.{layer}.{point}"


def _tensor(name: str, lm: LanguageModel) -> object:
    """What tells one tensor from another: the output of a block is the input of the next."""
    found = lm.hook(name)
    match = _LAYER.match(found.name)
    if match and match[2] in ("resid_pre", "resid_post"):
        return int(match[1]) + (match[2] == "resid_post")
    return found.read
