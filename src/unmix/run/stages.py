"""The stages of a run: each small, each calling one room."""

from __future__ import annotations

import shutil

from unmix.core.atomic import write_json
from unmix.core.config import semantic_hash
from unmix.core.errors import ConfigError
from unmix.run.config import RunConfig
from unmix.run.context import RunContext
from unmix.run.walk import Stage, forget


def check_early(context: RunContext) -> None:
    """Everything about model, hook and coder that can be wrong, before any text is read."""
    config = context.config
    read, write = context.hooks
    d_in, d_out = context.lm.width(read), context.lm.width(write)
    config.coder.build(read, write, d_in, d_out, config.data.policy, context.lm.fingerprint)
    if not context.lm.has_tokenizer:
        raise ConfigError(f"model {config.model.name}: has no tokenizer, and text cannot be read without one")


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


def train(context: RunContext) -> None:
    """Activations to a coder folder."""
    from unmix.train.rows import RowSource
    from unmix.train.trainer import Trainer

    config = context.config
    read, write = context.hooks
    training = {
        "data": config.data.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "tokens_hash": context.shards.hash,
    }
    coder = config.coder.model_copy(update={"name": context.coder_name}).build(
        read, write, context.lm.width(read), context.lm.width(write), context.shards.policy, context.lm.fingerprint,
        training=training,
    )  # fmt: skip
    source = RowSource(context.store, context.shards, read, write, config.train.seed)
    key = semantic_hash(context.keys["train"], source.hash)
    trained = Trainer(coder, source, config.train, context.training_folder, key).run()
    trained.save(context.coder_folder)
    shutil.rmtree(context.training_folder / "checkpoint", ignore_errors=True)


def evaluate(context: RunContext) -> None:
    """Held-out figures of the coder and of the model with the coder spliced in."""
    from unmix.evaluate import evaluate as measure

    spec = context.config.evaluate
    result = measure(
        context.coder,
        context.lm,
        context.shards,
        tokens=spec.tokens,
        batch=spec.batch,
        ablations=spec.ablations,
        seed=context.config.seed,
    )
    write_json(context.evaluation_file, result.as_dict())


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
    return [config.coder.hook, config.coder.write, config.capture, config.seed]


STAGES: tuple[Stage, ...] = (
    Stage("tokens", tokens, _model, precious=True),
    Stage("activations", activations, _capture, ("tokens",), scratch=True),
    Stage("train", train, lambda c: [c.coder, c.train, c.seed], ("activations",), precious=True),
    Stage("evaluate", evaluate, lambda c: [c.evaluate], ("train",)),
    Stage("index", index, lambda c: [c.index], ("train", "activations")),
    Stage("explain", explain, lambda c: [c.explain], ("index",)),
    Stage("score", score, lambda c: [c.explain], ("explain",)),
    Stage("report", report, lambda c: [c.report], ("evaluate", "score")),
)
"""In the order they are walked."""
