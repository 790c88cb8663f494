"""Warnings that save a run: each is said once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from unmix.train.learner import Learner, StepMetrics
from unmix.train.objectives.specs import GateSpec, L0Spec, L1Spec, TermSpec
from unmix.train.source import ActivationSource

log = logging.getLogger("unmix")

OUTLIERS = 0.001
"""Share of the rows that should not hold the variance."""
RISE = 1.5
"""Mean loss of a stretch over the lowest before it, from which on it is told."""


class Watch:
    """Looks at one coder's figures as they come."""

    def __init__(self, name: str, learner: Learner) -> None:
        self.name, self.steps = name, learner.steps
        self.n_latents = learner.coder.config.n_latents
        self.dense = learner.coder.config.d_in / 2
        self.target = target_l0(learner)
        self.stretch = max(20, learner.steps // 40)
        self.annealed = 0.0 if learner.annealing is None else learner.annealing.share
        self.moving = [span for term in learner.terms for span in moving(term.spec)]
        self.moving += [(0.0, self.annealed)] if self.annealed else []
        self._said: set[str] = set()
        self._losses: list[float] = []
        self._l0: list[float] = []
        self._lowest: float | None = None

    def restart(self) -> None:
        """The coder was changed by hand: compare with what comes from here on."""
        self._losses, self._l0, self._lowest = [], [], None

    def see(self, metrics: StepMetrics) -> None:
        """Take one step's figures into account, and warn where a stretch of steps looks wrong."""
        if 2 * metrics.dead > self.n_latents:
            self._say(
                "dead", "%s: %d of %d latents are dead at step %d: fewer latents, a lower --train.lr or a larger "
                "--train.auxk usually helps", metrics.dead, self.n_latents, metrics.step,
            )  # fmt: skip
        self._losses.append(metrics.loss)
        self._l0.append(metrics.l0)
        if len(self._losses) < self.stretch:
            return
        loss, l0 = _mean(self._losses), _mean(self._l0)
        self._losses, self._l0 = [], []
        self._check_loss(loss, metrics.step)
        self._check_l0(l0, metrics.step)

    def _check_loss(self, loss: float, step: int) -> None:
        """Between changes of the objective: while a weight ramps up or k falls, the loss rises by design."""
        began, now = (step - self.stretch) / self.steps, step / self.steps
        if any(first <= now and began <= last for first, last in self.moving):
            self._lowest = None
            return
        if self._lowest is not None and loss > RISE * self._lowest:
            self._say(
                "loss", "%s: the loss rises: %.4g over the last %d steps, %.4g at best (step %d): a lower --train.lr "
                "usually helps", loss, self.stretch, self._lowest, step,
            )  # fmt: skip
        self._lowest = loss if self._lowest is None else min(self._lowest, loss)

    def _check_l0(self, l0: float, step: int) -> None:
        if 2 * step < self.steps or (step - self.stretch) / self.steps < self.annealed:
            return
        if self.target is not None and not self.target / 2 <= l0 <= self.target * 2:
            self._say("l0", "%s: L0 is %.3g at step %d, far from the %g aimed at", l0, step, self.target)
        elif self.target is None and l0 > self.dense:
            self._say(
                "l0", "%s: L0 is %.3g at step %d, more than half the width of the input: a larger --train.sparsity "
                "makes it sparse", l0, step,
            )  # fmt: skip
        elif self.target is None and l0 < 1:
            self._say("l0", "%s: L0 is %.3g at step %d: a smaller --train.sparsity lets more latents fire", l0, step)

    def _say(self, what: str, words: str, *values: object) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning(words, self.name, *values)


def moving(spec: TermSpec) -> list[tuple[float, float]]:
    """Shares of the training `(from, to)` during which what a term adds to the loss changes by itself."""
    found: list[tuple[float, float]] = []
    if spec.start > 0 or spec.warmup > 0:
        found.append((spec.start, spec.start + spec.warmup))
    if spec.stop < 1:
        found.append((spec.stop, spec.stop))
    if isinstance(spec, GateSpec) and spec.sparsity_warmup > 0:
        found.append((0.0, spec.sparsity_warmup))
    if isinstance(spec, L1Spec) and spec.p_end is not None:
        found.append((0.0, 1.0))  # |f|^p of small f grows as p falls
    return found


def target_l0(learner: Learner) -> float | None:
    """The L0 that a coder is meant to have, where anything says so."""
    for term in learner.terms:
        if isinstance(term.spec, L0Spec) and term.spec.target is not None:
            return term.spec.target
    k = getattr(learner.coder.config.activation, "k", None)
    return float(k) if k is not None else None


@torch.no_grad()
def warn_of_outliers(name: str, source: ActivationSource, rows: int) -> None:
    """Say it where a few of the first rows hold most of the variance, as positions of massive activations (BOS) do."""
    x = source.batch(0, min(rows, source.n_rows))[0]
    if x.shape[0] < 100:
        return
    spread = (x - x.mean(0)).square().sum(-1).double()
    few = max(1, int(OUTLIERS * x.shape[0]))
    share = float(spread.topk(few).values.sum() / spread.sum().clamp_min(1e-300))
    if share > 0.5:
        log.warning(
            "%s: %d of the first %d rows hold%s %.0f %% of the variance, so the coder would learn little else. "
            "They are mostly positions of massive activations: mask them with --data.policy.skip_first or skip_ids",
            name, few, x.shape[0], "s" if few == 1 else "", 100 * share,
        )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
