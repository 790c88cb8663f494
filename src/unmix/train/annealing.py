"""k-annealing: a coder begins with many latents a token and ends with its own k, so that few latents die early."""

from __future__ import annotations

from dataclasses import dataclass

from unmix.coder.config import BatchTopK, CoderConfig, TopK
from unmix.coder.encoder import make_encoder
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.train.config import OptimConfig


@dataclass(frozen=True)
class KAnnealing:
    """k falls geometrically from `first` to the coder's own over a share of the training. A function of that alone."""

    rule: TopK | BatchTopK
    first: int
    share: float

    @classmethod
    def of(cls, coder: CoderConfig, config: OptimConfig) -> KAnnealing | None:
        """None where the config asks for none. `ConfigError` where the coder has no k that could fall."""
        if config.k_start is None:
            return None
        rule = coder.activation
        if not isinstance(rule, (TopK, BatchTopK)):
            raise ConfigError(f"k_start belongs to topk and batchtopk coders, {coder.name} is {rule.kind}")
        if not rule.k < config.k_start <= coder.n_latents:
            raise ConfigError(
                f"k_start is {config.k_start}; {coder.name} has k = {rule.k} and {coder.n_latents} latents: "
                "it must lie above the one and not above the other"
            )
        return cls(rule, config.k_start, config.k_anneal)

    def k(self, progress: float) -> int:
        """k when a share `progress` of the training is done."""
        left = max(0.0, 1.0 - progress / self.share)
        return round(self.rule.k * (self.first / self.rule.k) ** left)

    def apply(self, coder: SparseCoder, progress: float) -> None:
        """Give the coder the encoder of that k; its config keeps its own."""
        coder.encoder = make_encoder(self.rule.model_copy(update={"k": self.k(progress)}))
