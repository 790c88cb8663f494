"""A few thousand tokens of any text, to measure a coder on."""

from __future__ import annotations

import itertools

from jaxtyping import Int
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.core.errors import ConfigError
from unmix.core.policy import InputPolicy
from unmix.data.config import DataConfig
from unmix.lm.model import LanguageModel
from unmix.train.session import fitting_context, fitting_policy, stack, stream_contexts, trained_data

SOURCE = "builtin:python-docs"
TOKENS = 8192


def sample_tokens(
    lm: LanguageModel,
    source: str = SOURCE,
    tokens: int = TOKENS,
    context: int | None = None,
    policy: InputPolicy | None = None,
) -> Int[Tensor, "n context"]:
    """The first `tokens` tokens of a text in whole contexts (at least one), documents packed, BOS as `policy` says.

    `source` as `DataConfig.source`. `context` defaults to 128, or what the model takes. Where the policy wants a BOS
    that neither it nor the tokenizer knows, there is none. `DataError` where there is no text, or not one context of
    it; `ConfigError` where `context` is more than the model takes.
    """
    size = fitting_context(context, None, lm)
    if tokens < 1:
        raise ConfigError(f"tokens must be at least 1, found {tokens}")
    fitted = fitting_policy(policy or InputPolicy(), lm.tokenizer)
    config = DataConfig(source=source, tokens=size, context=size, roles={"evaluate": 1.0}, policy=fitted)
    wanted = max(1, tokens // size)
    return stack(itertools.islice(stream_contexts(config, lm.tokenizer), wanted), config)


def context_of(config: CoderConfig, lm: LanguageModel) -> int:
    """Tokens a context that the coder was trained on, 128 where its files do not say; at most what the model takes."""
    stated = trained_data(config).get("context")
    return fitting_context(None, stated if isinstance(stated, int) else None, lm)
