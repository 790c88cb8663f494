"""The objective as a list of weighted terms: one config class a term, told apart by `term`."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from unmix.core.config import Config, Count


class TermSpec(Config):
    """What every term has: a weight, and when it acts. Times are shares of the training, 0 to 1."""

    weight: NonNegativeFloat = 1.0
    start: float = Field(default=0.0, ge=0, le=1)
    """It is 0 before: a last stage of fine-tuning begins late."""
    stop: float = Field(default=1.0, ge=0, le=1)
    """It is 0 from here on."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the training over which its weight rises linearly from 0, after `start`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.start >= self.stop:
            raise ValueError(f"start is {self.start:g}, stop {self.stop:g}: the term would never act")
        return self

    def ramp(self, progress: float) -> float:
        """What the weight is multiplied by when a share `progress` of the training is done."""
        if not self.start <= progress < self.stop:
            return 0.0
        return min(1.0, (progress - self.start) / self.warmup) if self.warmup else 1.0


class MseSpec(TermSpec):
    """Local reconstruction error in units of the target's variance, of the whole dictionary or of nested prefixes."""

    term: Literal["mse"] = "mse"
    prefixes: tuple[Count, ...] = ()
    """Matryoshka (2503.17547): numbers of latents, ascending; the whole dictionary is added by itself."""
    reduce: Literal["sum", "mean"] = "sum"
    """Over the prefixes: the paper and SAELens sum, dictionary_learning takes the mean."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if any(small >= large for small, large in itertools.pairwise((0, *self.prefixes))):
            raise ValueError(f"prefixes must be positive and ascending, found {list(self.prefixes)}")
        if self.reduce != "sum" and not self.prefixes:
            raise ValueError("reduce belongs to prefixes, and there are none")
        return self


class L1Spec(TermSpec):
    """Mean over tokens of Σ |f|^p, each latent times its decoder norm unless told otherwise; p may fall to `p_end`."""

    term: Literal["l1"] = "l1"
    p: PositiveFloat = 1.0
    p_end: PositiveFloat | None = None
    """Reached linearly at the end of the training (p-annealing, Karvonen et al. 2024)."""
    norms: bool = True
    """Whether each latent counts times the norm of its decoder row (of each write's part, in a crosscoder)."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.p_end is not None and self.p_end >= self.p:
            raise ValueError(f"p_end is {self.p_end:g}, p is {self.p:g}: annealing makes p smaller")
        return self


class L0Spec(TermSpec):
    """Sparsity of jumprelu coders, differentiable in θ: L0, its distance from a target, or Anthropic's tanh."""

    term: Literal["l0"] = "l0"
    form: Literal["step", "quadratic", "tanh"] = "step"
    target: PositiveFloat | None = None
    """L0 aimed at, for `quadratic`: (L0 / target − 1)²."""
    scale: PositiveFloat = 4.0
    """c in tanh(c · f · ‖w_dec‖), for `tanh`."""

    @model_validator(mode="after")
    def _target(self) -> Self:
        if (self.form == "quadratic") != (self.target is not None):
            raise ValueError("target belongs to form: quadratic, which needs it")
        return self


class AuxKSpec(TermSpec):
    """Dead latents explain what the living ones left over (Gao et al. 2024)."""

    term: Literal["auxk"] = "auxk"
    weight: NonNegativeFloat = 1 / 32
    k: PositiveInt | None = None
    """Dead latents a token; default: half the width of the input."""


class MultiTopKSpec(TermSpec):
    """The error with `factor` times as many latents a token (Gao et al. 2024, appendix)."""

    term: Literal["multi_topk"] = "multi_topk"
    weight: NonNegativeFloat = 1 / 8
    factor: PositiveInt = 4


class GateSpec(TermSpec):
    """Of gated coders: λ·Σ relu(π)·‖w_dec‖, and the error of relu(π) through a frozen decoder (2404.16014 §3.2)."""

    term: Literal["gate"] = "gate"
    weight: NonNegativeFloat = 1.0
    """Of both parts."""
    sparsity: NonNegativeFloat = 0.0
    """λ: what the mean Σ relu(π)·‖w_dec‖ counts against the error, in units of the target's variance."""
    sparsity_warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the training over which λ rises linearly from 0; the auxiliary error counts from the start."""


class KlSpec(TermSpec):
    """KL(p_orig ‖ p_spliced) at the logits, a token (Braun et al. 2405.12241)."""

    term: Literal["kl"] = "kl"


class CeSpec(TermSpec):
    """Cross-entropy of the next token in the spliced model."""

    term: Literal["ce"] = "ce"


class DownstreamSpec(TermSpec):
    """Error of later activations in the spliced model, the mean over `hooks` (Braun et al. 2405.12241 §3)."""

    term: Literal["downstream"] = "downstream"
    hooks: tuple[str, ...]


AnyTerm = Annotated[
    MseSpec | L1Spec | L0Spec | AuxKSpec | MultiTopKSpec | GateSpec | KlSpec | CeSpec | DownstreamSpec,
    Field(discriminator="term"),
]
