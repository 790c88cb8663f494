"""The loop that trains a language model on token shards: the order of contexts is a function of seed and step alone."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from unmix.core.atomic import sweep
from unmix.core.errors import DataError, NonFiniteError
from unmix.core.progress import Task, task
from unmix.core.seeds import derive
from unmix.data.order import Order
from unmix.data.shards import TokenShards
from unmix.lm.model import LanguageModel
from unmix.lm.packing import keywords
from unmix.train.language import checkpoint
from unmix.train.language.config import LanguageConfig
from unmix.train.metrics_log import MetricsLog


class LanguageTrainer:
    """A model, its optimiser and a step number; resumes by itself from `folder/checkpoint`."""

    def __init__(self, model: Any, shards: TokenShards, config: LanguageConfig, folder: Path, key: str) -> None:
        """`key` is the hash of everything that the result depends on; a checkpoint of another key is refused."""
        self.model, self.shards, self.config, self.folder, self.key = model, shards, config, folder, key
        self._lm = LanguageModel(model, "the model under training")
        self._train = shards.contexts_of("train")
        self._held_out = shards.contexts_of("evaluate")[: max(1, config.evaluate.tokens // shards.context)]
        if len(self._train) < config.contexts:
            raise DataError(
                f"{config.data.source}: {len(self._train)} contexts to train on, fewer than the {config.contexts} "
                "of one step; give more text or a smaller train.batch"
            )
        self._order = Order(derive(config.seed, "contexts"), len(self._train), len(self._train))
        self.steps = total_steps(config, len(self._train))
        self.optimiser = make_optimiser(model, config)
        sweep(folder / "checkpoint")
        self.progress = checkpoint.load(folder / "checkpoint", key, model, self.optimiser)
        model.train()

    @property
    def tokens_a_step(self) -> int:
        """Tokens a step."""
        return self.config.contexts * self.shards.context

    def run(self) -> dict[str, float]:
        """Train to the end; the last held-out loss in nats a token, and the last mean training loss.

        Raises `NonFiniteError` before a step whose loss or gradient is not finite; nothing of that step is saved.
        """
        log = MetricsLog(self.folder / "metrics.jsonl", self.progress.step)
        timings = MetricsLog(self.folder / "timings.jsonl", self.progress.step)
        every = self.config.train
        size = self.tokens_a_step
        record: dict[str, float] = {}
        with task("lm-train", self.steps * size, done=self.progress.step * size) as bar:
            began, first = time.monotonic(), self.progress.step
            while self.progress.step < self.steps:
                facts = self.step()
                at = self.progress.step
                measured = at % self.config.evaluate.every == 0 or at == self.steps
                if measured or at % every.log_every == 0:
                    record = self._record(facts, measured)
                    log.write(record)
                    speed = (at - first) * size / (time.monotonic() - began)
                    timings.write({"step": at, "tokens_per_second": round(speed, 1)})
                self._show(bar, facts)
                if at % every.checkpoint_every == 0 and at < self.steps:
                    self.checkpoint()
        return {"loss": record["loss"], "held_out_loss": record["held_out_loss"]}

    def step(self) -> dict[str, float]:
        """One optimiser step: its loss (nats a token), gradient norm and learning rate."""
        config, at = self.config.train, self.progress.step
        ids = self._train[self._order.batch(at, self.config.contexts)]
        loss = 0.0
        for part in np.array_split(ids, config.accumulate):
            value = self._loss(part) / config.accumulate
            torch.autograd.backward(value)
            loss += float(value.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"the loss is {loss} and the gradient's norm {norm} at step {at + 1}; nothing of this step was saved. "
                "A lower --train.lr usually helps."
            )
        lr = config.lr * lr_share(at, self.steps, config.warmup, config.final_lr)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.loss_sum += loss
        self.progress.loss_steps += 1
        return {"loss": loss, "gradient_norm": norm, "lr": lr}

    @torch.no_grad()
    def held_out_loss(self, batch: int = 16) -> float:
        """Mean cross-entropy in nats a token over held-out contexts."""
        self.model.eval()
        total, rows = 0.0, 0
        for start in range(0, len(self._held_out), batch):
            ids = self._held_out[start : start + batch]
            total += float(self._loss(ids)) * len(ids)
            rows += len(ids)
        self.model.train()
        return total / rows

    def checkpoint(self) -> None:
        """Save everything that the next step depends on."""
        checkpoint.save(self.folder / "checkpoint", self.key, self.model, self.optimiser, self.progress)

    def _loss(self, ids: np.ndarray) -> Float[Tensor, ""]:
        tokens = torch.from_numpy(self.shards.tokens(ids).astype(np.int64)).to(self._lm.device)
        half = self.config.train.dtype == "bfloat16"
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=half):
            logits = self.model(input_ids=tokens, use_cache=False, **self._apart(ids)).logits
        return next_token_loss(logits, tokens)

    def _apart(self, ids: np.ndarray) -> dict[str, Tensor]:
        if self.shards.policy.attend_across:
            return {}
        documents = torch.from_numpy(self.shards.documents(ids).astype(np.int64)).to(self._lm.device)
        return keywords(self._lm, documents)

    def _record(self, facts: dict[str, float], measured: bool) -> dict[str, float]:
        """A line of the log: the mean loss since the last line, and the held-out loss where it is due."""
        progress = self.progress
        mean = progress.loss_sum / progress.loss_steps
        progress.loss_sum, progress.loss_steps = 0.0, 0
        line = {"step": progress.step, "tokens": progress.step * self.tokens_a_step, **facts, "loss": mean}
        return {**line, "held_out_loss": self.held_out_loss()} if measured else line

    def _show(self, bar: Task, facts: dict[str, float]) -> None:
        bar.advance(self.tokens_a_step, f"loss {facts['loss']:.3f} lr {facts['lr']:.2g}")


def next_token_loss(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of every token but the first given those before it."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def lr_share(step: int, steps: int, warmup: float, final: float) -> float:
    """Share of the peak rate at `step` (0-based): linear up, then half a cosine down to `final`."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def total_steps(config: LanguageConfig, contexts: int) -> int:
    """Optimiser steps of the whole training on this many contexts."""
    train = config.train
    if train.steps is not None:
        return train.steps
    tokens = train.tokens if train.tokens is not None else (train.epochs or 1) * contexts * config.data.context
    return max(1, int(tokens) // (config.contexts * config.data.context))


def make_optimiser(model: Any, config: LanguageConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.train.lr, betas=config.train.betas, fused=True)
