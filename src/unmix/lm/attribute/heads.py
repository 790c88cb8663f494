"""Direct feature attribution: which heads and source positions a latent at `z` fires because of.

z of a head at a position is Σ over sources k of A[k] v[k]: with the attention pattern A as it is, a latent's
pre-activation is a sum over (head, source) pairs (Kissane et al. 2024, arXiv 2406.17759). The pattern is read off as a
gradient (z is linear in the values), so any attention kernel will do and nothing is recomputed by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ModelError
from unmix.lm.attribute.direct import check_latents
from unmix.lm.forward import as_inputs, attach_read, attach_write, run
from unmix.lm.points import Hook, split_name
from unmix.lm.sites import Pass, Site
from unmix.lm.splice import make_bindings

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel


@dataclass(frozen=True)
class HeadSources:
    """The pre-activation of one latent at one position, split over heads and sources."""

    latent: int
    position: int
    contributions: Tensor
    """[heads, sources], float32."""
    rest: float
    """Biases, and what normalising the input takes off: pre_activation − Σ contributions."""
    pre_activation: float
    tokens: list[str]

    def top(self, n: int = 10) -> list[tuple[int, int, str, float]]:
        """(head, source position, its token, contribution), largest by absolute value first."""
        flat = self.contributions.reshape(-1)
        order = flat.abs().topk(min(n, len(flat))).indices.tolist()
        length = self.contributions.shape[1]
        return [(i // length, i % length, self.tokens[i % length], float(flat[i])) for i in order]


def head_sources(lm: LanguageModel, coder: SparseCoder, latent: int, prompt: Any, position: int = -1) -> HeadSources:
    """Which heads bring a latent of an attention coder (one that reads `z` alone) what it fires on, from where.

    Attention patterns and, of a coder that normalises, the norm of the input stay as they are. Raises `ModelError`:
    another kind of coder, several prompts, a position outside the prompt, a family whose values cannot be found.
    """
    check_latents(coder, latent)
    (binding,) = make_bindings(lm, {"coder": coder})
    hook = binding.reads[0]
    point, layer = split_name(hook.name)
    if len(binding.reads) != 1 or point != "z" or hook.head is not None or coder.encoder.sequential:
        raise ModelError(f"coder {coder.name!r} reads {', '.join(h.name for h in binding.reads)}; DFA is of one z")
    if coder.config.activation.kind == "matching_pursuit":
        raise ModelError(f"coder {coder.name!r} chooses latents one after the other: a pre-activation is no sum")
    tokens = as_inputs(lm, prompt, coder.config.input_policy)
    if len(tokens) != 1 or not -tokens.shape[1] <= position < tokens.shape[1]:
        raise ModelError(f"DFA takes one prompt and a position inside it, found {list(tokens.shape)} and {position}")
    place = position % tokens.shape[1]
    pattern, values, z = attention_at(lm, layer, hook, tokens, place)
    W = _input_direction(coder, latent, z)
    heads, sources = pattern.shape
    size = z.shape[-1] // heads
    directions = W.view(heads, size)
    per_head = values.repeat_interleave(heads // values.shape[1], dim=1)
    contributions = pattern * torch.einsum("khs,hs->hk", per_head, directions)
    with torch.no_grad():
        _, pre = coder.encode(z[None].to(coder.dtype), return_pre=True)
    whole = float(pre[0, latent])
    strings = lm.token_strings(tokens[0]) if lm.has_tokenizer else [f"[{i}]" for i in tokens[0].tolist()]
    total = float(contributions.double().sum())
    return HeadSources(latent, place, contributions.float().cpu(), whole - total, whole, strings[:sources])


def attention_at(
    lm: LanguageModel, layer: int, z_hook: Hook, tokens: Tensor, place: int
) -> tuple[Float[Tensor, "heads sources"], Float[Tensor, "sources kv size"], Float[Tensor, " d"]]:
    """The attention pattern of one position, the values it weighs, and z there; of one context [1, pos].

    z = Σ_k pattern[h, k] · values[k, group of h], which is checked: `ModelError` where a family does more than that.
    """
    arch: Any = lm.points.arch
    try:
        module = arch.value_module(layer)
        fused = arch.fused_qkv_module(layer) if module is None else None
        module = module or fused or arch.v_proj(layer)
        kv, size = arch.kv_heads_for_layer(layer), arch.value_head_dim_for_layer(layer)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"blocks.{layer}.z: {error}") from None
    if module is None:
        raise ModelError(f"blocks.{layer}.z: {arch.architecture} has no value projection whose output could be read")
    path = next(name for name, found in lm.model.named_modules() if found is module)
    site = Site(path, "out")
    leaves: list[Tensor] = []
    seen: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_())
        return leaves[0]

    def prepare(current: Pass) -> None:
        attach_write(current, Hook(str(site), site, site), leaf)
        attach_read(current, z_hook, seen.append)

    with torch.enable_grad():
        run(lm, tokens, prepare, logits=False)
        z = seen[0][0, place]
        heads = z.shape[-1] // size
        rows: list[Tensor] = []
        for head in range(heads):
            # One coordinate of a head: its gradient holds the head's pattern at the same coordinate of the values.
            (slope,) = torch.autograd.grad(z[head * size], leaves, retain_graph=head + 1 < heads)
            rows.append(_values(arch, slope, fused is not None, kv, size)[..., 0].sum(-1))
    values = _values(arch, leaves[0].detach(), fused is not None, kv, size)
    pattern = torch.stack(rows).float()
    z = z.detach().float()
    again = torch.einsum("hk,khs->hs", pattern, values.float().repeat_interleave(heads // kv, dim=1)).reshape(-1)
    if not torch.allclose(again, z, rtol=0.03, atol=0.03 * float(z.abs().max())):
        raise ModelError(f"blocks.{layer}.z: {arch.architecture}'s heads are not weighted sums of values alone")
    return pattern, values.float(), z


def _values(arch: Any, tensor: Tensor, fused: bool, kv: int, size: int) -> Float[Tensor, "sources kv size"]:
    """The values' part of a projection's output [1, pos, …]."""
    if fused:
        from interp_engine.facts import split_qkv_slab

        tensor = split_qkv_slab(
            tensor, layout=arch.quirks.qkv_layout, n_heads=arch.n_heads, n_kv_heads=kv, head_dim=arch.head_dim
        )["v"]
    return tensor.reshape(tensor.shape[1], kv, size)


@torch.no_grad()
def _input_direction(coder: SparseCoder, latent: int, z: Tensor) -> Tensor:
    """How the latent's pre-activation moves with z [d] at fixed norms [d]."""
    w = coder.W_enc[latent].float().to(z.device) * coder.config.input_scale
    rule = coder.config.normalise
    if rule.kind == "standardise":
        w = w * coder.norm_scale.to(z.device)
    elif rule.kind == "constant_norm":
        w = w / (z.norm() / z.shape[-1] ** 0.5)
    elif rule.kind == "layer_norm":
        w = (w - w.mean()) / (z.std(correction=rule.ddof) + rule.eps)
    return w
