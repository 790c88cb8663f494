"""TransformerLens models, `HookedTransformer` (to 3.x) and `TransformerBridge` (from 3.x), under our names and theirs.

A model of either kind has a `cfg` and a `hook_dict` that maps its hook names to modules which only pass tensors on.
Nothing of the package is imported: a model is told by those two.

On a model whose weights were folded and centred (TransformerLens' default for `HookedTransformer`), the points are the
tensors that *this* model has: what its attention and MLP are handed is not multiplied by a gain any more, its stream
has no mean over the width, its `z` has no value bias.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from unmix.core.errors import ModelError
from unmix.core.policy import ModelFingerprint
from unmix.lm.points import LAYER_POINTS, MODEL_POINTS, NORMED_POINTS, Hook, centred, no_view, split_name
from unmix.lm.sites import Site
from unmix.lm.views import CENTRED, NORMALISED, UNBIASED

# Hook names of each point, the first that a model has counts: those of `HookedTransformer`, then the bridge's.
_HOOKS = {
    "resid_pre": ("hook_resid_pre",),
    "attn_in": ("attn.hook_in",),
    "z": ("attn.hook_z",),
    "attn_out": ("attn.hook_out",),
    "attn_out_post": ("hook_attn_out",),
    "resid_mid": ("hook_resid_mid",),
    "mlp_in": ("mlp.hook_in",),
    "mlp_act": ("mlp.hook_post",),
    "mlp_out": ("mlp.hook_out",),
    "mlp_out_post": ("hook_mlp_out",),
    "resid_post": ("hook_resid_post",),
}
# Where `HookedTransformer` has no hook but a module.
_MODULES = {"attn_in": ("ln1", "out"), "attn_out": ("attn", "out"), "mlp_in": ("mlp", "in"), "mlp_out": ("mlp", "out")}
# Where the bridge's MLP is a stand-in for projections that a block holds itself (OPT), whose own hooks 3.x never calls.
_INLINED = {"mlp_in": ("mlp.in.hook_in",), "mlp_out": ("mlp.out.hook_out",)}
_NORMS = {"attn_in": "ln1", "mlp_in": "ln2", "attn_out_post": "ln1_post", "mlp_out_post": "ln2_post"}


def find_lens(model: nn.Module) -> Any | None:
    """`model` where it is TransformerLens', else `None`."""
    sizes = ("n_layers", "d_model", "n_heads", "d_head", "d_vocab")
    config: Any = getattr(model, "cfg", None)
    known = isinstance(getattr(model, "hook_dict", None), dict) and all(hasattr(config, size) for size in sizes)
    return model if known and hasattr(model, "blocks") else None


