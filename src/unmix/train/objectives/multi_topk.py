"""Multi-TopK: the error with several times as many latents a token (Gao et al. 2024, arXiv 2406.04093 §4.3)."""

from __future__ import annotations

from torch import Tensor

from unmix.coder.activations import make_activation
from unmix.coder.codes import Codes
from unmix.coder.config import BatchTopK, CoderConfig, TopK
from unmix.coder.encoder import AffineEncoder
from unmix.coder.sparse import sparse_affine
from unmix.core.errors import ConfigError
from unmix.train.objectives import Step
from unmix.train.objectives.decoding import decoded
from unmix.train.objectives.specs import MultiTopKSpec


class MultiTopK:
    """mean ‖x − x̂_{factor·k}‖² / variance. Gradients reach every latent that takes part.

    Costs a second encoder product: the batch is scored again.
    """

    name = "multi_topk"

    def __init__(self, spec: MultiTopKSpec, coder: CoderConfig) -> None:
        """`ConfigError` for a coder without k."""
        if not isinstance(coder.activation, (TopK, BatchTopK)):
            raise ConfigError(
                f"the term multi_topk belongs to topk and batchtopk coders, {coder.name} is {coder.activation.kind}"
            )
        self.spec = spec

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        return step.error(decoded(step, self.codes(step)))

    def codes(self, step: Step) -> Codes:
        """The wider codes: `factor` times the k of now, all latents at most."""
        coder, encoder = step.coder, step.coder.encoder
        if not isinstance(encoder, AffineEncoder):
            raise TypeError(f"{coder.name}: {type(encoder).__name__} has no k to widen")
        now: TopK | BatchTopK = encoder.config
        rule = make_activation(now.model_copy(update={"k": min(self.spec.factor * now.k, coder.n_latents)}))
        scale, extra = coder.gate_factor(), encoder.extra(coder)
        selector = rule.selector(extra, len(step.x), True)
        z, indices, offsets = sparse_affine(step.x, coder.W_enc, coder.b_enc, coder.input_bias(), scale, selector)
        values = rule.values(z, indices, scale, extra)
        return Codes(indices, values, offsets, coder.n_latents, (len(step.x),), selector.uniform_k)
