"""The named points of a language model, under the names of interp-engine.

`interp_engine.arch` knows where each family keeps its blocks, norms and projections. This file turns that into
hooks with separate read and write adapters (decision 7). Views of them (`~centred`) are of `unmix.lm.views`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from unmix.core.errors import ModelError, did_you_mean
from unmix.lm.sites import Site
from unmix.lm.views import (
    CENTRED,
    NORMALISED,
    UNBIASED,
    VIEWS,
    Centred,
    Copied,
    Normalised,
    Unbiased,
    View,
    value_bias,
)

if TYPE_CHECKING:
    from interp_engine.arch import ArchSpec

LAYER_POINTS = (
    "resid_pre", "attn_in", "z", "attn_out", "attn_out_post", "resid_mid", "mlp_in", "mlp_act", "mlp_out",
    "mlp_out_post", "resid_post",
)  # fmt: skip
MODEL_POINTS = ("embeddings", "final_norm")
STREAM_POINTS = (
    "embeddings", "resid_pre", "resid_mid", "resid_post", "attn_out", "attn_out_post", "mlp_out", "mlp_out_post",
)  # fmt: skip
"""What TransformerLens' `center_writing_weights` takes the mean out of."""
_PRE_ATTN_NORMS = ("input_layernorm", "ln_1", "self_attn_layer_norm", "ln_attn", "norm_1", "pre_attention_layernorm")


@dataclass(frozen=True)
class Hook:
    """A place in a model, resolved.

    The activation is `value(read)`; writing x̂ sets `value(write)` so that the activation becomes x̂:
    `(x̂ − value(base)) / scale`, where `base` (only `resid_mid` has one) is the stream before the sublayer and
    `scale` is the factor that some families put on a sublayer's output before adding it. With a `view` the activation
    is what that shows, and x̂ goes back through it first.
    """

    name: str
    """Canonical: `blocks.6.resid_post`, `embeddings`, `blocks.5.z#3`, `blocks.8.resid_pre~centred`, `lm_head@in`."""
    read: Site
    write: Site
    scale: float = 1.0
    base: Site | None = None
    head: int | None = None
    head_size: int = 0
    view: View | None = field(default=None, compare=False)
    """Made anew each time a name is resolved; the name says which."""
    heads_apart: bool = False
    """Whether the tensor is [batch, pos, heads, size] (TransformerLens'); the activation is flat."""

    @property
    def place(self) -> str:
        """The name without view and head: the point or module path."""
        return self.name.partition("#")[0].partition("~")[0]

    @property
    def direct(self) -> bool:
        """Whether the write site holds the activation itself."""
        plain = self.base is None and self.scale == 1.0 and self.view is None and not self.heads_apart
        return plain and self.read == self.write

    def seen_as(self, name: str, view: View, read: Site | None = None) -> Hook:
        """The same place through a view; `read` is where it looks from, where that is another site."""
        return replace(self, name=f"{self.name}~{name}", view=view, read=read or self.read)


class PointTable(Protocol):
    """What resolves point names on one kind of model: `Points` or `unmix.lm.lens.LensPoints`."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        ...

    @property
    def n_heads(self) -> int:
        """Number of attention heads of a block."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        ...

    @property
    def trunk(self) -> str:
        """What module paths may leave out at their start."""
        ...

    def own(self, spec: str) -> Site | None:
        """Where the model itself has a hook of this name (TransformerLens'); `None` where it has none."""
        ...

    def layer_hook(self, point: str, layer: int) -> Hook:
        """The hook of a point at a layer."""
        ...

    def model_hook(self, point: str) -> Hook:
        """The hook `embeddings` or `final_norm`."""
        ...

    def view(self, hook: Hook, name: str) -> Hook:
        """`hook` through a view."""
        ...

    def names(self) -> list[str]:
        """Canonical names of every point, in the order of the forward pass."""
        ...

    def z_head_dim(self, layer: int) -> int:
        """Width of a head of `z`."""
        ...


NORMED_POINTS = ("attn_in", "mlp_in", "attn_out_post", "mlp_out_post", "final_norm")
"""Points that can be the output of a norm."""


def split_name(name: str) -> tuple[str, int]:
    """Point and layer of a canonical name, -1 where it has none; a module path is its own point."""
    base = name.partition("#")[0].partition("~")[0]
    parts = base.split(".")
    return (parts[2], int(parts[1])) if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit() else (base, -1)


def centred(point: str) -> View:
    """The centred view of a point of the stream; `ValueError` for another."""
    if point not in STREAM_POINTS:
        raise ValueError(f"only the stream and what is added to it are centred: {', '.join(STREAM_POINTS)}")
    return Centred()


def no_view(hook: str, point: str, name: str) -> ModelError:
    """The error for a view that a point does not have, or that does not exist."""
    if name not in VIEWS:
        return ModelError(f"{hook}~{name}: no view {name!r}. {did_you_mean(name, VIEWS)}")
    return ModelError(f"{hook}~{name}: {point} has no such view; {UNBIASED} is one of z")


