"""What is trained, and how."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from unmix.coder.config import CoderConfig, Normalise
from unmix.core.config import Config, Count, build, operational
from unmix.core.errors import ConfigError
from unmix.core.policy import InputPolicy, ModelFingerprint
from unmix.train.objectives.specs import AnyTerm, AuxKSpec, GateSpec, L0Spec, L1Spec, MseSpec

Kind = Literal["topk", "batchtopk", "jumprelu", "relu"]


_ONLY_FOR: dict[str, tuple[Kind, ...]] = {
    "k": ("topk", "batchtopk"),
    "relu": ("topk",),
    "threshold": ("jumprelu",),
    "bandwidth": ("jumprelu",),
}
"""Fields of a coder that mean nothing for other activations: said rather than ignored."""


class CoderSpec(Config):
    """The coder to be trained, in the words of a run file; widths of hooks are filled in from the model."""

    name: str = ""
    """Key of the coder in the run; default: a slug of the hook as it is written here."""
    hook: str
    """Where it reads (and writes, unless `write` says otherwise)."""
    write: str | None = None
    n_latents: Count | None = Field(default=None, gt=0)
    """Number of latents; default: `expansion` times the width of the hook."""
    expansion: PositiveFloat = 8
    activation: Kind = "topk"
    k: PositiveInt | None = 32
    """Latents a token, for the top-k kinds."""
    relu: Literal["before", "after", "none"] = "after"
    normalise: Normalise = Normalise()
    pre_bias: Literal["none", "tied", "own"] | None = None
    """Default: tied where the coder writes what it reads, none otherwise."""
    gate_space: Literal["raw", "decoder_norm"] = "raw"
    skip: bool = False
    threshold: PositiveFloat = 0.001
    bandwidth: PositiveFloat = 0.001

    def latents(self, width: int) -> int:
        """Number of latents for a hook of this width."""
        return self.n_latents if self.n_latents is not None else round(self.expansion * width)

    def build(
        self,
        reads: str,
        writes: str,
        d_in: int,
        d_out: int,
        policy: InputPolicy,
        model: ModelFingerprint | None,
        input_scale: float = 1.0,
        training: dict[str, Any] | None = None,
    ) -> CoderConfig:
        """The coder's config; `ConfigError` where the fields cannot go together (k above the width, say)."""
        activation: dict[str, Any] = {"kind": self.activation}
        if self.activation in ("topk", "batchtopk"):
            activation["k"] = self.k
        if self.activation == "topk":
            activation["relu"] = self.relu
        if self.activation == "jumprelu":
            activation |= {"initial_threshold": self.threshold, "bandwidth": self.bandwidth}
        tree = {
            "name": self.name,
            "reads": (reads,),
            "writes": (writes,),
            "d_in": d_in,
            "d_out": d_out,
            "n_latents": self.latents(d_in),
            "activation": activation,
            "normalise": self.normalise,
            "input_scale": input_scale,
            "output_scale": 1.0 / input_scale if reads == writes else 1.0,
            "pre_bias": self.pre_bias or ("tied" if reads == writes else "none"),
            "gate_space": self.gate_space,
            "skip": self.skip,
            "input_policy": policy,
            "model": model,
            "training": training or {},
        }
        return build(CoderConfig, tree, source=f"coder at {reads}")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.activation in ("topk", "batchtopk") and self.k is None:
            raise ValueError(f"activation {self.activation!r} needs k")
        for name, kinds in _ONLY_FOR.items():
            set_here = getattr(self, name) != type(self).model_fields[name].default
            if set_here and self.activation not in kinds:
                raise ValueError(f"{name} belongs to {' and '.join(kinds)}; activation is {self.activation!r}")
        picks = self.activation in ("topk", "batchtopk")
        if picks and self.k is not None and self.n_latents is not None and self.k > self.n_latents:
            raise ValueError(f"k is {self.k}, larger than n_latents = {self.n_latents}")
        return self


class OptimConfig(Config):
    """Objective weights, optimiser and schedule."""

    epochs: PositiveFloat = 3
    """Passes over the training tokens; the model runs once where activations are cached."""
    tokens: Count | None = Field(default=None, gt=0)
    """Tokens seen in all; overrides `epochs`."""
    batch: Count = Field(default=2048, gt=0)
    """Tokens a step."""
    lr: PositiveFloat = 8e-4
    """Peak learning rate of Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly from 0."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """Share of the steps, at the end, over which it falls linearly to 0."""
    clip: NonNegativeFloat = 1.0
    """Largest norm of all gradients together; 0 for none."""
    unit_norm: bool = True
    """Keep decoder rows at norm 1 (gradient projected, rows renormalised after each step)."""
    auxk: NonNegativeFloat = 1 / 32
    """Weight of the AuxK term (dead latents explain the residual); 0 for none."""
    k_aux: Count | None = Field(default=None, gt=0)
    """Dead latents a token in AuxK; default: half the width of the input."""
    dead_after: Count = Field(default=10_000_000, gt=0)
    """Tokens without firing after which a latent counts as dead."""
    sparsity: NonNegativeFloat = 0.0
    """Weight of the activation's own penalty: l1 for relu, l0 for jumprelu, λ of the term gate for gated."""
    objective: tuple[AnyTerm, ...] | None = None
    """The loss as a list of terms; default: mse, auxk and the activation's own penalty, by the fields above."""
    init_rows: Count = Field(default=8192, gt=0)
    """Rows of the first sample that sets `b_dec` and the input scale."""
    seed: int = 0
    log_every: PositiveInt = operational(25)
    checkpoint_every: PositiveInt = operational(200)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup + decay is {self.warmup + self.decay:g}, at most 1")
        if self.objective is not None:
            names = [spec.term for spec in self.objective]
            if not names or len(names) != len(set(names)):
                raise ValueError(f"objective needs each term at most once, and one at least; found {names}")
            said = [name for name in ("auxk", "k_aux", "sparsity") if name in self.model_fields_set]
            if said:
                raise ValueError(f"{said[0]} is a field of the objective's own term where an objective is given")
        return self


def objective_of(kind: str, config: OptimConfig) -> tuple[AnyTerm, ...]:
    """The terms of a coder whose activation is `kind`: those given, or the local default."""
    if config.objective is not None:
        return config.objective
    terms: list[AnyTerm] = [MseSpec()]
    if config.auxk > 0:
        terms.append(AuxKSpec(weight=config.auxk, k=config.k_aux))
    if kind == "gated":
        terms.append(GateSpec(sparsity=config.sparsity))
    elif config.sparsity > 0 and kind == "relu":
        terms.append(L1Spec(weight=config.sparsity))
    elif config.sparsity > 0 and kind == "jumprelu":
        terms.append(L0Spec(weight=config.sparsity))
    elif config.sparsity > 0:
        raise ConfigError(f"sparsity is {config.sparsity:g}, but {kind} coders have no penalty: k sets their L0")
    return tuple(terms)
