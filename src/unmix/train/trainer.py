"""The trainer: one loop for every objective. State is weights, Adam's moments, firing counts and one step number."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse import sparse_decode
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.atomic import sweep
from unmix.core.errors import ConfigError, DataError, NonFiniteError
from unmix.core.progress import task
from unmix.train.checkpoint import TrainState, load_checkpoint, restore, save_checkpoint
from unmix.train.config import OptimConfig
from unmix.train.initialise import initialise
from unmix.train.metrics_log import MetricsLog
from unmix.train.objectives import Step, Term, total
from unmix.train.objectives.auxk import AuxK
from unmix.train.objectives.mse import MSE
from unmix.train.objectives.sparsity import L0, L1
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


def make_terms(coder: CoderConfig, config: OptimConfig) -> list[Term]:
    """The local objective: reconstruction, AuxK where asked, the activation's own sparsity penalty."""
    terms: list[Term] = [MSE()]
    if config.auxk > 0:
        terms.append(AuxK(config.auxk, config.k_aux or max(1, coder.d_in // 2)))
    if config.sparsity > 0 and coder.activation.kind not in ("relu", "jumprelu"):
        raise ConfigError(
            f"sparsity is {config.sparsity:g}, but {coder.activation.kind} coders have no penalty: k sets their L0"
        )
    if config.sparsity > 0 and coder.activation.kind == "relu":
        terms.append(L1(config.sparsity))
    if config.sparsity > 0 and coder.activation.kind == "jumprelu":
        terms.append(L0(config.sparsity, coder.activation.bandwidth))
    return terms


class Trainer:
    """Trains one coder on one source; resumes by itself from `folder/checkpoint`."""

    def __init__(self, coder: CoderConfig, source: ActivationSource, config: OptimConfig, folder: Path, key: str):
        """`key` is the hash of everything that the result depends on; a checkpoint of another key is refused."""
        self.config, self.source, self.folder, self.key = config, source, folder, key
        self.terms = make_terms(coder, config)
        self.steps = total_steps(config, source.n_rows)
        sweep(folder / "checkpoint")
        found = load_checkpoint(folder / "checkpoint", key)
        if found is None:
            self.coder, variance = initialise(coder, source, config)
            self.state = TrainState(0, torch.zeros(coder.n_latents, dtype=torch.int64), variance)
        else:
            self.coder, self.state = SparseCoder(found[0]), found[2]
        self.optimiser = torch.optim.Adam(
            [p for p in self.coder.parameters() if p.requires_grad], lr=config.lr, betas=config.betas, fused=True
        )
        if found is not None:
            restore(self.coder, self.optimiser, found[1])
        self.coder.train()

    def run(self) -> SparseCoder:
        """Train to the end and return the coder in evaluation mode.

        Raises `NonFiniteError` as soon as a loss is not finite: nothing of that step is saved.
        """
        log = MetricsLog(self.folder / "metrics.jsonl", self.state.step)
        timings = MetricsLog(self.folder / "timings.jsonl", self.state.step)
        done = self.state.step * self.config.batch
        with task("train", self.steps * self.config.batch, done=done) as bar:
            began, first = time.monotonic(), self.state.step
            while self.state.step < self.steps:
                metrics = self.step()
                if metrics.step % self.config.log_every == 0 or metrics.step == self.steps:
                    log.write(metrics.record())
                    speed = (metrics.step - first) * self.config.batch / (time.monotonic() - began)
                    timings.write({"step": metrics.step, "tokens_per_second": round(speed, 1)})
                bar.advance(self.config.batch, f"fvu {metrics.fvu:.3f} l0 {metrics.l0:.1f} dead {metrics.dead}")
                if metrics.step % self.config.checkpoint_every == 0 and metrics.step < self.steps:
                    self.checkpoint()
        return self.coder.eval()

    def checkpoint(self) -> None:
        """Save the whole state."""
        save_checkpoint(self.folder / "checkpoint", self.key, self.coder, self.optimiser, self.state)

    def step(self) -> StepMetrics:
        """One optimiser step."""
        x, target = self.source.batch(self.state.step, self.config.batch)
        batch = self._forward(x, target)
        loss, values = total(self.terms, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._not_finite("loss", value)
        factor = lr_factor(self.state.step, self.steps, self.config.warmup, self.config.decay)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * factor
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if self.config.unit_norm:
            project_decoder_gradient(self.coder)
        norm = float(torch.nn.utils.clip_grad_norm_(self.coder.parameters(), self.config.clip or math.inf))
        if not math.isfinite(norm):
            raise self._not_finite("gradient's norm", norm)
        self.optimiser.step()
        if self.config.unit_norm:
            normalise_decoder(self.coder)
        self._count(batch)
        return StepMetrics(
            self.state.step, value, values, float(batch.codes.l0().double().mean()),
            values["mse"], int(batch.dead.numel()), self.config.lr * factor,
        )  # fmt: skip

    def _not_finite(self, what: str, value: float) -> NonFiniteError:
        return NonFiniteError(
            f"{self.coder.name}: the {what} is {value} at step {self.state.step + 1} "
            f"(lr {self.config.lr:g}); nothing of this step was saved. A lower --train.lr usually helps."
        )

    def _forward(self, x: Tensor, target: Tensor) -> Step:
        coder = self.coder
        s, context = coder.prepare(x)
        codes = coder.encoder.codes(coder, s, None)
        y = sparse_decode(codes.values, coder.W_dec, codes.indices, codes.offsets) + coder.b_dec
        if coder.config.skip:
            y = y + s @ coder.W_skip.T
        wanted = inner_target(coder.config, s, target, context)
        dead = (self.state.tokens_since_fired >= self.config.dead_after).nonzero().squeeze(-1)
        return Step(coder, s, wanted, codes, y, self.state.variance, dead)

    @torch.no_grad()
    def _count(self, batch: Step) -> None:
        fired = batch.codes.indices[batch.codes.values.detach() != 0].long()
        self.state.tokens_since_fired += batch.codes.rows
        self.state.tokens_since_fired[fired] = 0
        if self.coder.config.activation.kind == "batchtopk":
            update_threshold(self.coder, batch)
        self.state.step += 1


def total_steps(config: OptimConfig, rows: int) -> int:
    """Optimiser steps of the whole training; `DataError` where there is less than one batch of rows."""
    if rows < config.batch:
        raise DataError(f"{rows} training rows are fewer than one batch of {config.batch}: take more text")
    tokens = config.tokens if config.tokens is not None else round(config.epochs * rows)
    return max(1, tokens // config.batch)


@torch.no_grad()
def project_decoder_gradient(coder: SparseCoder) -> None:
    """Take out of the decoder's gradient what points along each (unit) row."""
    grad = coder.W_dec.grad
    if grad is not None:
        along = (grad * coder.W_dec).sum(-1, keepdim=True)
        grad.addcmul_(coder.W_dec, along, value=-1)


@torch.no_grad()
def normalise_decoder(coder: SparseCoder) -> None:
    """Decoder rows back to norm 1."""
    coder.W_dec.div_(coder.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))


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
