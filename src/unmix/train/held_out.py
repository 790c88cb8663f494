"""Figures on rows that are not trained on, while the training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unmix.train.curves import HELD_OUT
from unmix.train.feeds import Feed
from unmix.train.learner import Learner


@torch.no_grad()
def measure(learners: Mapping[str, Learner], feed: Feed, rows: int) -> dict[str, dict[str, float]]:
    """FVU and L0 of every coder on the first `rows` rows of `feed`, coded as in use; nothing of the training moves."""
    found: dict[str, dict[str, float]] = {}
    for learner in learners.values():
        learner.coder.eval()
    try:
        for part in feed.steps(0, min(rows, feed.n_rows), learners):
            for name, step in part.items():
                error = (step.target - step.reconstruction).double().square().sum()
                spread = (step.target - step.target.mean(0)).double().square().sum()
                found[name] = {
                    f"{HELD_OUT}fvu": float(error / spread.clamp_min(1e-300)),
                    f"{HELD_OUT}l0": float(step.codes.l0().double().mean()),
                }
    finally:
        for learner in learners.values():
            learner.coder.train()
    return found
