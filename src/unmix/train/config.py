"""What is trained, and how."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from unmix.coder.config import CoderConfig, Normalise
from unmix.core.config import Config, Count, build, operational
from unmix.core.errors import ConfigError
from unmix.core.policy import InputPolicy, ModelFingerprint
from unmix.train.objectives.specs import AnyTerm, AuxKSpec, GateSpec, L0Spec, L1Spec, MseSpec

Kind = Literal["topk", "batchtopk", "groupmax", "jumprelu", "gated", "relu"]
PICKING = ("topk", "batchtopk", "groupmax")
"""Kinds whose L0 is k."""


_ONLY_FOR: dict[str, tuple[Kind, ...]] = {
    "k": ("topk", "batchtopk", "groupmax"),
    "relu": ("topk",),
    "threshold": ("jumprelu",),
    "bandwidth": ("jumprelu",),
}
"""Fields of a coder that mean nothing for other activations: said rather than ignored."""


class CoderSpec(Config):
    """The coder to be trained, in the words of a run file; widths of hooks are filled in from the model."""

    name: str = ""
    """Key of the coder in the run; default: a slug of the (first) hook as it is written here."""
    hook: str | tuple[str, ...]
    """Where it reads (and writes, unless `write` says otherwise); several for a crosscoder."""
    write: str | tuple[str, ...] | None = None
    n_latents: Count | None = Field(default=None, gt=0)
    """Number of latents; default: `expansion` times the width of the hook (of the first, where there are several)."""
    expansion: PositiveFloat = 8
    activation: Kind = "topk"
    k: PositiveInt | None = 32
    """Latents a token, for the top-k kinds; of groupmax the number of groups."""
    relu: Literal["before", "after", "none"] = "after"
    normalise: Normalise | None = None
    """Default: `standardise` where several hooks are read, so that none outweighs the others; else none."""
    pre_bias: Literal["none", "tied", "own"] | None = None
    """Default: tied where the coder writes what it reads, none otherwise."""
    gate_space: Literal["raw", "decoder_norm", "decoder_norm_sum"] | None = None
    """Default: `decoder_norm_sum` for crosscoders of the top-k kinds, else raw."""
    skip: bool = False
    threshold: PositiveFloat = 1.0
    """First θ of every latent, where inputs have a mean norm of √d."""
    bandwidth: PositiveFloat = 1.0
    """Width ε of the kernel through which θ learns, in the same units.

    Both are far above the paper's 0.001: a step of Adam moves θ by the learning rate at most, and a narrow kernel sees
    few tokens, so that thresholds would hardly move in a training of thousands of steps.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        """Hooks that are read, as they are written here."""
        return (self.hook,) if isinstance(self.hook, str) else self.hook

    @property
    def writes(self) -> tuple[str, ...]:
        """Hooks that are written, as they are written here."""
        if self.write is None:
            return self.reads
        return (self.write,) if isinstance(self.write, str) else self.write

    def latents(self, width: int) -> int:
        """Number of latents for a hook of this width."""
        return self.n_latents if self.n_latents is not None else round(self.expansion * width)

    def build(
        self,
        reads: str | tuple[str, ...],
        writes: str | tuple[str, ...],
        d_in: int | tuple[int, ...],
        d_out: int | tuple[int, ...],
        policy: InputPolicy,
        model: ModelFingerprint | None,
        input_scale: float = 1.0,
        training: dict[str, Any] | None = None,
    ) -> CoderConfig:
        """The coder's config; `ConfigError` where the fields cannot go together (k above the width, say).

        `reads` and `writes` are canonical hooks, `d_in` and `d_out` their widths: one, or one a hook.
        """
        reads, writes = (reads,) if isinstance(reads, str) else reads, (writes,) if isinstance(writes, str) else writes
        widths_in = (d_in,) if isinstance(d_in, int) else d_in
        widths_out = (d_out,) if isinstance(d_out, int) else d_out
        same, crosscoder = reads == writes, len(reads) > 1 and reads == writes
        default_space = "decoder_norm_sum" if crosscoder and self.activation in PICKING else "raw"
        default_rule = Normalise(kind="standardise") if len(reads) > 1 and same else Normalise()
        tree = {
            "name": self.name,
            "reads": reads,
            "writes": writes,
            "d_in": sum(widths_in),
            "d_out": sum(widths_out),
            "write_widths": widths_out if len(set(widths_out)) > 1 else (),
            "n_latents": self.latents(widths_in[0]),
            "activation": self._activation(),
            "normalise": self.normalise or default_rule,
            "input_scale": input_scale,
            "output_scale": 1.0 / input_scale if same else 1.0,
            "pre_bias": self.pre_bias or ("tied" if same else "none"),
            "gate_space": self.gate_space or default_space,
            "skip": self.skip,
            "input_policy": policy,
            "model": model,
            "training": training or {},
        }
        return build(CoderConfig, tree, source=f"coder at {' + '.join(reads)}")

    def _activation(self) -> dict[str, Any]:
        tree: dict[str, Any] = {"kind": self.activation}
        if self.activation in PICKING:
            tree["k"] = self.k
        if self.activation == "topk":
            tree["relu"] = self.relu
        if self.activation == "jumprelu":
            tree |= {"initial_threshold": self.threshold, "bandwidth": self.bandwidth}
        return tree

    @model_validator(mode="after")
    def _check(self) -> Self:
        picks = self.activation in PICKING
        if picks and self.k is None:
            raise ValueError(f"activation {self.activation!r} needs k")
        for name, kinds in _ONLY_FOR.items():
            set_here = getattr(self, name) != type(self).model_fields[name].default
            if set_here and self.activation not in kinds:
                raise ValueError(f"{name} belongs to {_listed(kinds)}; activation is {self.activation!r}")
        if picks and self.k is not None and self.n_latents is not None and self.k > self.n_latents:
            raise ValueError(f"k is {self.k}, larger than n_latents = {self.n_latents}")
        return self

    @model_validator(mode="after")
    def _check_hooks(self) -> Self:
        for name, hooks in (("hook", self.reads), ("write", self.writes)):
            if not hooks or len(hooks) != len(set(hooks)):
                raise ValueError(f"{name} needs one hook at least, and each once; found {list(hooks)}")
        standardise = self.normalise is not None and self.normalise.kind == "standardise"
        if standardise and self.writes != self.reads:
            raise ValueError("normalise 'standardise' is of coders that write what they read; give no write")
        if self.gate_space == "decoder_norm_sum" and len(self.writes) == 1:
            raise ValueError("gate_space 'decoder_norm_sum' adds the norms of several writes; there is one")
        return self


