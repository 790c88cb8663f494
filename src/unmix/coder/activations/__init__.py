"""One small file an activation, all of the same shape; `ACTIVATIONS` maps a config's kind to its class."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from unmix.coder.activations.selection import Selector
from unmix.core.plugins import Registry

ACTIVATIONS = Registry(
    "unmix.activations",
    "activation",
    {
        "topk": "unmix.coder.activations.topk:TopKActivation",
        "batchtopk": "unmix.coder.activations.batchtopk:BatchTopKActivation",
        "jumprelu": "unmix.coder.activations.jumprelu:JumpReLUActivation",
        "groupmax": "unmix.coder.activations.groupmax:GroupMaxActivation",
        "gated": "unmix.coder.activations.gated:GatedActivation",
        "relu": "unmix.coder.activations.relu:ReLUActivation",
        "identity": "unmix.coder.activations.identity:IdentityActivation",
    },
)


class ActivationRule(Protocol):
    """What turns pre-activations into codes: a selection without gradients, then values with them."""

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """Initial extra tensors of the coder, by name (trained if they are floating and per latent)."""
        ...

    def selector(self, extra: dict[str, Tensor], rows: int, training: bool) -> Selector:
        """A fresh selector for a batch of `rows` tokens."""
        ...

    def values(self, z: Tensor, indices: Tensor, scale: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        """Code values [nnz] from the selected pre-activations.

        `scale` [F] is the gate's factor, if any; `extra` holds the rule's own tensors and `b_enc`.
        """
        ...

    def dense(self, z: Tensor, scale: Tensor | None, extra: dict[str, Tensor], training: bool) -> Tensor:
        """The plain reference: dense codes [rows, F] from dense pre-activations, by autograd."""
        ...


def make_activation(config: Any) -> ActivationRule:
    """The rule behind an activation config."""
    rule: ActivationRule = ACTIVATIONS.get(config.kind)(config)
    return rule
