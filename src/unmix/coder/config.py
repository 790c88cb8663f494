"""What a sparse coder is, in full: every choice that published coders disagree on is a field here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from unmix.core.config import Config
from unmix.core.policy import InputPolicy, ModelFingerprint
from unmix.core.seeds import slug

Relu = Literal["before", "after", "none"]
GateSpace = Literal["raw", "decoder_norm", "decoder_norm_sum", "own"]


class TopK(Config):
    """The k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093 §2.3)."""

    kind: Literal["topk"] = "topk"
    k: PositiveInt
    relu: Relu = "after"
    """Where negative values are cut: before the selection, after it, or nowhere (signed codes)."""
    magnitude: bool = False
    """Select by absolute value; needs `relu: none`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.magnitude and self.relu != "none":
            raise ValueError(f"magnitude selection keeps signs, so relu must be 'none', found {self.relu!r}")
        return self


class BatchTopK(Config):
    """The k·T largest pre-activations of a batch of T tokens; a threshold at inference (Bussmann et al. 2024)."""

    kind: Literal["batchtopk"] = "batchtopk"
    k: PositiveInt


class JumpReLU(Config):
    """z where z > θ, with one θ a latent (Rajamanoharan et al. 2024, arXiv 2407.14435 §3)."""

    kind: Literal["jumprelu"] = "jumprelu"
    initial_threshold: PositiveFloat = 0.001
    bandwidth: PositiveFloat = 0.001
    """Width ε of the rectangle kernel of the straight-through gradient of θ."""
    keep_max: bool = False
    """Whether a token with nothing above θ keeps its largest positive pre-activation."""


class GroupMax(Config):
    """The largest of each of k contiguous groups of n_latents / k pre-activations, cut at 0."""

    kind: Literal["groupmax"] = "groupmax"
    k: PositiveInt


class Gated(Config):
    """1[π > 0]·relu(mag): which latents fire and how strongly, from one matrix (Rajamanoharan et al. 2404.16014 §3).

    π = W_enc s + b_enc; mag = exp(r_mag)·(W_enc s) + b_mag.
    """

    kind: Literal["gated"] = "gated"


class ReLU(Config):
    """max(z, 0)."""

    kind: Literal["relu"] = "relu"


class Identity(Config):
    """Every latent, signed and unchanged: a model's own neurons seen as a coder."""

    kind: Literal["identity"] = "identity"


class MatchingPursuit(Config):
    """One latent after the other: the one that fits the residual best, which then loses it (Mallat & Zhang 1993).

    r ← x − b_pre; z = W_enc r + b_enc; the largest z, cut at 0, is added to its latent's code, and r loses z·w_dec.
    """

    kind: Literal["matching_pursuit"] = "matching_pursuit"
    residual_threshold: NonNegativeFloat = 0.01
    """A token is done when ‖r‖ falls below this (in units of the prepared input); 0: never for that reason."""
    max_iterations: PositiveInt | None = None
    """Default: `d_in`."""
    stop_on_duplicate_support: bool = True
    """A token is done when a step brings no new latent."""


class Temporal(Config):
    """What the tokens before predict is taken away, the rest is encoded sparsely (arXiv 2511.01836).

    Each of `n_layers` attention layers predicts codes from those of earlier tokens; their reconstruction is projected
    out of the residual. The codes are those of what remains; `decode` adds the prediction back.
    """

    kind: Literal["temporal"] = "temporal"
    k: PositiveInt | None = None
    """The largest k of relu(z) are kept; None: all that are positive."""
    n_heads: PositiveInt = 8
    n_layers: PositiveInt = 1
    bottleneck: PositiveInt = 64
    """Queries and keys are n_latents / bottleneck wide."""
    z_scale: PositiveFloat
    """Fixed factor: z = W_enc (z_scale · r) + b_enc."""
    eps: NonNegativeFloat = 1e-6
    """Added to the norm of the predicted reconstruction before dividing by its square."""


Activation = Annotated[
    TopK | BatchTopK | JumpReLU | GroupMax | Gated | ReLU | Identity | MatchingPursuit | Temporal,
    Field(discriminator="kind"),
]


