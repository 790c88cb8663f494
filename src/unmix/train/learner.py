"""One coder under training: its weights, optimiser, counters and loss. The loop around it is the trainer's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.coder.config import CoderConfig
from unmix.coder.sparse import sparse_decode
from unmix.coder.sparse_coder import SparseCoder
from unmix.train.annealing import KAnnealing
from unmix.train.checkpoint import Saved, TrainState, restore
from unmix.train.config import OptimConfig, holds_unit_norm
from unmix.train.guard import FaultError, bad_rows, finite, loudest_rows
from unmix.train.initialise import initialise
from unmix.train.objectives import Step, Term, total
from unmix.train.objectives.specs import MseSpec
from unmix.train.optimisers import finish, make_optimiser
from unmix.train.schedule import lr_factor
from unmix.train.source import ActivationSource
from unmix.train.spaces import inner_target


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one step: loss, every term's unweighted value, L0, fraction of variance unexplained, dead count."""

    step: int
    loss: float
    terms: dict[str, float]
    l0: float
    fvu: float
    dead: int
    lr: float

    def record(self) -> dict[str, Any]:
        """A flat JSON-able record."""
        terms = {f"loss/{name}": value for name, value in self.terms.items()}
        return {
            "step": self.step, "loss": self.loss, "l0": self.l0, "fvu": self.fvu, "dead": self.dead, "lr": self.lr,
            **terms,
        }  # fmt: skip


BY_RANK = ("topk", "batchtopk", "groupmax")
INIT_ROWS = 4096
"""Rows encoded at a time while first weights are fitted."""