def find_arch(model: nn.Module) -> ArchSpec | None:
    """Where this Hugging Face model keeps its parts; `None` for a module whose parts have no known roles."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return None
    from interp_engine.arch import resolve_arch

    named = copy.copy(config)
    if not getattr(named, "architectures", None):
        # Built from a config rather than loaded: without the class name interp-engine takes Phi's and
        # Cohere's parallel blocks for sequential ones.
        named.architectures = [type(model).__name__]
    try:
        return resolve_arch(model, named)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return None


class Points:
    """The points of one model. Layers count from 0."""

    def __init__(self, model: nn.Module, arch: ArchSpec) -> None:
        self.arch = arch
        self._paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
        self._model = model
        self._rules: dict[str, Callable[[int], Hook]] = {
            "resid_pre": lambda layer: self._plain("resid_pre", layer, *self._stream(layer, "input")),
            "resid_post": lambda layer: self._plain("resid_post", layer, *self._stream(layer, "output")),
            "attn_in": lambda layer: self._plain("attn_in", layer, *arch.attn_boundary(layer, "in")),
            "attn_out": lambda layer: self._plain("attn_out", layer, *arch.attn_boundary(layer, "out")),
            "z": lambda layer: self._plain("z", layer, arch.attn_out_proj(layer), "input"),
            "mlp_in": lambda layer: self._plain("mlp_in", layer, *arch.mlp_boundary(layer, "in")),
            "mlp_out": lambda layer: self._kept(self._plain("mlp_out", layer, *self._mlp_out(layer))),
            "mlp_act": lambda layer: self._plain("mlp_act", layer, arch.mlp_projection(layer, "down"), "input"),
            "attn_out_post": self._attn_out_post,
            "mlp_out_post": self._mlp_out_post,
            "resid_mid": self._resid_mid,
        }

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.arch.n_layers

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.arch.n_heads

    @property
    def head_dim(self) -> int:
        """Width of a query or key head."""
        return self.arch.head_dim

    @property
    def trunk(self) -> str:
        """Path of what holds the blocks."""
        return self.arch.module_names.get("trunk", "")

    def z_head_dim(self, layer: int) -> int:
        """Width of a head of `z`."""
        return self.arch.value_head_dim_for_layer(layer)

    def own(self, spec: str) -> Site | None:
        """Nothing: Hugging Face models have no hooks of their own."""
        return None

    def layer_hook(self, point: str, layer: int) -> Hook:
        """The hook of a point at a layer; `ModelError` where this model has no such tensor, saying why."""
        if not 0 <= layer < self.n_layers:
            raise ModelError(
                f"blocks.{layer}.{point}: there is no layer {layer}; this model has layers 0 to {self.n_layers - 1}"
            )
        try:
            return self._rules[point](layer)
        except (ValueError, AttributeError) as error:
            raise ModelError(f"blocks.{layer}.{point}: {error}") from None

    def model_hook(self, point: str) -> Hook:
        """The hook `embeddings` or `final_norm`."""
        module = self.arch.embed if point == "embeddings" else self.last_norm
        if module is None:
            raise ModelError(f"{point}: {self.arch.architecture} has no norm after its last block")
        site = Site(self._path(module), "out")
        return Hook(point, site, site)

    def view(self, hook: Hook, name: str) -> Hook:
        """`hook` through the view `name`; `ModelError` where there is no such view of it, saying why."""
        point, layer = split_name(hook.name)
        try:
            if name == CENTRED:
                return hook.seen_as(name, centred(point))
            if name == UNBIASED and point == "z":
                return hook.seen_as(name, self._unbiased(layer))
            if name == NORMALISED:
                norm = self._norm_of(point, layer)
                return hook.seen_as(name, Normalised(norm), Site(self._path(norm), "in"))
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{hook.name}~{name}: {error}") from None
        raise no_view(hook.name, point, name)

    def _unbiased(self, layer: int) -> View:
        norm = self._pre_attn_norm(layer)
        value_bias(self.arch, layer, norm)  # refuses here rather than in a pass
        return Unbiased(lambda: value_bias(self.arch, layer, norm))

    def _norm_of(self, point: str, layer: int) -> nn.Module:
        """The norm whose output a point is."""
        arch = self.arch
        if point == "final_norm":
            assert self.last_norm is not None
            return self.last_norm
        found: nn.Module | None = None
        if point == "attn_in":
            found = self._pre_attn_norm(layer)
        elif point == "mlp_in":
            found = self._pre_mlp_norm(layer)
        elif point in ("attn_out_post", "mlp_out_post"):
            found = arch.post_attn_norm(layer) if point == "attn_out_post" else arch.post_mlp_norm(layer)
        else:
            raise ValueError("only what comes out of a norm has a normalised view: " + ", ".join(NORMED_POINTS))
        if found is None:
            raise ValueError(f"no norm of {arch.architecture}'s block gives this")
        return found

    def _pre_attn_norm(self, layer: int) -> nn.Module | None:
        block = self.arch.block(layer)
        found = next((getattr(block, name) for name in _PRE_ATTN_NORMS if hasattr(block, name)), None)
        return None if getattr(block, "do_layer_norm_before", True) is False else found

    def _pre_mlp_norm(self, layer: int) -> nn.Module | None:
        block: Any = self.arch.block(layer)
        if hasattr(block, "do_layer_norm_before"):
            return block.final_layer_norm if block.do_layer_norm_before else None
        found = self.arch.pre_mlp_norm(layer)
        # Parallel blocks with one norm (Phi, Cohere) hand its output to attention and MLP alike.
        return self._pre_attn_norm(layer) if found is None and self.arch.quirks.parallel_attn_mlp else found

    def names(self) -> list[str]:
        """Canonical names of every point that this model has, in the order of the forward pass."""
        names = ["embeddings"]
        for layer in range(self.n_layers):
            for point in LAYER_POINTS:
                try:
                    names.append(self.layer_hook(point, layer).name)
                except ModelError:
                    continue
        return names if self.last_norm is None else [*names, "final_norm"]

    @cached_property
    def last_norm(self) -> nn.Module | None:
        """The norm after the last block, where there is one (OPT-350m has none: what is found is a block's)."""
        inside = {id(module) for block in self.arch.decoder_layers for module in block.modules()}
        return None if id(self.arch.final_norm) in inside else self.arch.final_norm

    def _path(self, module: nn.Module) -> str:
        path = self._paths.get(id(module))
        if path is None:
            raise ValueError(f"{type(module).__name__} is not inside the model")
        return path

    def _plain(self, point: str, layer: int, module: nn.Module, side: str) -> Hook:
        site = self._site(module, side)
        return Hook(f"blocks.{layer}.{point}", site, site)

    def _site(self, module: nn.Module, side: str) -> Site:
        return Site(self._path(module), "in" if side == "input" else "out")

    def _stream(self, layer: int, side: str) -> tuple[nn.Module, str]:
        if self.arch.quirks.n_residual_streams > 1:
            raise ValueError(f"{self.arch.architecture} carries several residual streams; use a module path")
        slot = self.arch.slot_for(layer)
        if not (slot.is_first_in_block if side == "input" else slot.is_last_in_block):
            raise ValueError(f"layer {layer} starts or ends inside a block, where no module holds the stream")
        return self.arch.block(layer), side

    def _mlp_out(self, layer: int) -> tuple[nn.Module, str]:
        if self.arch.mlp_is_half_the_feed_forward(layer):
            raise ValueError("a dense MLP runs beside the experts, so its module's output is half; use mlp_out_post")
        return self.arch.mlp_boundary(layer, "out")

    def _contribution(self, point: str, layer: int, module: nn.Module, side: str, scale: float) -> Hook:
        site = self._site(module, side)
        return Hook(f"blocks.{layer}.{point}", site, site, scale)

    def _attn_out_post(self, layer: int) -> Hook:
        norm = self.arch.post_attn_norm(layer)
        module, side = (norm, "output") if norm is not None else self.arch.attn_boundary(layer, "out")
        return self._contribution("attn_out_post", layer, module, side, self.arch.quirks.residual_multipliers[0])

    def _mlp_out_post(self, layer: int) -> Hook:
        norm = self.arch.post_mlp_norm(layer)
        module, side = (norm, "output") if norm is not None else self.arch.mlp_boundary(layer, "out")
        scale = self.arch.quirks.residual_multipliers[1]
        return self._kept(self._contribution("mlp_out_post", layer, module, side, scale))

    def _kept(self, hook: Hook) -> Hook:
        in_place = self.arch.quirks.parallel_attn_mlp and self.arch.architecture.startswith("Falcon")
        return replace(hook, view=Copied()) if in_place else hook

    def _resid_mid(self, layer: int) -> Hook:
        if self.arch.quirks.parallel_attn_mlp:
            raise ValueError(
                f"{self.arch.architecture} runs attention and MLP side by side on the same input, so there is "
                "no stream between them; use resid_pre or resid_post"
            )
        module, side = self._between(layer)
        write = self._attn_out_post(layer)
        return Hook(
            f"blocks.{layer}.resid_mid", self._site(module, side), write.write, write.scale,
            base=self.layer_hook("resid_pre", layer).read,
        )  # fmt: skip

    def _between(self, layer: int) -> tuple[nn.Module, str]:
        """Whose input is the stream between attention and MLP."""
        norm = self.arch.pre_mlp_norm(layer)
        if norm is not None:
            return norm, "input"
        if self.arch.post_mlp_norm(layer) is not None:
            # OLMo 2 and 3 norm only after their sublayers: the MLP reads the stream itself.
            return self.arch.mlp_boundary(layer, "in")
        block: Any = self.arch.block(layer)
        if getattr(block, "do_layer_norm_before", False) and hasattr(block, "final_layer_norm"):
            # OPT: the block's norm before its MLP has the name of other families' last norm.
            return block.final_layer_norm, "input"
        raise ValueError(
            f"no module of {self.arch.architecture}'s block reads the stream between attention and MLP; "
            "use resid_pre or resid_post"
        )
