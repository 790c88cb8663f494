"""Whether coders fit a model and each other, said before the model reads any text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, ModelError, did_you_mean
from unmix.core.policy import InputPolicy
from unmix.lm.binding import check_fingerprint
from unmix.lm.model import LanguageModel
from unmix.train.session import fitting_policy


def shared_policy(coders: Mapping[str, SparseCoder], tokenizer: Any, of: str | None = None) -> InputPolicy:
    """The input policy of all coders with its ids filled in, or that of the coder `of`.

    `ConfigError` naming what they disagree on; `DataError` where the tokenizer lacks an id that is needed.
    """
    if of is not None and of not in coders:
        raise ConfigError(f"--policy-of {of}: there is no such coder. {did_you_mean(of, coders)}")
    policies = {name: fitting_policy(coders[name].config.input_policy, tokenizer) for name in ([of] if of else coders)}
    (first, policy), *others = policies.items()
    for name, own in others:
        for field in InputPolicy.model_fields:
            if getattr(own, field) != getattr(policy, field):
                raise ConfigError(
                    f"coders disagree on how text is fed and which positions count: {field} is "
                    f"{getattr(policy, field)!r} for {first!r} and {getattr(own, field)!r} for {name!r}; index them "
                    f"apart, or take one's policy for all: --policy-of {first}"
                )
    return policy


def fit_coders(lm: LanguageModel, coders: Mapping[str, SparseCoder]) -> dict[str, tuple[str, ...]]:
    """Canonical names of the hooks that each coder reads.

    `ModelError`: a fingerprint that cannot be this model's, a hook that it lacks, a width that does not fit.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, coder in coders.items():
        check_fingerprint(lm, name, coder)
        hooks = tuple(lm.hook(spec).name for spec in coder.config.reads)
        widths = [lm.width(hook) for hook in hooks]
        if sum(widths) != coder.config.d_in:
            raise ModelError(
                f"coder {name!r} reads {coder.config.d_in} values at {' + '.join(hooks)}, which is "
                f"{' + '.join(map(str, widths))} wide in {lm.name}"
            )
        found[name] = hooks
    return found


def fit_packing(lm: LanguageModel, policy: InputPolicy) -> None:
    """`ModelError` where documents of one context cannot be kept apart, and must be."""
    if not policy.attend_across and lm.packing == "none":
        raise ModelError(
            f"{lm.name} cannot keep documents of one context apart, and the coders were trained so "
            "(attend_across: false)"
        )
