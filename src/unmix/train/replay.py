"""A step that went wrong, taken again: the state before it is kept, and every number of it can be looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unmix.core.atomic import write_json
from unmix.core.errors import ConfigError
from unmix.train.checkpoint import Parts, Saved, load_checkpoint, save_checkpoint
from unmix.train.feeds import Feed
from unmix.train.guard import FaultError, Traceable, bad_rows, finite
from unmix.train.learner import Learner
from unmix.train.objectives import Step

FOLDER = "replay"
NOTE = "replay.json"


def write_replay(
    folder: Path, key: str, parts: Parts, faults: Mapping[str, FaultError], places: Mapping[str, list[dict[str, int]]]
) -> Path:
    """Keep the weights and optimisers as they were before the step, and note what was wrong with it."""
    save_checkpoint(folder / FOLDER, key, parts)
    note = {
        "step": next(iter(faults.values())).step,
        "faults": [{**fault.record(), "places": places.get(name, [])} for name, fault in faults.items()],
    }
    write_json(folder / NOTE, note)
    return folder / NOTE


def replay(learners: Mapping[str, Learner], feed: Feed, batch: int, folder: Path) -> dict[str, Any]:
    """Take the step in `folder` again without changing anything, and report on it coder by coder.

    `learners` stand where `saved_step` says. The report names rows that are not finite, every term's value, and the
    gradient of every parameter: its norm, or how many of its numbers are none.
    """
    at = next(iter(learners.values())).state.step
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    coders: dict[str, Any] = {}
    for part in feed.steps(at, batch, learners):
        coders |= {name: _report(learners[name], step, feed, at, batch) for name, step in part.items()}
    return {"step": at + 1, "noted": note["faults"], "coders": coders}


def saved_step(folder: Path) -> dict[str, Saved]:
    """The coders as they stood before the step. `ConfigError` where no step went wrong."""
    found = load_checkpoint(folder / FOLDER, None)
    if found is None:
        raise ConfigError(f"{folder}: no step of this training went wrong, so there is none to take again")
    return found


def _report(learner: Learner, step: Step, feed: Feed, at: int, size: int) -> dict[str, Any]:
    rows = bad_rows(step.x, step.target)
    report: dict[str, Any] = {
        "input finite": finite(step.x) and finite(step.target),
        "largest input": _shown(step.x.abs().max()),
        "rows": rows,
        "places": feed.places(at, size, rows) if rows and isinstance(feed, Traceable) else [],
        "codes finite": finite(step.codes.values),
        "largest code": _shown(step.codes.values.abs().max()) if step.codes.values.numel() else "0",
    }
    terms: dict[str, str] = {}
    loss = step.reconstruction.new_zeros(())
    for term in learner.terms:
        factor = term.spec.weight * term.spec.ramp(step.progress)
        if factor:
            value = term(step)
            terms[term.name] = _shown(value)
            loss = loss + factor * value
    report["terms"] = terms
    report["loss"] = _shown(loss)
    loss.backward()
    gradients: dict[str, str] = {}
    for name, p in learner.coder.named_parameters():
        if p.grad is not None:
            wrong = int((~torch.isfinite(p.grad)).sum())
            gradients[name] = f"{wrong} of {p.grad.numel()} are none" if wrong else f"norm {_shown(p.grad.norm())}"
    report["gradients"] = gradients
    return report


def _shown(value: torch.Tensor) -> str:
    return f"{float(value.detach()):.6g}"
