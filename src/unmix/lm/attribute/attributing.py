"""`unmix.attribute`: which latents, and how much of what coders miss, a metric comes from."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from unmix.core.errors import ConfigError, ModelError, did_you_mean
from unmix.core.policy import InputPolicy
from unmix.lm.attribute.baselines import Means, Nodes, make_nodes, mean_nodes
from unmix.lm.attribute.effects import gradient, integrated, patched
from unmix.lm.attribute.result import Attribution, Method, make_result
from unmix.lm.attribute.targets import Metric, Target, make_metric
from unmix.lm.attribute.wiring import Wiring, bare_metric, make_wiring
from unmix.lm.bound import BoundModel
from unmix.lm.forward import as_inputs

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel


def attribute(
    model: BoundModel | tuple[LanguageModel, Any],
    prompt: Any,
    target: Target = None,
    *,
    against: Target = None,
    metric: str | None = None,
    position: int = -1,
    method: str = "gradient",
    steps: int = 16,
    corrupt: Any = None,
    means: Means | None = None,
    batch: int = 16,
    limit: int | None = None,
) -> Attribution:
    """Effects of latents and error terms on a metric: m as it is − m with the node at its baseline.

    `model`: what `lm.bind(…)` gives, or `(lm, coders)`, which binds with the errors kept. With `error="keep"` the
    effects are those in the model as it is; with `"drop"` in the spliced model, without error terms.

    `prompt`: a text, texts of equally many tokens, or token ids [pos] or [batch, pos]. `target`: a token (text or
    id; default: the likeliest) or a function of logits [batch, pos, vocab] giving [batch]. `metric`: `logit`,
    `logprob`, `logit_difference` (with `against`) or `loss` of the prompt's own tokens; `position` is where the
    logits are read.

    `method`: `gradient` (slope × (value − baseline), one backward pass), `ig` (integrated gradients over `steps`
    points, group of coders by group; `completeness` says how well they add up), `patch` (measured, a pass for
    every node, `batch` at a time; `limit`: only the strongest by gradient). Baselines are 0, those of a `corrupt`
    prompt of as many tokens, or `means` from `node_means`.

    Raises `ModelError` or `ConfigError` before any pass where that can be known: an unknown method or metric, a target
    of several tokens, a prompt longer than the context or of another length than `corrupt`, a coder that does not fit.
    """
    chosen = check_method(method, steps, batch, limit)
    with wired(model) as (wiring, policy):
        tokens = prompt_tokens(wiring.lm, prompt, policy)
        other = None if corrupt is None else prompt_tokens(wiring.lm, corrupt, policy)
        measure, nodes = prepare(wiring, tokens, target, against, metric, position, other, means)
        if chosen == "gradient":
            effects = gradient(wiring, tokens, measure, nodes)
        elif chosen == "ig":
            effects = integrated(wiring, tokens, measure, nodes, steps)
        else:
            effects = patched(wiring, tokens, measure, nodes, batch, limit)
        bare = bare_metric(wiring, tokens, measure) if wiring.error == "drop" else None
        return make_result(wiring, tokens, measure.name, nodes, effects, chosen, bare)


def node_means(model: BoundModel | tuple[LanguageModel, Any], tokens: Tensor, batch: int = 8) -> Means:
    """Means of every latent and error over `tokens` [n, pos]: baselines for `attribute` and for circuits."""
    with wired(model) as (wiring, _):
        return mean_nodes(wiring, as_inputs(wiring.lm, tokens), batch)


def prepare(
    wiring: Wiring, tokens: Tensor, target: Target, against: Target, kind: str | None, position: int,
    corrupt: Tensor | None, means: Means | None,
) -> tuple[Metric, Nodes]:  # fmt: skip
    """The metric and the nodes of `tokens` [batch, pos]."""
    if corrupt is not None and corrupt.shape != tokens.shape:
        raise ConfigError(
            f"the corrupt prompt has {list(corrupt.shape)} tokens, the prompt {list(tokens.shape)}: "
            "patching needs one position for another"
        )
    measure = make_metric(wiring.lm, tokens, target, against, kind, position)
    return measure, make_nodes(wiring, tokens, measure, corrupt, means)


def check_method(method: str, steps: int, batch: int, limit: int | None) -> Method:
    """The method; `ConfigError` for what no attribution can be made with."""
    methods = get_args(Method)
    if method not in methods:
        raise ConfigError(f"method is {method!r}. {did_you_mean(method, methods)}")
    for name, value, least in (("steps", steps, 1), ("batch", batch, 1), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, found {value}")
    return cast("Method", method)


@contextmanager
def wired(model: BoundModel | tuple[LanguageModel, Any]) -> Generator[tuple[Wiring, InputPolicy]]:
    """The wiring of a binding, or of a fresh one with the errors kept."""
    if isinstance(model, BoundModel):
        yield make_wiring(model), model.policy
        return
    lm, coders = model
    with lm.bind(coders, error="keep") as bound:
        yield make_wiring(bound), bound.policy


def prompt_tokens(lm: LanguageModel, prompt: Any, policy: InputPolicy) -> Tensor:
    """Token ids [batch, pos]; `ModelError` for texts of different lengths, which have no common positions."""
    if not isinstance(prompt, (list, tuple)) or not prompt or not all(isinstance(p, str) for p in prompt):
        return as_inputs(lm, prompt, policy)
    texts: Sequence[str] = [str(p) for p in prompt]
    rows = [as_inputs(lm, text, policy) for text in texts]
    lengths = [row.shape[1] for row in rows]
    if len(set(lengths)) > 1:
        shown = ", ".join(f"{text!r}: {n}" for text, n in list(zip(texts, lengths))[:4])
        raise ModelError(f"the prompts differ in tokens ({shown}); give prompts of one length, or one at a time")
    return as_inputs(lm, torch.cat(rows))
