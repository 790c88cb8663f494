"""How coders under training stand in a model: alone in a pass of their own, or several in one."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unmix.coder.codes import Codes
from unmix.coder.config import CoderConfig
from unmix.coder.normalise import denormalise, normalise
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.lm.forward import attach_write, put
from unmix.lm.intervene import Span
from unmix.lm.model import LanguageModel
from unmix.lm.sites import Pass
from unmix.lm.splice import SplicedPass, make_bindings
from unmix.train.learner import Learner
from unmix.train.objectives import Step


@dataclass(frozen=True)
class Bare:
    """What the model as it is gave for one batch."""

    activations: Mapping[str, Tensor]
    """[batch, pos, d]."""
    mask: Tensor
    last: Tensor | None
    """What the head reads at positions that count, or their logits."""

    def of(self, config: CoderConfig) -> tuple[Tensor, Tensor]:
        """`(input, target)` rows of a coder, float32."""
        x = self._beside(config.reads)
        return x, x if config.writes == config.reads else self._beside(config.writes)

    def _beside(self, hooks: Sequence[str]) -> Tensor:
        return wide(torch.cat([self.activations[hook][self.mask] for hook in hooks], dim=-1))


class Alone:
    """One coder in its own pass: what it reads is known before the pass begins."""

    def __init__(self, lm: LanguageModel, bare: Bare, learners: Mapping[str, Learner]) -> None:
        self.lm, self.mask = lm, bare.mask
        ((self.name, learner),) = learners.items()
        self.config = learner.coder.config
        x, target = bare.of(self.config)
        self.step = learner.forward(x, target)
        self.output = raw_output(learner.coder, self.step.reconstruction, x)

    def attach(self, current: Pass) -> None:
        """The reconstruction in its place at positions that count."""
        parts = self.output.split(list(self.config.parts()), dim=-1)
        for hook, part in zip(self.config.writes, parts, strict=True):
            attach_write(current, self.lm.hook(hook), put(part, self.mask))

    def steps(self) -> dict[str, Step]:
        """What the coder made of the batch."""
        return {self.name: self.step}


class Together:
    """Several coders in one pass: each reads what the spliced model gives, behind the coders before it."""

    def __init__(self, lm: LanguageModel, bare: Bare, learners: Mapping[str, Learner]) -> None:
        self.mask = bare.mask
        self.coders = {name: _Live(learner, bare) for name, learner in learners.items()}
        self.bindings = make_bindings(lm, self.coders)

    def attach(self, current: Pass) -> None:
        """Every coder at its hooks."""
        span = Span(0, self.mask.shape[1], self.mask.shape[1])
        for binding in self.bindings:
            SplicedPass(binding, "drop", (), self.mask.shape[0], span).attach(current, self.mask)

    def steps(self) -> dict[str, Step]:
        """What each coder made of what reached it."""
        return {name: coder.step for name, coder in self.coders.items() if coder.step is not None}


class _Live:
    """A learner as the splice sees a coder: it runs on the rows that count alone, and keeps its step."""

    def __init__(self, learner: Learner, bare: Bare) -> None:
        self.learner, self.bare = learner, bare
        self.step: Step | None = None
        self._output: Tensor | None = None

    @property
    def config(self) -> CoderConfig:
        """The coder's."""
        return self.learner.coder.config

    def encode(self, x: Tensor) -> Codes:
        """Codes of the rows that count. A coder that writes elsewhere aims at what the model as it is has there."""
        rows = wide(x[self.bare.mask])
        same = self.config.writes == self.config.reads
        step = self.learner.forward(rows, rows if same else self.bare.of(self.config)[1])
        # The target is given: a coder before this one is not paid for making it easier.
        self.step = replace(step, target=step.target.detach())
        self._output = raw_output(self.learner.coder, step.reconstruction, rows)
        return step.codes

    def decode(self, codes: Codes) -> Tensor:
        """The output [batch, pos, d_out], zero where a position does not count."""
        output = self._output
        if output is None:
            raise ConfigError(f"{self.config.name}: decoded before it encoded")
        whole = output.new_zeros((*self.bare.mask.shape, output.shape[-1]))
        return whole.masked_scatter(self.bare.mask.unsqueeze(-1), output)


def raw_output(coder: SparseCoder, y: Tensor, x: Tensor) -> Tensor:
    """The coder's output [rows, d_out] for what its decoder gave (a `Step`'s reconstruction) on raw input `x`."""
    config = coder.config
    y = y if config.output_scale == 1.0 else y * config.output_scale
    _, context = normalise(x.to(coder.dtype), config.normalise, coder.fixed())
    return denormalise(y, config.normalise, context.get("mean"), context.get("std"), coder.fixed())


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where it was that already."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Without gradients for the model's weights and in evaluation mode while inside; all as it was afterwards."""
    learning = [p for p in model.parameters() if p.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for p in learning:
            p.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for module in training:
            module.training = True