OptimiserName = Literal["adam", "signum", "schedule_free", "muon", "adam8bit"]
TrackerName = Literal["wandb", "trackio", "tensorboard"]


class Tracking(Config):
    """How figures go to a tracker. Keys come from the environment or from `.env`, never from here."""

    project: str = "unmix"
    offline: bool = False
    """Write to disk alone: nothing leaves the machine."""
    upload: bool = False
    """Send the finished coder as an artifact, where the tracker keeps such."""


class OptimConfig(Config):
    """Objective weights, optimiser and schedule."""

    epochs: PositiveFloat = 3
    """Passes over the training tokens; the model runs once where activations are cached."""
    tokens: Count | None = Field(default=None, gt=0)
    """Tokens seen in all; overrides `epochs`."""
    batch: Count = Field(default=2048, gt=0)
    """Tokens a step."""
    optimiser: OptimiserName = "adam"
    lr: PositiveFloat = 8e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam; the first is the momentum of signum and muon, and the share of schedule-free's average."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly from 0."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """Share of the steps, at the end, over which it falls linearly to 0."""
    clip: NonNegativeFloat = 1.0
    """Largest norm of all gradients together; 0 for none."""
    unit_norm: bool | None = None
    """Keep decoder rows at norm 1 (gradient projected, rows renormalised after each step).

    Default: yes, unless the norms are held by a term that counts them (l1, the tanh form of l0). A gated coder's are
    not: its magnitudes have a factor of their own, and would make up for a decoder that shrinks away from the penalty.
    """
    auxk: NonNegativeFloat = 1 / 32
    """Weight of the AuxK term (dead latents explain the residual); 0 for none."""
    k_aux: Count | None = Field(default=None, gt=0)
    """Dead latents a token in AuxK; default: half the width of the input."""
    dead_after: Count = Field(default=10_000_000, gt=0)
    """Tokens without firing after which a latent counts as dead."""
    sparsity: NonNegativeFloat = 0.0
    """Weight of the activation's own penalty: l1 for relu, l0 for jumprelu, λ of the term gate for gated."""
    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the training over which that weight rises linearly from 0."""
    target_l0: PositiveFloat | None = None
    """For jumprelu: the penalty is (L0 / target − 1)² instead of L0."""
    prefixes: tuple[Count, ...] = ()
    """Matryoshka: the errors of these many first latents are added to that of the whole dictionary."""
    k_start: PositiveInt | None = None
    """k of the first step, which falls geometrically to the coder's own; default: no annealing."""
    k_anneal: float = Field(default=0.5, gt=0, le=1)
    """Share of the training over which it falls."""
    start_from: str | None = None
    """A saved coder (a folder, a file, `hf://…`; any format) that training goes on from; default: fresh weights."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential mean of the weights, of this share a step (0.999, say), and end with it; default: none."""
    resample: tuple[float, ...] = ()
    """Shares of the training after which dead latents are begun anew where the coder is worst; default: never."""
    resample_rows: Count = Field(default=8192, gt=0)
    """Rows among which those places are looked for."""
    objective: tuple[AnyTerm, ...] | None = None
    """The loss as a list of terms; default: mse, auxk and the activation's own penalty, by the fields above."""
    splice: Literal["alone", "together"] = "alone"
    """For objectives that look at the model (kl, ce, downstream), where a run has several coders.

    alone: each in a pass of its own, the others out. together: those at different hooks in one pass, each reading what
    the ones before it left and trained on their common effect.
    """
    init_rows: Count = Field(default=8192, gt=0)
    """Rows of the first sample that sets `b_dec` and the input scale."""
    seed: int = 0
    """Of the first weights; the order of the rows is the stream's."""
    log_every: PositiveInt = operational(25)
    checkpoint_every: PositiveInt = operational(200)
    keep: PositiveInt = operational(2)
    """Checkpoints kept, newest first: where the last one is damaged, the one before is taken."""
    on_nonfinite: Literal["stop", "skip"] = operational("stop")
    """What a NaN or infinity does: stop before any weight is touched, or leave that step out and count it."""
    skip_limit: PositiveInt = operational(10)
    """Steps that may be left out; one more stops."""
    retire: bool = operational(False)
    """Where one of several coders would stop the training, it alone leaves and the others go on. Sweeps say so."""
    held_out: Count = operational(0, ge=0)
    """Rows of documents that are not trained on, on which FVU and L0 are measured now and then; 0 for none."""
    held_out_every: PositiveInt = operational(200)
    """Steps between two such measurements."""
    trackers: tuple[TrackerName, ...] = operational(())
    """Where figures are sent beside `metrics.jsonl`: wandb, trackio, tensorboard."""
    tracking: Tracking = operational(Tracking())

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup + decay is {self.warmup + self.decay:g}, at most 1")
        if self.objective is not None:
            names = [spec.term for spec in self.objective]
            if not names or len(names) != len(set(names)):
                raise ValueError(f"objective needs each term at most once, and one at least; found {names}")
            said = [name for name in _OF_TERMS if self._says(name)]
            if said:
                raise ValueError(f"{said[0]} is a field of the objective's own term where an objective is given")
        if self.target_l0 is not None and self.sparsity == 0:
            raise ValueError("target_l0 needs sparsity, the weight of its penalty")
        if self._says("k_anneal") and self.k_start is None:
            raise ValueError("k_anneal needs k_start")
        if any(not 0 < share < 1 for share in self.resample):
            raise ValueError(f"resample holds shares of the training, between 0 and 1; found {list(self.resample)}")
        if self.ema is not None and self.optimiser == "schedule_free":
            raise ValueError("ema is a mean of the weights, and optimiser schedule_free ends with a mean already")
        if self.tracking.upload and "wandb" not in self.trackers:
            raise ValueError("tracking.upload keeps the coder as an artifact of wandb, which is not among the trackers")
        return self

    def _says(self, name: str) -> bool:
        """Whether a field is not at its default: a run folder's file writes out every one."""
        return getattr(self, name) != type(self).model_fields[name].default


