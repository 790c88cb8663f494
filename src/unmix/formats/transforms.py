"""Named transforms between a published layout and the coder's own: of one tensor, and of a whole state.

A key map names a tensor transform for each stored tensor; each has its inverse, so one map serves reading and
writing. State transforms rewrite weights without changing what the coder computes, save where it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig

State = dict[str, Tensor]


@dataclass(frozen=True)
class Transform:
    """From the stored tensor to the coder's, and back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


def _transpose(t: Tensor) -> Tensor:
    return t.T


TRANSFORMS: Mapping[str, Transform] = {
    "same": Transform(_same, _same),
    "transpose": Transform(_transpose, _transpose),
    "exp": Transform(torch.exp, torch.log),
}


def fold_decoder_norm(state: State) -> State:
    """Decoder rows at unit norm, their norms moved into the encoder: codes become z·‖w_dec‖, outputs stay.

    A gate in decoder-norm space becomes a raw gate with the same threshold. A row of zeros stays one, and its
    latent, whose gate was always 0, never fires again.
    """
    norms = state["W_dec"].norm(dim=-1)
    safe = torch.where(norms > 0, norms, 1.0)
    return {
        **state,
        "W_enc": state["W_enc"] * norms[:, None],
        "b_enc": state["b_enc"] * norms,
        "W_dec": state["W_dec"] / safe[:, None],
    }


def fold_input_bias(state: State, bias: Tensor) -> State:
    """A bias subtracted from the input, moved into the encoder's: W(x − b) + c = Wx + (c − Wb)."""
    return {**state, "b_enc": state["b_enc"] - state["W_enc"] @ bias}


def fold_scales(state: State, config: CoderConfig) -> State:
    """Fixed input and output scales moved into the weights; the input bias must have been folded or be scaled back.

    Holds with `pre_bias: none`. Codes and outputs stay.
    """
    inside, outside = config.input_scale, config.output_scale
    folded = {**state, "W_enc": state["W_enc"] * inside, "W_dec": state["W_dec"] * outside,
              "b_dec": state["b_dec"] * outside}  # fmt: skip
    if "W_skip" in state:
        folded["W_skip"] = state["W_skip"] * (inside * outside)
    return folded
