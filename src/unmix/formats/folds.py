"""Folds: a coder said in another way that computes the same outputs. Each says what becomes of the codes.

They rewrite config and tensors together. What no fold can say exactly is refused with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmix.coder.config import BatchTopK, Gated, GroupMax, JumpReLU, Normalise, TopK
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.lazy import Lazy, apply

UNREACHABLE = torch.finfo(torch.float32).max
"""The threshold of a latent that can never fire."""


def replace_config(draft: Draft, **changes: Any) -> Draft:
    """The draft with other config fields."""
    return Draft(draft.config.model_copy(update=changes), dict(draft.state), draft.statistics)


def batchtopk_as_jumprelu(draft: Draft) -> Draft:
    """What a batch top-k coder is at inference: one learnt threshold. Codes and outputs stay.

    `FormatError` where the threshold was never calibrated.
    """
    if not isinstance(draft.config.activation, BatchTopK):
        return draft
    if float(draft.state["threshold"]()) < 0:
        raise FormatError(
            f"{draft.config.name}: this batchtopk coder's threshold was never calibrated, so there is none to write"
        )
    n = draft.config.n_latents
    changed = replace_config(draft, activation=JumpReLU())
    changed.state["threshold"] = apply(lambda t: t.expand(n), draft.state["threshold"])
    return changed


def gate_to_raw(draft: Draft) -> Draft:
    """A gate on z times a factor of each latent's, moved into the thresholds. Codes and outputs stay.

    `FormatError` for kinds that rank latents against each other (top-k, batch top-k, group-max, keep_max).
    """
    config = draft.config
    if config.gate_space == "raw":
        return draft
    ranks = isinstance(config.activation, (TopK, BatchTopK, GroupMax))
    if ranks or (isinstance(config.activation, JumpReLU) and config.activation.keep_max):
        raise FormatError(
            f"{config.name}: {config.activation.kind} ranks latents by z times {_named(config.gate_space)}, which "
            "cannot be said on z alone"
        )
    changed = replace_config(draft, gate_space="raw")
    if isinstance(config.activation, JumpReLU):
        changed.state["threshold"] = apply(_divided, draft.state["threshold"], gate_factor(draft))
    changed.state.pop("gate_scale", None)
    return changed


def gate_factor(draft: Draft) -> Lazy:
    """What the gate multiplies z by [F]."""
    config = draft.config
    if config.gate_space == "own":
        return draft.state["gate_scale"]
    if config.gate_space == "decoder_norm_sum":
        widths = list(config.parts())
        return apply(
            lambda W: torch.stack([p.norm(dim=-1) for p in W.split(widths, dim=-1)]).sum(0), draft.state["W_dec"]
        )
    return apply(lambda W: W.norm(dim=-1), draft.state["W_dec"])


def unit_decoder(draft: Draft) -> Draft:
    """Decoder rows at unit norm, their norms moved into the encoder: codes become z·‖w_dec‖, outputs stay.

    A gate in decoder-norm space becomes a raw one with the same thresholds; raw thresholds are multiplied by the norms.
    A row of zeros stays one, and its latent, which wrote nothing, never fires again. `FormatError` where raw z are
    ranked against each other.
    """
    config, state = draft.config, draft.state
    if config.gate_space not in ("raw", "decoder_norm"):
        return unit_decoder(gate_to_raw(draft))
    if config.gate_space == "raw" and isinstance(config.activation, (TopK, BatchTopK, GroupMax)):
        raise FormatError(
            f"{config.name}: {config.activation.kind} ranks latents by z, and folding decoder norms would rank them by "
            "z times the norm"
        )
    norms = apply(lambda W: W.norm(dim=-1), state["W_dec"])
    changed = replace_config(draft, gate_space="raw")
    changed.state["W_dec"] = apply(lambda W, n: W / torch.where(n > 0, n, 1.0)[:, None], state["W_dec"], norms)
    if isinstance(config.activation, Gated):
        # A factor of 0 has no logarithm: a row of zeros gets a magnitude that stays below 0.
        changed.state["r_mag"] = apply(lambda r, n: torch.where(n > 0, r + n.log(), -99.0), state["r_mag"], norms)
        changed.state["b_mag"] = apply(lambda b, n: torch.where(n > 0, b * n, -1.0), state["b_mag"], norms)
        return changed
    changed.state["W_enc"] = apply(lambda W, n: W * n[:, None], state["W_enc"], norms)
    changed.state["b_enc"] = apply(torch.mul, state["b_enc"], norms)
    if isinstance(config.activation, JumpReLU) and config.gate_space == "raw":
        changed.state["threshold"] = apply(torch.mul, state["threshold"], norms)
    return changed


def fold_input_bias(draft: Draft) -> Draft:
    """A bias subtracted from the input, moved into the encoder's: W(x − b) + c = Wx + (c − Wb). Codes, outputs stay."""
    config, state = draft.config, draft.state
    if config.pre_bias == "none":
        return draft
    bias = state["b_dec"] if config.pre_bias == "tied" else state["b_pre"]
    changed = replace_config(draft, pre_bias="none")
    changed.state.pop("b_pre", None)
    moved = apply(torch.mv, state["W_enc"], bias)
    changed.state["b_enc"] = apply(torch.sub, state["b_enc"], moved)
    if isinstance(config.activation, Gated):
        changed.state["b_mag"] = apply(lambda b, r, m: b - r.exp() * m, state["b_mag"], state["r_mag"], moved)
    return changed