class Learner:
    """Everything that changes while one coder is trained, and how a batch changes it."""

    def __init__(
        self, coder: SparseCoder, state: TrainState, config: OptimConfig, terms: list[Term], steps: int
    ) -> None:
        """`steps` is the length of the whole training, for schedules."""
        self.coder, self.state, self.config, self.terms, self.steps = coder, state, config, terms, steps
        self.optimiser = make_optimiser(coder, config)
        self.unit_norm = holds_unit_norm(coder.config.activation.kind, config)
        self.mse_is_fvu = any(isinstance(term.spec, MseSpec) and not term.spec.prefixes for term in terms)
        self.annealing = KAnnealing.of(coder.config, config)
        self._anneal()
        coder.train()

    @classmethod
    def fresh(
        cls, config: CoderConfig, source: ActivationSource, optim: OptimConfig, terms: list[Term], steps: int
    ) -> Learner:
        """First weights from the first rows of `source`."""
        coder, variance = initialise(config, source, optim)
        state = TrainState(0, torch.zeros(config.n_latents, dtype=torch.int64), variance)
        learner = cls(coder, state, optim, terms, steps)
        fit_length(learner, source)
        return learner

    @classmethod
    def resumed(cls, saved: Saved, config: OptimConfig, terms: list[Term], steps: int) -> Learner:
        """As the checkpoint left it."""
        learner = cls(SparseCoder(saved.config), saved.state, config, terms, steps)
        restore(learner.coder, learner.optimiser, saved)
        return learner

    def forward(self, x: Tensor, target: Tensor) -> Step:
        """Encode and decode a batch of raw rows, in the coder's inner space."""
        coder = self.coder
        s, context = coder.prepare(x)
        codes = coder.encoder.codes(coder, s, None)
        y = sparse_decode(codes.values, coder.W_dec, codes.indices, codes.offsets).add_(coder.b_dec)
        if coder.config.skip:
            y = y + s @ coder.W_skip.T
        wanted = inner_target(coder.config, s, target, context)
        dead = (self.state.tokens_since_fired >= self.config.dead_after).nonzero().squeeze(-1)
        return Step(coder, s, wanted, codes, y, self.state.variance, dead, self.state.step / self.steps)

    def loss(self, batch: Step) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the terms and each one's value. `FaultError` where it or the input is not finite."""
        if not (finite(batch.x) and (batch.target is batch.x or finite(batch.target))):
            raise self._not_finite("input", math.nan, bad_rows(batch.x, batch.target))
        loss, values = total(self.terms, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._not_finite("loss", value, loudest_rows(batch))
        return loss, values

    def clip(self) -> None:
        """Project and clip the gradients that are there. `FaultError` where they are not finite."""
        if self.unit_norm:
            project_decoder_gradient(self.coder)
        total = torch.nn.utils.get_total_norm([p.grad for p in self.coder.parameters() if p.grad is not None])
        norm, most = float(total), self.config.clip
        if not math.isfinite(norm):
            raise self._not_finite("gradient's norm", norm)
        # A pass over all gradients that most steps of a training can do without.
        if most and norm > most * (1 - 1e-6):
            torch.nn.utils.clip_grads_with_norm_(self.coder.parameters(), most, total)

    def skip(self) -> None:
        """Leave this step out: no weight moves, the schedule does."""
        self.optimiser.zero_grad(set_to_none=True)
        self.state.skipped += 1
        self.state.step += 1
        self._anneal()

    def finish(self) -> SparseCoder:
        """The coder as it is used from now on."""
        finish(self.optimiser)
        return self.coder.eval()

    def apply(self, batch: Step, loss: float, values: dict[str, float]) -> StepMetrics:
        """Take the optimiser's step for clipped gradients, and count what fired."""
        factor = lr_factor(self.state.step, self.steps, self.config.warmup, self.config.decay)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * factor
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.unit_norm:
            normalise_decoder(self.coder)
        keep_thresholds(self.coder)
        self._count(batch)
        return StepMetrics(
            self.state.step, loss, values, int(batch.codes.values.count_nonzero()) / batch.codes.rows,
            values["mse"] if self.mse_is_fvu and "mse" in values else batch.fvu(),
            int(batch.dead.numel()), self.config.lr * factor,
        )  # fmt: skip

    def _not_finite(self, what: str, value: float, rows: Sequence[int] = ()) -> FaultError:
        return FaultError(self.coder.name, what, value, self.state.step + 1, self.config.lr, rows)

    @torch.no_grad()
    def _count(self, batch: Step) -> None:
        counters, codes = self.state.tokens_since_fired, batch.codes
        counters += codes.rows
        counters[fired_latents(codes)] = 0
        if self.coder.config.activation.kind == "batchtopk":
            update_threshold(self.coder, batch)
        self.state.step += 1
        self._anneal()

    def _anneal(self) -> None:
        """The k of the next step; after the last one the coder's own."""
        if self.annealing is not None:
            self.annealing.apply(self.coder, self.state.step / self.steps)


@torch.no_grad()
def fit_length(learner: Learner, source: ActivationSource) -> None:
    """Give a fresh encoder the length with which its codes come nearest to the first rows, by least squares.

    k random rows that all point towards an input add up to more than it where k is large against d (2.5 times too long
    at k 32, d 128), and training would spend its first hundreds of steps on shortening them. Only for kinds that select
    by rank, where the length of pre-activations changes nothing of which latents fire, and whose first decoder rows
    are their encoder's.
    """
    coder = learner.coder
    if coder.config.activation.kind not in BY_RANK or coder.config.reads != coder.config.writes:
        return
    x, target = source.batch(0, min(learner.config.init_rows, source.n_rows))
    up = down = 0.0
    for rows, wanted in zip(x.split(INIT_ROWS), target.split(INIT_ROWS), strict=True):
        step = learner.forward(rows, wanted)
        y = step.reconstruction - coder.b_dec
        up += float((y * (step.target - coder.b_dec)).sum())
        down += float(y.square().sum())
    if up > 0 and down > 0:
        # Three digits are enough, and the same whatever the order in which ranks have added up.
        coder.W_enc.mul_(float(f"{up / down:.3g}"))


@torch.no_grad()
def project_decoder_gradient(coder: SparseCoder) -> None:
    """Take out of the decoder's gradient what points along each (unit) row."""
    grad = coder.W_dec.grad
    if grad is not None:
        # A few rows at a time: the products stay in the cache, and no second gradient's worth of memory is needed.
        step = max(1, 2**18 // grad.shape[1])
        for part, rows in zip(grad.split(step), coder.W_dec.split(step), strict=True):
            part.addcmul_(rows, (part * rows).sum(-1, keepdim=True), value=-1)


def fired_latents(codes: Codes) -> Bool[Tensor, " latents"]:
    """Which latents have a value other than zero somewhere."""
    values = codes.values.detach()
    whole = int(values.count_nonzero()) == len(values)
    indices = codes.indices if whole else codes.indices[values != 0]
    return torch.bincount(indices, minlength=codes.n_latents) > 0


@torch.no_grad()
def normalise_decoder(coder: SparseCoder) -> None:
    """Decoder rows back to norm 1."""
    coder.W_dec.div_(coder.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))


@torch.no_grad()
def keep_thresholds(coder: SparseCoder) -> None:
    """θ of a jumprelu coder back to 0 where it fell below: codes are positive, and its gradient would turn round."""
    if coder.config.activation.kind == "jumprelu":
        coder.extra()["threshold"].clamp_(min=0.0)


@torch.no_grad()
def update_threshold(coder: SparseCoder, batch: Step, momentum: float = 0.99) -> None:
    """Running mean of the batch's smallest kept gate value (2412.06410 §3.2); the first such batch sets it."""
    values = batch.codes.values
    if values.numel() == 0:
        return
    scale = coder.gate_factor()
    gate = values if scale is None else values * scale[batch.codes.indices.long()]
    threshold = coder.extra()["threshold"]
    smallest = gate.min()
    threshold.copy_(smallest if threshold < 0 else momentum * threshold + (1 - momentum) * smallest)
