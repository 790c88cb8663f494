"""The last norm and the head as one linear map, once the norm's scale is fixed; and the way from a hook to the stream.

Of a norm γ ⊙ c(x) / s(x) + β (see `unmix.lm.norms`) the gain γ and the centring c are folded into the map; the scale s
is taken at a position, as a mean over positions, or left out (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmix.core.errors import ModelError
from unmix.lm.norms import linear_norm
from unmix.lm.points import split_name

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

_STREAM = ("resid_pre", "resid_mid", "resid_post")
_ADDED = ("attn_out_post", "mlp_out_post")
_RAW = ("attn_out", "mlp_out")
_INNER = {"z": "attn_out", "mlp_act": "mlp_out"}


@dataclass(frozen=True)
class Scales:
    """Scales of the norms on the way from a hook to the logits; 1 where they are left out."""

    final: Tensor | float
    inner: Tensor | float = 1.0
    """Of the norm between a sublayer's raw output and the stream, where the family has one."""
    said: str = "left out"


class Readout:
    """From vectors at a hook to logits, linearly. Biases and soft caps are left out: it maps *differences*."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._arch: Any = lm.points.arch
        norm = lm.points.last_norm
        self.final = None if norm is None else linear_norm(norm, lm.d_model)

    @property
    def cap(self) -> float | None:
        """The family's soft cap of the logits, which comes after what this gives; it keeps their order."""
        found = self._arch.quirks.final_logit_softcapping
        return None if found is None else float(found)

    def logits(self, v: Float[Tensor, "n d"], scale: Tensor | float = 1.0) -> Float[Tensor, "n vocab"]:
        """What vectors added to the stream after the last block add to the logits, before any soft cap."""
        v = v.float()
        v = v if self.final is None else self.final.apply(v, _column(scale))
        return self.head(v)

    @torch.no_grad()
    def head(self, v: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        """What vectors added to the last norm's output add to the logits."""
        lm, arch = self.lm, self._arch
        project: Any = getattr(arch.trunk, "project_out", None)
        x = v.to(lm.dtype)
        x = x if project is None else project(x)
        out = arch.lm_head(x).float()
        bias = getattr(arch.lm_head, "bias", None)
        out = out if bias is None else out - bias.float()
        return out * lm.logit_scale

    @torch.no_grad()
    def to_stream(self, hook: str, v: Float[Tensor, "n d"], inner: Tensor | float = 1.0) -> Float[Tensor, "n d_model"]:
        """What vectors at a write hook add to the residual stream.

        `inner` is the scale of the norm that some families put on a sublayer's output. `ModelError` for hooks that
        write nothing to the stream directly.
        """
        found = self.lm.hook(hook)
        point, layer = split_name(found.name)
        if "~normalised" in found.name:
            raise ModelError(f"{hook}: this is before a gain; use the point itself for direct logits")
        if point in _STREAM:
            return v.float()
        self._check_block(hook, layer)
        if point in _ADDED:
            return v.float()
        if point in _INNER:
            v, point = self._project(point, layer, v, found.head, found.head_size), _INNER[point]
        if point not in _RAW:
            raise ModelError(
                f"{hook}: nothing goes from here to the logits without a nonlinear step; direct logits are those of "
                f"{', '.join((*_STREAM, *_ADDED, *_RAW, *_INNER))}"
            )
        norm, multiplier = self.inner_norm(hook)
        v = v.float() * multiplier
        return v if norm is None else linear_norm(norm, self.lm.d_model).apply(v, _column(inner))

    def inner_norm(self, hook: str) -> tuple[nn.Module | None, float]:
        """The norm and the factor between a sublayer's raw output and the stream."""
        point, layer = split_name(self.lm.hook(hook).name)
        attention = _INNER.get(point, point) == "attn_out"
        if point not in (*_RAW, *_INNER):
            return None, 1.0
        norm = self._arch.post_attn_norm(layer) if attention else self._arch.post_mlp_norm(layer)
        factor = float(self._arch.quirks.residual_multipliers[0 if attention else 1])
        return norm, factor

    def _project(self, point: str, layer: int, v: Tensor, head: int | None, size: int) -> Tensor:
        module = self._arch.attn_out_proj(layer) if point == "z" else self._arch.mlp_projection(layer, "down")
        if head is not None:
            whole = v.new_zeros(*v.shape[:-1], self.lm.width(f"blocks.{layer}.{point}"))
            whole[..., head * size : (head + 1) * size] = v
            v = whole
        zero: Tensor = module(torch.zeros_like(v[:1]).to(self.lm.dtype))
        return (module(v.to(self.lm.dtype)) - zero).float()

    def _check_block(self, hook: str, layer: int) -> None:
        block: Any = self._arch.block(layer)
        if getattr(block, "do_layer_norm_before", True) is False:
            raise ModelError(
                f"{hook}: this family norms the stream itself after every sublayer, so nothing is added to it "
                "directly; use resid_post"
            )


def measure_scales(readout: Readout, hooks: Sequence[str], tokens: Tensor, position: int | None) -> dict[str, Scales]:
    """Scales by hook at a position of `tokens` [batch, pos] (the mean over rows), or as means over all but the first.

    One pass. The first position is left out of means: it carries massive activations.
    """
    lm, last = readout.lm, readout.lm.last_hook
    raw = {hook: _raw_hook(lm, hook) for hook in hooks if readout.inner_norm(hook)[0] is not None}
    found = lm.capture(tokens, [last, *dict.fromkeys(raw.values())])
    norm = lm.points.last_norm
    said = f"at position {position}" if position is not None else f"means over {_kept(tokens)} positions"
    final: Tensor | float = 1.0
    if norm is not None and readout.final is not None:
        final = _pick(readout.final.scale(norm, found[last]), position)
    scales: dict[str, Scales] = {}
    for hook in hooks:
        inner: Tensor | float = 1.0
        module, _ = readout.inner_norm(hook)
        if module is not None:
            inner = _pick(linear_norm(module, lm.d_model).scale(module, found[raw[hook]]), position)
        scales[hook] = Scales(final, inner, said)
    return scales


def _raw_hook(lm: LanguageModel, hook: str) -> str:
    point, layer = split_name(lm.hook(hook).name)
    return f"blocks.{layer}.{_INNER.get(point, point)}"


def _kept(tokens: Tensor) -> int:
    return tokens.shape[0] * max(1, tokens.shape[1] - 1)


def _pick(scale: Tensor, position: int | None) -> float:
    if position is not None:
        return float(scale[:, position].mean())
    return float((scale[:, 1:] if scale.shape[1] > 1 else scale).mean())


def _column(scale: Tensor | float) -> Tensor | float:
    return scale.reshape(-1, 1) if isinstance(scale, Tensor) and scale.ndim else scale
