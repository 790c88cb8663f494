"""The stages of a run: each small, each calling one room."""

from __future__ import annotations

import json
import shutil
from typing import Any

from unmix.core.atomic import write_json
from unmix.core.errors import ConfigError
from unmix.run.config import RunConfig
from unmix.run.context import RunContext
from unmix.run.walk import Stage, forget

AT_ONCE = 8
"""Coders measured side by side: they share the passes of the model as it is and of its ablations. A stopped evaluation
goes on behind those that were done."""


def check_early(context: RunContext) -> None:
    """Everything about model, hooks and coders that can be wrong, before any text is read."""
    from unmix.run.checking import require_objective
    from unmix.run.training import coder_configs
    from unmix.train.beginning import saved_start

    configs = coder_configs(context, context.config.data.policy)
    for name, member in context.members.items():
        require_objective(member, configs[name])
        if member.train.start_from is not None:
            saved_start(configs[name], member.train)
        for spec in member.train.objective or ():
            for hook in getattr(spec, "hooks", ()):
                context.lm.hook(hook)
    if not context.lm.has_tokenizer:
        raise ConfigError(f"model {context.config.model.name}: has no tokenizer, and text cannot be read without one")


def tokens(context: RunContext) -> None:
    """Text to token shards."""
    from unmix.data.corpora import find_source
    from unmix.data.tokenise import tokenise

    find_source(context.config.data)  # a wrong path is said before a model is loaded
    check_early(context)
    tokenise(context.config.data, context.lm.tokenizer, context.tokens_folder)


def activations(context: RunContext) -> None:
    """The model runs once over every context that training and index need."""
    from unmix.train.store import write_cache

    if context.config.capture.cache == "disk":
        write_cache(context.live_store, context.activations_folder)


def check_train(context: RunContext) -> None:
    """What can be refused before anything is loaded."""
    from unmix.run.checking import check_training

    check_training(context)


def train(context: RunContext) -> None:
    """Activations to coder folders."""
    from unmix.run.training import train_coders

    train_coders(context)


def evaluate(context: RunContext) -> None:
    """Held-out figures of the coder and of the model with the coder spliced in."""
    from unmix.evaluate import evaluate as measure
    from unmix.evaluate import evaluate_set

    spec, parts = context.config.evaluate, context.folder / "evaluations"
    if context.config.coder_set is not None:
        whole = evaluate_set(
            context.coders_as_set(), context.lm, context.shards, name=context.config.coder_set, tokens=spec.tokens,
            batch=spec.batch, ablations=spec.ablations, seed=context.config.seed,
        )  # fmt: skip
        write_json(context.evaluation_file, whole.as_dict())
        return
    known: dict[str, Any] = {}
    for name in context.coders:
        note = parts / f"{name}.json"
        before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if before.get("key") == context.keys["evaluate"]:
            known[name] = before["evaluation"]
    left = [name for name in context.coders if name not in known]
    for some in [left[i : i + AT_ONCE] for i in range(0, len(left), AT_ONCE)]:
        measured = measure(
            {name: context.coders[name] for name in some},
            context.lm,
            context.shards,
            tokens=spec.tokens,
            batch=spec.batch,
            ablations=spec.ablations,
            seed=context.config.seed,
        )
        for name, one in measured.items():
            known[name] = one.as_dict()
            write_json(parts / f"{name}.json", {"key": context.keys["evaluate"], "evaluation": known[name]})
    found = {name: known[name] for name in context.coders}
    one = context.config.coder is not None
    write_json(context.evaluation_file, next(iter(found.values())) if one else {"schema": 1, "coders": found})
    shutil.rmtree(parts)  # they only let a stopped evaluation of many go on where it was


def index(context: RunContext) -> None:
    """Every latent's evidence over the captured contexts."""
    from unmix.run.indexing import build_run_index

    build_run_index(context, context.store)
    if not context.config.capture.keep:
        forget(context.folder, "activations")
        shutil.rmtree(context.activations_folder, ignore_errors=True)


def explain(context: RunContext) -> None:
    """Names for the chosen latents."""
    from unmix.run.explaining import explain_run

    explain_run(context)


def score(context: RunContext) -> None:
    """Scores for the names."""
    from unmix.run.explaining import score_run

    score_run(context)


def report(context: RunContext) -> None:
    """The static report."""
    from unmix.run.reporting import write_run_report

    write_run_report(context)


def _model(config: RunConfig) -> list[object]:
    return [config.model, config.data]


def _capture(config: RunConfig) -> list[object]:
    pairs = dict.fromkeys((member.spec.hook, member.spec.write) for member in config.members().values())
    hooks = [list(pair) for pair in pairs]  # whatever the number of coders there, the model runs once
    return [*hooks[0], config.capture, config.seed] if config.coder else [hooks, config.capture, config.seed]


def _training(config: RunConfig) -> list[object]:
    together = [config.coder_set] if config.coder_set else []
    return [config.coder or config.coders, config.train, config.seed, *together]


STAGES: tuple[Stage, ...] = (
    Stage("tokens", tokens, _model, precious=True),
    Stage("activations", activations, _capture, ("tokens",), scratch=True),
    Stage("train", train, _training, ("activations",), precious=True, check=check_train),
    Stage("evaluate", evaluate, lambda c: [c.evaluate], ("train",)),
    Stage("index", index, lambda c: [c.index], ("train", "activations")),
    Stage("explain", explain, lambda c: [c.explain], ("index",)),
    Stage("score", score, lambda c: [c.explain], ("explain",)),
    Stage("report", report, lambda c: [c.report], ("evaluate", "score")),
)
"""In the order they are walked."""