class Normalise(Config):
    """What is done to each input vector before encoding, and undone after decoding.

    `layer_norm`: (x − mean) / (std + eps), each token by its own. `constant_norm`: x·√d_in / ‖x‖. `standardise`:
    (x − norm_mean)·norm_scale, with two fixed vectors [d_in] that are stored beside the weights.
    """

    kind: Literal["none", "layer_norm", "constant_norm", "standardise"] = "none"
    eps: float = 1e-5
    """Added to the standard deviation on the way in."""
    ddof: Literal[0, 1] = 1
    """1: the unbiased standard deviation."""
    eps_back: bool = False
    """Whether the way back multiplies by std + eps (else by std)."""
    restore: bool = True
    """Whether the way back happens at all."""


class CoderConfig(Config):
    """A sparse coder without its weights."""

    name: str = ""
    """Key of the coder in runs and results; default: a slug of its first read."""
    reads: tuple[str, ...] = ("input",)
    """Hooks whose activations are concatenated into the input."""
    writes: tuple[str, ...] = ()
    """Hooks that the output is split over; default: the reads."""
    d_in: PositiveInt
    d_out: PositiveInt | None = None
    """Default: `d_in`."""
    write_widths: tuple[PositiveInt, ...] = ()
    """Width of each write; default: `d_out` in equal parts."""
    n_latents: PositiveInt
    activation: Activation
    normalise: Normalise = Normalise()
    input_scale: PositiveFloat = 1.0
    """Fixed factor on the input, after normalisation."""
    output_scale: PositiveFloat = 1.0
    """Fixed factor on the output, before normalisation is undone."""
    pre_bias: Literal["none", "tied", "own"] = "tied"
    """What is subtracted before the encoder: nothing, `b_dec`, or a bias of its own."""
    gate_space: GateSpace = "raw"
    """Where selection and thresholds act: on z, or on z times a number of each latent's.

    `decoder_norm`: the norm of its decoder row. `decoder_norm_sum`: the norms of the row's parts, one a write, added
    up (Lindsey et al. 2024). `own`: a stored vector, `gate_scale`.
    """
    skip: bool = False
    """Whether a linear map of the input is added to the output."""
    input_policy: InputPolicy = InputPolicy()
    model: ModelFingerprint | None = None
    training: dict[str, Any] = {}
    """Provenance: how it was trained, or what a foreign format said beside the maths. Never read by the maths."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled: dict[str, Any] = dict(values)
        reads = filled.get("reads") or ("input",)
        filled["writes"] = filled.get("writes") or reads
        if filled.get("d_out") is None:
            filled["d_out"] = filled.get("d_in")
        filled["name"] = filled.get("name") or slug(str(reads[0]))
        return filled

    @model_validator(mode="after")
    def _check(self) -> Self:
        k = getattr(self.activation, "k", None)
        if k is not None and k > self.n_latents:
            raise ValueError(f"k is {k}, larger than n_latents = {self.n_latents}")
        if self.pre_bias == "tied" and self.d_out != self.d_in:
            raise ValueError(
                f"pre_bias 'tied' needs d_out = d_in, found {self.d_out} and {self.d_in}; use 'none' or 'own'"
            )
        if isinstance(self.activation, GroupMax) and self.n_latents % self.activation.k:
            raise ValueError(f"n_latents = {self.n_latents} cannot be cut into k = {self.activation.k} equal groups")
        if self.normalise.kind == "standardise" and self.normalise.restore and self.d_out != self.d_in:
            raise ValueError(
                f"normalise 'standardise' cannot be undone on an output of {self.d_out}: its input is {self.d_in} "
                "wide; use restore: false"
            )
        if self.write_widths or self.gate_space == "decoder_norm_sum":
            self.parts()
        return self

    def parts(self) -> tuple[int, ...]:
        """Width of each write. `ValueError` where `d_out` is not their sum, or not equal parts by default."""
        widths = self.write_widths or (self.width_out // len(self.writes),) * len(self.writes)
        if len(widths) != len(self.writes) or sum(widths) != self.width_out:
            raise ValueError(
                f"d_out = {self.width_out} is not the sum of the widths {list(widths)} of {len(self.writes)} writes"
            )
        return widths

    @property
    def width_out(self) -> int:
        """`d_out` as a plain integer."""
        return self.d_out if self.d_out is not None else self.d_in
