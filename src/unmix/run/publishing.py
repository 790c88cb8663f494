"""The finished coders of a run on the Hugging Face hub: asked about before it begins, pushed when they are there."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from unmix.core.atomic import write_json
from unmix.core.errors import FormatError, ServiceError, did_you_mean
from unmix.formats.publishing import push_to_hub, require_access
from unmix.formats.registry import FORMATS, format_of
from unmix.run.config import PublishConfig, TrainConfig
from unmix.run.context import RunContext
from unmix.run.walk import stamp_of
from unmix.train.trackers import secret

if TYPE_CHECKING:
    from unmix.coder.coder_set import CoderSet
    from unmix.coder.sparse_coder import SparseCoder

log = logging.getLogger("unmix")
NOTE = "published.json"
TOKEN = "HF_TOKEN"


def check_publishing(config: TrainConfig) -> None:
    """Refuse a format that is not written and a hub that takes no token of ours; nothing is written there yet.

    `FormatError`, or `ServiceError` where the hub does not answer.
    """
    spec = config.publish
    if spec is None:
        return
    names = [name for name in FORMATS.names() if format_of(name).writable]
    allowed = ["native"] if config.coder_set else ["native", *names]
    if spec.format not in allowed:
        raise FormatError(f"publish.format: {spec.format!r} cannot be written. {did_you_mean(spec.format, allowed)}")
    try:
        who = require_access(spec.hub, secret(TOKEN))
    except ServiceError as error:
        raise ServiceError(f"{error}; without publish the run begins, and --push-to-hub can be said later") from error
    log.info("publish: to %s, as %s", spec.hub, who)


def publish(context: RunContext) -> None:
    """Push what is trained and was not pushed there yet; nothing where the run does not ask for it.

    `ServiceError` or `FormatError` of a hub that refuses says that the run itself is whole.
    """
    spec, stamp = context.config.publish, stamp_of(context.folder, "train")
    if spec is None or stamp is None or stamp["key"] != context.keys.get("train"):
        return  # what lies there, if anything, is not what this config says
    note = context.training_folder / NOTE
    done: dict[str, Any] = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    for name, coder in _published(context).items():
        fact = {"hash": _hash(coder), **spec.model_dump(mode="json")}
        if {key: done.get(name, {}).get(key) for key in fact} == fact:
            log.info("publish: %s is at %s already", name, done[name]["address"])
            continue
        try:
            address = _push(context, spec, name, coder)
        except (FormatError, ServiceError) as error:
            raise type(error)(f"{error}. The run is whole: the same command pushes again and trains nothing") from error
        done[name] = {**fact, "address": address}
        write_json(note, done)
        log.info("publish: %s is at %s", name, address)


def _published(context: RunContext) -> Mapping[str, SparseCoder | CoderSet]:
    """What goes up, by name: every coder, or the set that they are."""
    if context.config.coder_set is None:
        return context.coders
    return {context.config.coder_set: context.coders_as_set()}


def _push(context: RunContext, spec: PublishConfig, name: str, coder: SparseCoder | CoderSet) -> str:
    several = len(_published(context)) > 1
    path = "/".join(part for part in (spec.path.strip("/"), name if several else "") if part)
    return push_to_hub(
        coder, spec.hub, path_in_repo=path, format=spec.format, private=spec.private, revision=spec.revision,
        token=secret(TOKEN), figures=_figures(context, name),
    )  # fmt: skip


def _figures(context: RunContext, name: str) -> dict[str, float]:
    """What the evaluation measured, where it was walked."""
    if not context.evaluation_file.is_file():
        return {}
    metrics = context.evaluations().get(name, {}).get("metrics", {})
    shown = ("fvu", "l0", "ce_orig", "ce_spliced", "ce_recovered", "kl_spliced", "alive_fraction")
    found = {key: metrics.get(key, {}).get("value") for key in shown}
    return {key: float(value) for key, value in found.items() if value is not None}


def _hash(coder: SparseCoder | CoderSet) -> str:
    from unmix.coder.coder_set import CoderSet

    return " ".join(one.hash() for one in coder.values()) if isinstance(coder, CoderSet) else coder.hash()