class LensPoints:
    """The points of a TransformerLens model. Layers count from 0."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cfg = model.cfg
        self._paths: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            before = self._paths.get(id(module))
            # A bridge's parts are in the tree twice: by their own names and inside the model they wrap.
            if before is None or ("_original_component" in before and "_original_component" not in path):
                self._paths[id(module)] = path

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self._cfg.n_layers)

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return int(self._cfg.n_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self._cfg.d_head)

    @property
    def trunk(self) -> str:
        """Nothing: blocks are at the top."""
        return ""

    def z_head_dim(self, layer: int) -> int:
        """Width of a head of `z`."""
        return self.head_dim

    def own(self, spec: str) -> Site | None:
        """The module behind a hook name of the model's."""
        hook = self._model.hook_dict.get(spec)
        path = None if hook is None else self._paths.get(id(hook))
        return None if path is None else Site(path, "out")

    def layer_hook(self, point: str, layer: int) -> Hook:
        """The hook of a point at a layer; `ModelError` where this model has no such tensor."""
        name = f"blocks.{layer}.{point}"
        if not 0 <= layer < self.n_layers:
            raise ModelError(f"{name}: there is no layer {layer}; this model has layers 0 to {self.n_layers - 1}")
        if point == "resid_mid" and bool(getattr(self._cfg, "parallel_attn_mlp", False)):
            raise ModelError(
                f"{name}: attention and MLP run side by side on the same input, so there is no stream between them; "
                "use resid_pre or resid_post"
            )
        site = self._site(point, layer)
        if site is None:
            raise ModelError(f"{name}: this TransformerLens model has no hook for it")
        if point == "resid_mid" and not self._has_stream_hook(layer):
            # The bridge's hook is the input of the norm: writing there would miss the stream beside it.
            write = self.layer_hook("attn_out_post", layer)
            return Hook(name, site, write.write, base=self.layer_hook("resid_pre", layer).read)
        return Hook(name, site, site, heads_apart=point == "z")

    def model_hook(self, point: str) -> Hook:
        """The hook `embeddings` or `final_norm`."""
        if point == "embeddings":
            site = self.own("hook_embed")
        else:
            site = self.own("ln_final.hook_out") or (Site("ln_final", "out") if self._has("ln_final") else None)
        if site is None:
            raise ModelError(f"{point}: this TransformerLens model has no hook for it")
        return Hook(point, site, site)

    def view(self, hook: Hook, name: str) -> Hook:
        """`hook` through a view; `ModelError` where there is no such view of it."""
        point, layer = split_name(hook.name)
        if name == CENTRED:
            try:
                return hook.seen_as(name, centred(point))
            except ValueError as error:
                raise ModelError(f"{hook.name}~{name}: {error}") from None
        if name == UNBIASED and point == "z":
            raise ModelError(f"{hook.name}~{name}: on a TransformerLens model, fold_value_biases says which z it has")
        if name == NORMALISED:
            norm = "ln_final" if point == "final_norm" else f"blocks.{layer}.{_NORMS.get(point, '')}"
            site = self.own(f"{norm}.hook_normalized")
            if site is None:
                raise ModelError(
                    f"{hook.name}~{name}: only what comes out of a norm has a normalised view: "
                    f"{', '.join(NORMED_POINTS)}"
                )
            return Hook(f"{hook.name}~{name}", site, site)
        raise no_view(hook.name, point, name)

    def names(self) -> list[str]:
        """Canonical names of every point that this model has, in the order of the forward pass."""
        found: list[str] = [*MODEL_POINTS[:1]]
        for layer in range(self.n_layers):
            for point in LAYER_POINTS:
                try:
                    found.append(self.layer_hook(point, layer).name)
                except ModelError:
                    continue
        return [*found, *MODEL_POINTS[1:]]

    def _has(self, path: str) -> bool:
        return any(known == path for known in self._paths.values())

    def _site(self, point: str, layer: int) -> Site | None:
        adds = self.own(f"blocks.{layer}.hook_mlp_out")
        inlined = adds is not None and adds.path.endswith(".mlp.out.hook_out")
        for name in (*(_INLINED.get(point, ()) if inlined else ()), *_HOOKS[point]):
            site = self.own(f"blocks.{layer}.{name}")
            if site is not None:
                return site
        if point in _MODULES:
            part, side = _MODULES[point]
            path = f"blocks.{layer}.{part}"
            return Site(path, "in" if side == "in" else "out") if self._has(path) else None
        return None

    def _has_stream_hook(self, layer: int) -> bool:
        """Whether `hook_resid_mid` is on the stream itself, as in `HookedTransformer`."""
        site = self.own(f"blocks.{layer}.hook_resid_mid")
        return site is not None and site.path == f"blocks.{layer}.hook_resid_mid"


def lens_logits(model: Any, x: Tensor) -> Tensor:
    """Logits of the stream after the last block of a TransformerLens model: its final norm, its head, its soft cap."""
    logits = cast("Tensor", model.unembed(model.ln_final(x)))
    cap = float(getattr(model.cfg, "output_logits_soft_cap", -1.0) or -1.0)
    return torch.tanh(logits / cap) * cap if cap > 0 else logits


def lens_name(model: Any) -> str:
    """What a TransformerLens model says it is."""
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def lens_fingerprint(model: Any, name: str) -> ModelFingerprint:
    """The fingerprint of a TransformerLens model, its family under Hugging Face's name where that is known."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = model.cfg
    built = getattr(config, "original_architecture", None) or getattr(config, "architecture", None)
    families = {architecture: family for family, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    return ModelFingerprint(
        name=name, family=families.get(str(built), str(built)), n_layers=int(config.n_layers),
        d_model=int(config.d_model), vocab_size=int(config.d_vocab),
    )  # fmt: skip
