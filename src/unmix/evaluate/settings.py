"""What an evaluation says about itself, so that its numbers can be read and made again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.core.progress import log
from unmix.evaluate.contexts import Contexts
from unmix.evaluate.local import coder_facts, interval_facts
from unmix.lm.model import LanguageModel
from unmix.lm.splice import Binding

ABLATIONS = {
    "zero": "the activation becomes 0 at unmasked positions",
    "mean": "the activation becomes its mean over the unmasked positions of this evaluation",
}

_POSITIONS = (
    "Masked positions are not spliced or ablated, not counted by local metrics, and nothing predicted from them is "
    "scored. A prediction is scored where it is made from an unmasked position that has a next token in its "
    "context, whatever that token is (masked ids and the start of another document included). ce_orig is over the "
    "same predictions."
)


@dataclass(frozen=True)
class Options:
    """How to evaluate; checked as it is made (`ConfigError`)."""

    role: str
    ablations: tuple[str, ...]
    batch: int | None
    seed: int
    resamples: int
    level: float

    def __post_init__(self) -> None:
        """Bad input is refused before any work starts."""
        unknown = [name for name in self.ablations if name not in ABLATIONS]
        if unknown:
            raise ConfigError(f"evaluate: unknown ablation {unknown[0]!r}; allowed: {', '.join(ABLATIONS)}")
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"evaluate: batch must be at least 1, found {self.batch}")
        if self.resamples < 1 or not 0 < self.level < 1:
            raise ConfigError(
                f"evaluate: need resamples >= 1 and 0 < level < 1, found {self.resamples} and {self.level}"
            )


@dataclass(frozen=True)
class Scope:
    """How much was read."""

    contexts: int
    tokens: int
    tokens_counted: int
    """Unmasked positions."""
    predictions: int


def settings_of(
    lm: LanguageModel, coder: SparseCoder, binding: Binding, source: Contexts, options: Options, scope: Scope
) -> dict[str, Any]:
    """Model, coder, hooks, data, mask, counts, error mode, ablations and intervals, as JSON values."""
    policy, own = source.policy, coder.config.input_policy
    matches = policies_agree(policy.model_dump(), own.model_dump())
    if not matches:
        log.warning("evaluate: %s was made under another input policy than these tokens", coder.name)
    return {
        "model": {**lm.fingerprint.model_dump(mode="json"), "dtype": str(lm.dtype).removeprefix("torch.")},
        "coder": coder_facts(coder),
        "hooks": {"reads": [h.name for h in binding.reads], "writes": [h.name for h in binding.writes]},
        "data": {"hash": source.hash, "role": options.role, "context": source.context},
        "contexts": scope.contexts,
        "tokens": scope.tokens,
        "tokens_counted": scope.tokens_counted,
        "predictions": scope.predictions,
        "mask": {"skip_first": policy.skip_first, "skip_ids": list(policy.skip_ids)},
        "policy": policy.model_dump(mode="json"),
        "policy_is_the_coders": matches,
        "positions": _POSITIONS,
        "error": "drop",
        "variance": "about the mean over the unmasked positions of this evaluation",
        "ablations": {name: ABLATIONS[name] for name in options.ablations},
        "recovered": "ce_recovered and kl_recovered are against zero ablation; other ablations' carry their name",
        "units": "nats a token",
        "alive": f"alive_fraction: fired at least once in {scope.tokens_counted} tokens",
        "interval": interval_facts(options.seed, options.resamples, options.level),
    }


def policies_agree(found: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether two input policies say the same; an id left open agrees with any."""
    return all(value == own[key] or (key.endswith("_id") and None in (value, own[key])) for key, value in found.items())