def fold_scales(draft: Draft) -> Draft:
    """Fixed scales and a fixed standardisation, moved into weights and biases. Codes and outputs stay.

    A coder without any is not touched; of others the input bias is folded first. A gate in a space of decoder norms
    becomes one in a space of its own (then `gate_to_raw`), since the norms change.
    """
    fixed = draft.config.normalise.kind == "standardise"
    if not fixed and draft.config.input_scale == draft.config.output_scale == 1.0:
        return draft
    draft = fold_input_bias(draft)
    config, state = draft.config, draft.state
    changed = replace_config(draft, input_scale=1.0, output_scale=1.0)
    if config.gate_space in ("decoder_norm", "decoder_norm_sum"):
        changed = replace_config(changed, gate_space="own")
        changed.state["gate_scale"] = gate_factor(draft)
    mean, inside, outside = _affine(draft)
    if fixed:
        changed = replace_config(changed, normalise=Normalise())
        del changed.state["norm_mean"], changed.state["norm_scale"]
    W_enc = changed.state["W_enc"] = apply(torch.mul, state["W_enc"], inside)
    moved = apply(torch.mv, W_enc, mean)
    changed.state["b_enc"] = apply(torch.sub, state["b_enc"], moved)
    if isinstance(config.activation, Gated):
        changed.state["b_mag"] = apply(lambda b, r, m: b - r.exp() * m, state["b_mag"], state["r_mag"], moved)
    changed.state["W_dec"] = apply(torch.mul, state["W_dec"], outside)
    b_dec = apply(torch.mul, state["b_dec"], outside)
    if config.skip:
        W_skip = apply(lambda W, i, o: o[:, None] * W * i, state["W_skip"], inside, outside)
        changed.state["W_skip"] = W_skip
        b_dec = apply(lambda b, W, m: b - torch.mv(W, m), b_dec, W_skip, mean)
    changed.state["b_dec"] = apply(torch.add, b_dec, mean) if fixed and config.normalise.restore else b_dec
    return changed


def _affine(draft: Draft) -> tuple[Lazy, Lazy, Lazy]:
    """Of the fixed input map in·(x − mean): mean [d_in], in [d_in]; and out [d_out], the output's factor."""
    config = draft.config
    inside, outside = config.input_scale, config.output_scale
    if config.normalise.kind != "standardise":
        return (
            Lazy.of(torch.zeros(config.d_in)), Lazy.of(torch.full((config.d_in,), inside)),
            Lazy.of(torch.full((config.width_out,), outside)),
        )  # fmt: skip
    scale = draft.state["norm_scale"]
    back = (lambda s: outside / s) if config.normalise.restore else (lambda s: torch.full_like(s, outside))
    return draft.state["norm_mean"], apply(lambda s: s * inside, scale), apply(back, scale)


def _divided(threshold: Tensor, factor: Tensor) -> Tensor:
    """θ / factor; a latent whose factor is 0 never passed a gate, unless every threshold is below 0 too."""
    return torch.where(factor > 0, threshold / torch.where(factor > 0, factor, 1.0), UNREACHABLE)


def _named(space: str) -> str:
    return {"own": "a stored factor", "decoder_norm": "the decoder norm"}.get(space, "the sum of its decoder norms")
