"""Views of a point: the tensor that TransformerLens shows there once it has folded and centred its weights.

TransformerLens' defaults rewrite a model into an equal one whose inside looks different: norms' gains go into the
next weights, the mean over the width is taken out of everything that writes to the stream of a LayerNorm model, and
value biases move behind the output projection. A coder trained there reads another tensor than the model as Hugging
Face ships it holds. A view turns one into the other, both ways: `blocks.8.resid_pre~centred`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CENTRED, NORMALISED, UNBIASED = "centred", "normalised", "unbiased"
VIEWS = (CENTRED, NORMALISED, UNBIASED)


class View:
    """How a tensor x of the model looks as y, and the x that a new y stands for."""

    apart = False
    """Whether y comes from another tensor than the one that is written (a norm's input, for its output)."""

    def show(self, x: Tensor) -> Tensor:
        """y of x [..., d]."""
        raise NotImplementedError

    def undo(self, y: Tensor, x: Tensor) -> Tensor:
        """The x that shows as `y`; `x` [..., d] is what stood there (not used where `apart`)."""
        raise NotImplementedError


class Centred(View):
    """x less its mean over the width. Written: ŷ plus the mean that was taken off x.

    A LayerNorm takes that mean off again, so the model computes with ŷ what the centred model would.
    """

    def show(self, x: Tensor) -> Tensor:
        """See the class."""
        return x - x.mean(dim=-1, keepdim=True)

    def undo(self, y: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        return y + x.mean(dim=-1, keepdim=True).to(y)


class Copied(View):
    """x itself, kept from a block that goes on to write into the same memory (Falcon adds attention to its MLP's)."""

    def show(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.clone()

    def undo(self, y: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        return y.clone()


class Unbiased(View):
    """Heads' outputs less what every value has in common: attention's weights sum to 1, so a head carries it whole."""

    def __init__(self, bias: Callable[[], Tensor | None]) -> None:
        self._bias = bias

    def show(self, x: Tensor) -> Tensor:
        """See the class."""
        bias = self._bias()
        return x if bias is None else x - bias.to(x)

    def undo(self, y: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        bias = self._bias()
        return y if bias is None else y + bias.to(y)


class Normalised(View):
    """What a norm makes of its input before its own gain and bias. Written: ŷ · gain + bias, as the norm's output."""

    apart = True

    def __init__(self, norm: nn.Module) -> None:
        self._norm = norm
        self._bare: dict[tuple[torch.dtype, torch.device], nn.Module] = {}
        self._one_plus: bool | None = None

    @property
    def one_plus(self) -> bool:
        """Whether the gain is 1 + weight (Gemma) rather than the weight."""
        if self._one_plus is None:
            self._one_plus = gain_is_one_plus(self._norm)
        return self._one_plus

    def show(self, x: Tensor) -> Tensor:
        """y of the norm's input `x`, by the norm's own forward with a gain of 1 and no bias."""
        key = (x.dtype, x.device)
        if key not in self._bare:
            self._bare[key] = without_gain(self._norm, self.one_plus, *key)
        return self._bare[key](x)

    def undo(self, y: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        own = {name: value.to(y) for name, value in self._norm.named_parameters(recurse=False)}
        for gain in (value for name, value in own.items() if not _is_bias(name)):
            y = y * (1 + gain if self.one_plus else gain)
        for bias in (value for name, value in own.items() if _is_bias(name)):
            y = y + bias
        return y


def _is_bias(name: str) -> bool:
    return "bias" in name or name == "beta"


def without_gain(norm: nn.Module, one_plus: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy of `norm` whose gain is 1 and whose bias is 0. It shares nothing that can be trained or hooked."""
    fills = {name: 0.0 if one_plus or _is_bias(name) else 1.0 for name, _ in norm.named_parameters(recurse=False)}
    filled = {
        name: torch.full(value.shape, fills[name], dtype=dtype, device=device)
        for name, value in norm.named_parameters(recurse=False)
    }
    return copy_with(norm, filled)


def copy_with(norm: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """A copy of `norm` with other parameters. It shares nothing that can be trained or hooked."""
    bare = norm.__class__.__new__(norm.__class__)
    # Hooks, and a `forward` that something put in the way, belong to the norm in the model.
    state: dict[str, Any] = {k: v for k, v in norm.__dict__.items() if k not in ("forward", "_hf_hook", "_old_forward")}
    state |= {key: type(value)() for key, value in state.items() if key.endswith(("_hooks", "_hooks_with_kwargs"))}
    state |= {"_forward_pre_hooks_with_kwargs": type(state["_forward_pre_hooks"])()}
    state["_parameters"] = {
        name: None if value is None else nn.Parameter(parameters[name], requires_grad=False)
        for name, value in norm.__dict__["_parameters"].items()
    }
    bare.__dict__.update(state)
    return bare


@torch.no_grad()
def gain_is_one_plus(norm: nn.Module) -> bool:
    """Whether `norm` scales by 1 + weight: with weights of 0 it then still lets something through."""
    weights = [value for name, value in norm.named_parameters(recurse=False) if not _is_bias(name)]
    if not weights:
        return False
    cpu = torch.device("cpu")
    zeroed = without_gain(norm, True, torch.float32, cpu)
    return bool(zeroed(torch.linspace(-1, 1, weights[0].shape[-1]).unsqueeze(0)).any())


def value_bias(arch: Any, layer: int, norm: nn.Module | None) -> Tensor | None:
    """The constant that each head's output carries, [heads · head size]; `None` where there is none.

    It is what the value projection makes of the bias of the norm before it, and its own bias. `arch` is interp-engine's
    `ArchSpec`. `ValueError` where attention's weights do not sum to 1, or where values are more than a projection.
    """
    if arch.quirks.attn_sinks or arch.quirks.gated_attn_out:
        raise ValueError("attention's weights do not sum to 1 here, so value biases cannot be taken out of z")
    if arch.value_module(layer) is not None:
        raise ValueError("values are normed before attention, so they have no bias to take out")
    fused = arch.fused_qkv_module(layer)
    projection = arch.v_proj(layer) if fused is None else fused
    weight, own = getattr(projection, "weight", None), getattr(projection, "bias", None)
    before: Tensor | None = None if norm is None else getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(f"the value projection is a {type(projection).__name__}, whose weight cannot be read")
    if own is None and before is None:
        return None
    rows = weight if isinstance(projection, nn.Linear) else weight.T  # GPT-2's Conv1D is [in, out]
    constant = torch.zeros(len(rows), dtype=weight.dtype, device=weight.device) if own is None else own.detach()
    if before is not None:
        constant = constant + rows.detach() @ before.detach().to(rows)
    n_heads, n_kv = arch.n_heads, arch.kv_heads_for_layer(layer)
    if fused is not None:
        from interp_engine.facts import split_qkv_slab

        layout = arch.quirks.qkv_layout
        sizes = {"n_heads": n_heads, "n_kv_heads": n_kv, "head_dim": arch.head_dim}
        constant = split_qkv_slab(constant, layout=layout, **sizes)["v"]
    # Query heads that share a value head share its bias.
    size = arch.value_head_dim_for_layer(layer)
    spread = constant.view(n_kv, size).repeat_interleave(n_heads // n_kv, dim=0)
    return spread.reshape(-1) * arch.value_scale(layer)
