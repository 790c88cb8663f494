"""Hook names: the canonical strings, the field's aliases for them, and module paths.

Canonical: `blocks.L.POINT` (`blocks.6.resid_post`), `embeddings`, `final_norm`; a view of one (`unmix.lm.views`),
`blocks.8.resid_pre~centred`; one head of a point that is a row of heads, `blocks.5.z#3`. Any other module: `PATH@in` or
`PATH@out`. Aliases give the same hook: TransformerLens' names, `resid_post.6`, `layers.6`, `model.layers.6.output`,
`h.6`, `transformer.h.6`, `model.layers.6.mlp`, and the names of published formats (`unmix.formats.hook_names`).

The same name is not always the same tensor. TransformerLens' *block-level* `hook_mlp_out` and `hook_attn_out` are
what the sublayer adds to the stream (`mlp_out_post`, `attn_out_post`); a name that is a module (`layers.29.mlp`)
is that module's raw output. They differ by a norm on Gemma 2/3 and OLMo 2/3. `docs/hooks.md` has the whole table.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from unmix.core.errors import ModelError, nearest
from unmix.formats.hook_names import canonical
from unmix.lm.points import LAYER_POINTS, MODEL_POINTS, Hook, PointTable, split_name
from unmix.lm.sites import Dispatcher, Side, Site
from unmix.lm.views import VIEWS

_TLENS = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_in": "resid_pre", "hook_out": "resid_post",
    "hook_attn_out": "attn_out_post", "hook_mlp_out": "mlp_out_post",
    "attn.hook_in": "attn_in", "attn.hook_out": "attn_out", "attn.hook_z": "z", "hook_z": "z",
    "attn.o.hook_in": "z", "attn.o.hook_out": "attn_out",
    "mlp.hook_in": "mlp_in", "mlp.hook_out": "mlp_out", "mlp.hook_post": "mlp_act", "hook_post": "mlp_act",
    "mlp.out.hook_in": "mlp_act", "mlp.out.hook_out": "mlp_out",
    "ln1.hook_in": "resid_pre", "ln1.hook_out": "attn_in", "ln1.hook_normalized": "attn_in~normalised",
    "ln2.hook_in": "resid_mid", "ln2.hook_out": "mlp_in", "ln2.hook_normalized": "mlp_in~normalised",
    "ln1_post.hook_in": "attn_out", "ln1_post.hook_out": "attn_out_post",
    "ln1_post.hook_normalized": "attn_out_post~normalised",
    "ln2_post.hook_in": "mlp_out", "ln2_post.hook_out": "mlp_out_post",
    "ln2_post.hook_normalized": "mlp_out_post~normalised",
}  # fmt: skip
_TLENS_MODEL = {
    "hook_embed": "embeddings", "embed.hook_out": "embeddings", "unembed.hook_in": "final_norm",
    "ln_final.hook_out": "final_norm", "ln_final.hook_normalized": "final_norm~normalised",
}  # fmt: skip
_REFUSED = {
    "hook_mlp_in": "this is the stream before the norm; use resid_mid, or mlp_in for what the MLP is handed",
    "hook_attn_in": "this is the stream before the norm; use resid_pre, or attn_in for what attention is handed",
}
_MODULES = {
    "": ("resid_pre", "resid_post"), "mlp": ("mlp_in", "mlp_out"), "self_attn": ("attn_in", "attn_out"),
    "attn": ("attn_in", "attn_out"), "attention": ("attn_in", "attn_out"),
}  # fmt: skip
_LAYER = re.compile(
    r"^(?:(?:model|transformer|gpt_neox|decoder|language_model|base_model)\.)*(?:blocks|layers|layer|h)\.(\d+)(?:\.(.+))?$"
)
_POINT_FIRST = re.compile(rf"^({'|'.join(LAYER_POINTS)})\.(\d+)$")
_SIDES: dict[str, Side] = {"@in": "in", "@out": "out", ".input": "in", ".output": "out"}
# Where one site carries several points, the raw tensor's name is the canonical one for its module path.
_RAW_FIRST = ("resid_pre", "resid_post", "attn_in", "attn_out", "z", "mlp_in", "mlp_out", "mlp_act")


class HookNames:
    """Resolves the hook names of one model."""

    def __init__(self, model: nn.Module, points: PointTable | None) -> None:
        """`points` is `None` for a module whose parts have no known roles: only module paths work there."""
        self._dispatcher = Dispatcher(model)
        self._points = points
        self._names: list[str] | None = None
        self._by_site: dict[Site, Hook] | None = None

    @property
    def dispatcher(self) -> Dispatcher:
        """The permanent hooks behind the names."""
        return self._dispatcher

    def names(self) -> list[str]:
        """Every canonical name, in the order of the forward pass; of a plain module, both sides of each submodule."""
        if self._names is None:
            self._names = self._points.names() if self._points is not None else self._paths()
        return list(self._names)

    def resolve(self, spec: str) -> Hook:
        """The hook that `spec` names, canonical or alias.

        Raises `ModelError`: an unknown name (with the nearest real ones), a layer or head out of range, or a point
        that this model's family does not have, with the reason.
        """
        base, marker, head = spec.strip().partition("#")
        base, seen, view = base.partition("~")
        hook = self._named(base) or self._module(base) or self._foreign(base)
        if hook is None:
            raise ModelError(f"unknown hook {spec!r}. {self._suggest(base)}")
        if seen:
            hook = self._view(hook, view)
        return self._head(hook, head, spec) if marker else hook

    def _named(self, spec: str) -> Hook | None:
        if self._points is None:
            return None
        own = self._points.own(spec)
        try:
            found = self._point(self._points, _TLENS_MODEL.get(spec, spec))
        except ModelError:
            if own is None:
                raise
            found = None
        return found if found is not None or own is None else Hook(str(own), own, own)

    def _point(self, points: PointTable, spec: str) -> Hook | None:
        base, seen, view = spec.partition("~")
        if seen:
            hook = self._point(points, base)
            return None if hook is None else self._view(hook, view)
        if spec in MODEL_POINTS:
            return points.model_hook(spec)
        if spec == "ln_final.hook_in":
            return points.layer_hook("resid_post", points.n_layers - 1)
        if match := _POINT_FIRST.match(spec):
            return points.layer_hook(match[1], int(match[2]))
        return self._layer_name(points, spec)

    def _layer_name(self, points: PointTable, spec: str) -> Hook | None:
        name, side = _split_side(spec)
        match = _LAYER.match(name)
        if match is None:
            return None
        layer, rest = int(match[1]), match[2] or ""
        point = rest if rest in LAYER_POINTS else _TLENS.get(rest)
        if point is not None and name == spec:
            base, seen, view = point.partition("~")
            hook = points.layer_hook(base, layer)
            return self._view(hook, view) if seen else hook
        if rest in _REFUSED:
            raise ModelError(f"{spec}: {_REFUSED[rest]}")
        if rest in _MODULES and self._path_of(name) is None:
            return points.layer_hook(_MODULES[rest][side == "out"], layer)
        return None

    def _foreign(self, spec: str) -> Hook | None:
        """A name as a published format writes it, where no module of this model has it."""
        found = canonical(spec)
        return None if found == spec or self._points is None else self._point(self._points, found)

    def _view(self, hook: Hook, view: str) -> Hook:
        if self._points is None:
            raise ModelError(f"{hook.name}~{view}: only points of a language model have views ({', '.join(VIEWS)})")
        return self._points.view(hook, view)

    def _module(self, spec: str) -> Hook | None:
        """A module path of this model, as the point that lives there if one does."""
        name, side = _split_side(spec)
        path = self._path_of(name)
        if path is None:
            return None
        site = Site(path, side)
        return self._sites().get(site) or Hook(str(site), site, site)

    def _path_of(self, name: str) -> str | None:
        """`name` as a path from the model, which may have been given from the trunk (`layers.3.mlp`)."""
        trunk = "" if self._points is None else self._points.trunk
        for path in (name, f"{trunk}.{name}"):
            try:
                self._dispatcher.model.get_submodule(path)
            except AttributeError:
                continue
            return path if path else None
        return None

    def _sites(self) -> dict[Site, Hook]:
        if self._by_site is None:
            table: dict[Site, Hook] = {}
            if self._points is not None:
                for name in self.names():
                    point = name.rpartition(".")[2]
                    if point in _RAW_FIRST or point in MODEL_POINTS:
                        hook = self._named(name)
                        if hook is not None:
                            table.setdefault(hook.read, hook)
            self._by_site = table
        return self._by_site

    def _head(self, hook: Hook, head: str, spec: str) -> Hook:
        points = self._points
        point, layer = split_name(hook.name)
        if points is None or (point in (*LAYER_POINTS, *MODEL_POINTS) and point != "z"):
            raise ModelError(f"{spec}: only z and module paths of a language model are divided into heads")
        if not head.isdigit() or int(head) >= points.n_heads:
            raise ModelError(f"{spec}: no head {head!r}; this model has heads 0 to {points.n_heads - 1}")
        if hook.view is not None:
            raise ModelError(f"{spec}: a view has no heads; take the columns of the whole")
        size = points.z_head_dim(layer) if point == "z" else points.head_dim
        return replace(hook, name=f"{hook.name}#{int(head)}", head=int(head), head_size=size)

    def _paths(self) -> list[str]:
        return [f"{p}@{s}" for p, _ in self._dispatcher.model.named_modules() if p for s in ("in", "out")]

    def _suggest(self, spec: str) -> str:
        names = self.names()
        near = nearest(spec, dict.fromkeys([*names, *[n.partition("@")[0] for n in names]]))
        if near:
            return f"Nearest: {', '.join(near)}."
        shown = ", ".join(names[-4:])
        return f"Hooks look like {shown}; hooks() lists all {len(names)}."


def _split_side(spec: str) -> tuple[str, Side]:
    """A module path and the side it names (default: the output)."""
    for ending, side in _SIDES.items():
        if spec.endswith(ending):
            return spec.removesuffix(ending), side
    return spec, "out"