_OF_TERMS = ("auxk", "k_aux", "sparsity", "sparsity_warmup", "target_l0", "prefixes")
"""Fields that the default objective is made of."""


def objective_of(kind: str, config: OptimConfig) -> tuple[AnyTerm, ...]:
    """The terms of a coder whose activation is `kind`: those given, or the local default."""
    if config.objective is not None:
        return config.objective
    weight, warmup = config.sparsity, config.sparsity_warmup
    terms: list[AnyTerm] = [MseSpec(prefixes=config.prefixes)]
    if config.auxk > 0:
        terms.append(AuxKSpec(weight=config.auxk, k=config.k_aux))
    if config.target_l0 is not None and kind != "jumprelu":
        raise ConfigError(f"target_l0 belongs to jumprelu coders, and this one is {kind}")
    if kind == "gated":
        terms.append(GateSpec(sparsity=weight, sparsity_warmup=warmup))
    elif weight > 0 and kind == "relu":
        terms.append(L1Spec(weight=weight, warmup=warmup))
    elif weight > 0 and kind == "jumprelu":
        form = "step" if config.target_l0 is None else "quadratic"
        terms.append(L0Spec(weight=weight, warmup=warmup, form=form, target=config.target_l0))
    elif weight > 0:
        raise ConfigError(f"sparsity is {weight:g}, but {kind} coders have no penalty: k sets their L0")
    return tuple(terms)


def holds_unit_norm(kind: str, config: OptimConfig) -> bool:
    """Whether decoder rows are kept at norm 1: as the config says, or unless a term holds their norms."""
    if config.unit_norm is not None:
        return config.unit_norm
    return not any(
        (spec.term == "l1" and spec.norms) or (spec.term == "l0" and spec.form == "tanh")
        for spec in objective_of(kind, config)
    )


def _listed(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
