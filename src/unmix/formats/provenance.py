"""Where a coder came from, kept in its config; and what a release knows that the files do not say."""

from __future__ import annotations

from typing import Any

from unmix.coder.config import CoderConfig
from unmix.core.policy import ModelFingerprint
from unmix.core.seeds import slug
from unmix.formats.draft import Draft
from unmix.formats.place import Place

UNKNOWN = ("input",)
"""What a coder reads where its files do not say."""


def with_origin(draft: Draft, place: Place, format: str) -> Draft:
    """The draft with `training["source"]` (format, place, revision), its hook and model filled in from the release."""
    if format.startswith("native"):
        return draft
    facts: dict[str, Any] = dict(place.origin.get("release") or {})
    source = {"format": format, **place.origin}
    if place.origin.get("scheme", "local") == "local":
        # A path of this machine says nothing to whom the coder is given, and may say too much.
        source["place"] = place.file or place.folder.name
    published = {k: facts[k] for k in ("l0", "fvu") if facts.get(k) is not None}
    training = {**draft.config.training, "source": source}
    if published:
        training["published"] = {**published, **training.get("published", {})}
    changes: dict[str, Any] = {"training": training}
    if draft.config.model is None and facts.get("model"):
        changes["model"] = ModelFingerprint(name=str(facts["model"]))
    changes |= _hooks(draft.config, facts)
    return Draft(draft.config.model_copy(update=changes), draft.state, draft.statistics)


def _hooks(config: CoderConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Reads and writes from the release, where the files say neither, or not which view of the hook it is."""
    known = str(facts.get("hook") or "")
    seen_as = len(config.reads) == 1 and known.startswith(f"{config.reads[0]}~")
    if not known or (config.reads != UNKNOWN and not seen_as):
        return {}
    reads = (known,)
    return {
        "reads": reads,
        "writes": (str(facts.get("hook_out") or reads[0]),),
        "name": slug(reads[0]) if config.name == slug(UNKNOWN[0]) else config.name,
    }
