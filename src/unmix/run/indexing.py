"""From stored activations to the latent index."""

from __future__ import annotations

import shutil
from typing import Any

from unmix.core.errors import CorruptError
from unmix.index.building import build
from unmix.index.plan import Plan, plan_of
from unmix.index.shards import building_folder
from unmix.index.sources.opening import CoderAt, ModelAt, Opening, absolute, kept_recipe, recipe_of
from unmix.index.sources.stored import StoreSource
from unmix.run.context import RunContext
from unmix.train.store import ActivationStore


def build_run_index(context: RunContext, store: ActivationStore) -> None:
    """Encode every captured context with the run's coders; goes on where an earlier call was stopped."""
    recipe = _recipe(context)
    source = _source(context, store, recipe)
    _forget_another(context, source)
    build(
        context.index_folder, Opening(recipe, source), budget_bytes=context.config.index.budget,
        restart="index" in context.redo,
    )  # fmt: skip


def _source(context: RunContext, store: ActivationStore, recipe: dict[str, Any]) -> StoreSource:
    shards, coders = context.shards, context.coders
    meta = {
        "coder_hash": {name: coder.hash() for name, coder in coders.items()},
        "tokens_hash": shards.hash,
        "model": context.lm.fingerprint.model_dump(mode="json"),
        "hook": {name: coder.config.reads[0] for name, coder in coders.items()},
        "hooks": {name: list(coder.config.reads) for name, coder in coders.items()},
        "source": shards.source_report.get("name", context.config.data.source),
        "rebuild": kept_recipe(recipe, context.index_folder),
    }
    vocab = context.lm.token_strings(range(context.lm.vocab_size))
    return StoreSource(store, shards, coders, vocab, meta)


def _recipe(context: RunContext) -> dict[str, Any]:
    """How the source is opened when the cache of activations is gone: from the model."""
    spec = context.config.model
    dtype = str(context.lm.dtype).removeprefix("torch.")
    model = ModelAt(absolute(spec.name), dtype, spec.device, spec.revision, spec.trust_remote_code)
    places = {
        name: CoderAt(str(context.coder_folder(name).resolve()), coder.config.name)
        for name, coder in context.coders.items()
    }
    recipe = recipe_of("store", model, places, context.tokens_folder, context.config.capture.batch)
    return {**recipe, "seed": context.config.seed, "hooks": list(context.live_store.hooks)}


def _forget_another(context: RunContext, source: StoreSource) -> None:
    """A build that was begun with coders or activations that are not the run's any more is of no use."""
    building = building_folder(context.index_folder)
    if not building.is_dir():
        return
    try:
        same = Plan.read(building).key == plan_of(source).key
    except CorruptError:
        same = False
    if not same:
        shutil.rmtree(building)
