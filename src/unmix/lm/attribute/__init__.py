"""Attribution: what latents do to the output, and what moves them.

Names load on first use, so that importing this room does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.lm.attribute.ablation import ablation_effect
    from unmix.lm.attribute.attributing import attribute, node_means
    from unmix.lm.attribute.circuits import Circuit, find_circuit, judge_circuit
    from unmix.lm.attribute.direct import direct_logits
    from unmix.lm.attribute.enrichment import as_token_set, token_set_enrichment, token_sets
    from unmix.lm.attribute.heads import head_sources
    from unmix.lm.attribute.jacobian import JacobianLens, fit_jacobian
    from unmix.lm.attribute.neighbours import decoder_neighbours
    from unmix.lm.attribute.result import Attribution, agreement

_NAMES = {
    "attribute": "unmix.lm.attribute.attributing",
    "node_means": "unmix.lm.attribute.attributing",
    "Attribution": "unmix.lm.attribute.result",
    "agreement": "unmix.lm.attribute.result",
    "Circuit": "unmix.lm.attribute.circuits",
    "find_circuit": "unmix.lm.attribute.circuits",
    "judge_circuit": "unmix.lm.attribute.circuits",
    "direct_logits": "unmix.lm.attribute.direct",
    "JacobianLens": "unmix.lm.attribute.jacobian",
    "fit_jacobian": "unmix.lm.attribute.jacobian",
    "token_set_enrichment": "unmix.lm.attribute.enrichment",
    "token_sets": "unmix.lm.attribute.enrichment",
    "as_token_set": "unmix.lm.attribute.enrichment",
    "decoder_neighbours": "unmix.lm.attribute.neighbours",
    "ablation_effect": "unmix.lm.attribute.ablation",
    "head_sources": "unmix.lm.attribute.heads",
}

__all__ = [
    "Attribution",
    "Circuit",
    "JacobianLens",
    "ablation_effect",
    "agreement",
    "as_token_set",
    "attribute",
    "decoder_neighbours",
    "direct_logits",
    "find_circuit",
    "fit_jacobian",
    "head_sources",
    "judge_circuit",
    "node_means",
    "token_set_enrichment",
    "token_sets",
]

_exports = lazy_exports(_NAMES)


def __getattr__(name: str) -> Any:
    return _exports(__name__, name)
