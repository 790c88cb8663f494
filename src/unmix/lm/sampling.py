"""The next token from logits: greedy or drawn, with the field's usual restrictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmix.core.errors import ConfigError
from unmix.core.seeds import derive


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. Penalties come first, then temperature, `top_k`, `top_p`."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest."""
    top_p: float | None = None
    """Only the smallest set of likeliest tokens that holds this probability (Holtzman et al. 2020)."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen in the context are divided by it where positive, else multiplied (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for every time it stands in the context."""
    seed: int = 0
    """Each row of a batch has a random stream of its own from it."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature is {self.temperature}; it must be at least 0 (0: the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1: none)")

    @property
    def counts(self) -> bool:
        """Whether tokens of the context are counted."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0


class Sampler:
    """Chooses the tokens of one batch, step by step."""

    def __init__(
        self, sampling: Sampling, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None
    ) -> None:
        """`tokens` is the prompt; where `real` is False it is padding and not counted."""
        self.sampling = sampling
        self._streams = [torch.Generator().manual_seed(derive(sampling.seed, "row", row)) for row in range(len(tokens))]
        self._prompt, self._real = tokens, real
        self._seen: Tensor | None = None

    @torch.no_grad()
    def __call__(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        """The next token of every row."""
        rule = self.sampling
        scores = logits.float()
        if rule.counts:
            scores = self._penalised(scores)
        if rule.temperature == 0:
            new = scores.argmax(dim=-1)
        else:
            chances = restricted(scores / rule.temperature, rule.top_k, rule.top_p).softmax(dim=-1)
            # Drawn on the CPU, so that a seed gives the same text on every device with the same probabilities.
            drawn = [
                torch.multinomial(row, 1, generator=stream)
                for row, stream in zip(chances.cpu(), self._streams, strict=True)
            ]
            new = torch.cat(drawn).to(logits.device)
        if self._seen is not None:
            self._seen.scatter_add_(1, new.unsqueeze(1), torch.ones_like(new.unsqueeze(1), dtype=torch.float32))
        return new

    def _penalised(self, scores: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros_like(scores)
            ones = torch.ones_like(self._prompt, dtype=torch.float32) if self._real is None else self._real.float()
            self._seen.scatter_add_(1, self._prompt, ones)
        penalty = self.sampling.repetition_penalty
        if penalty != 1.0:
            scaled = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self._seen > 0, scaled, scores)
        return scores - self.sampling.frequency_penalty * self._seen


def restricted(
    scores: Float[Tensor, "batch vocab"], top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch vocab"]:
    """`scores` with −∞ where `top_k`, then `top_p`, leave a token out."""
    if top_k is not None and top_k < scores.shape[-1]:
        lowest = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        chances = ordered.softmax(dim=-1)
        # A token goes where those before it hold the probability already.
        out = chances.cumsum(dim=-1) - chances >= top_p
        scores = scores.masked_fill(torch.zeros_like(out).scatter(1, order, out), float("-inf"))
    return scores
