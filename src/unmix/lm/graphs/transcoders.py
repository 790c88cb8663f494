"""A transcoder at one prompt as a linear thing: what each active latent reads and what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmix.coder.coder_set import CoderSet
from unmix.coder.codes import Codes
from unmix.coder.encoder import AffineEncoder
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ModelError
from unmix.lm.points import split_name
from unmix.lm.splice import check_fingerprint

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel
    from unmix.lm.points import Hook

Coders = SparseCoder | CoderSet | Mapping[str, SparseCoder] | Sequence[SparseCoder]
MLP_OUTPUTS = ("mlp_out", "mlp_out_post")


@dataclass(frozen=True)
class Transcoder:
    """A coder on its hooks of one model."""

    name: str
    coder: SparseCoder
    layer: int
    """The layer that it reads: its latents stand there in a graph."""
    reads: tuple[Hook, ...]
    read_widths: tuple[int, ...]
    writes: tuple[Hook, ...]

    def parts(self, x: Tensor) -> list[Tensor]:
        """`x` [..., d_out] cut by write."""
        return list(x.split(list(self.coder.config.parts()), dim=-1))


@dataclass(frozen=True)
class Active:
    """The latents that fire on a prompt, in order of position and latent id; explicit zeros are left out."""

    latents: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    std: Float[Tensor, "pos 1"] | None
    """What a normalising coder divided each position by."""

    @staticmethod
    def of(codes: Codes, counts: Bool[Tensor, " pos"]) -> Active:
        """Those of `codes` [pos] at positions that count under the coder's policy."""
        rows = codes.token_rows()
        kept = (codes.values != 0) & counts[rows]
        std = codes.context.get("std")
        return Active(
            codes.indices.long()[kept], rows[kept], codes.values.detach()[kept],
            None if std is None else std.detach().reshape(-1, 1),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.latents)


def place(lm: LanguageModel, coders: Coders) -> list[Transcoder]:
    """Coders on their hooks, in order of the layer they read.

    Raises `ModelError`: a coder that does not write MLP outputs or reads what it writes, an encoder that is not affine,
    a skip of a normalised input, two coders of one name or (outside a set) on one output.
    """
    named = dict(coders) if isinstance(coders, Mapping) else _named(coders)
    for name, coder in named.items():
        check_fingerprint(lm, name, coder)
    placed = [_place(lm, name, coder) for name, coder in named.items()]
    if not isinstance(coders, CoderSet):
        owners: dict[str, str] = {}
        for transcoder in placed:
            for hook in transcoder.writes:
                if hook.name in owners:
                    raise ModelError(f"coders {owners[hook.name]!r} and {transcoder.name!r} both write {hook.name}")
                owners[hook.name] = transcoder.name
    return sorted(placed, key=lambda one: one.layer)


def _named(coders: SparseCoder | Sequence[SparseCoder]) -> dict[str, SparseCoder]:
    listed = [coders] if isinstance(coders, SparseCoder) else list(coders)
    named = {coder.name: coder for coder in listed}
    if len(named) < len(listed):
        raise ModelError(f"two coders have one name ({', '.join(c.name for c in listed)}); give {{name: coder}}")
    if not named:
        raise ModelError("there is no coder")
    return named


def _place(lm: LanguageModel, name: str, coder: SparseCoder) -> Transcoder:
    config = coder.config
    if not isinstance(coder.encoder, AffineEncoder):
        raise ModelError(
            f"coder {name!r}: the latents of a {config.activation.kind} coder are not linear in what it reads"
        )
    if config.skip and config.normalise.kind != "none":
        raise ModelError(f"coder {name!r} adds a skip of a normalised input, which is not linear in what it reads")
    reads = tuple(lm.hook(spec) for spec in config.reads)
    writes = tuple(lm.hook(spec) for spec in config.writes)
    for hook in writes:
        if split_name(hook.name)[0] not in MLP_OUTPUTS or "~" in hook.name:
            raise ModelError(
                f"coder {name!r} writes {hook.name}; an attribution graph goes through transcoders, which write "
                "mlp_out or mlp_out_post"
            )
    layer = max(split_name(hook.name)[1] for hook in reads)
    first = min(split_name(hook.name)[1] for hook in writes)
    if first < layer or any(split_name(hook.name)[0] in (*MLP_OUTPUTS, "resid_post") for hook in reads):
        raise ModelError(
            f"coder {name!r} reads {', '.join(config.reads)} and writes {', '.join(config.writes)}: a transcoder reads "
            "what comes before the MLP that it writes"
        )
    inside = [hook.name for hook in reads if split_name(hook.name)[0] == "mlp_act"]
    if inside:
        raise ModelError(f"coder {name!r} reads {inside[0]}, which is not linear in what comes before its MLP")
    widths = tuple(lm.width(hook.name) for hook in reads)
    if sum(widths) != config.d_in:
        raise ModelError(f"coder {name!r} reads {config.d_in} values, {', '.join(config.reads)} have {sum(widths)}")
    for hook, width in zip(writes, config.parts(), strict=True):
        if lm.width(hook.name) != width:
            raise ModelError(
                f"coder {name!r} writes {width} values to {hook.name}, which is {lm.width(hook.name)} wide"
            )
    return Transcoder(name, coder, layer, reads, widths, writes)


def directions(coder: SparseCoder, active: Active, which: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
    """∂(value of each entry)/∂(what the coder reads at its position), with the input's norm held."""
    ids = active.latents[which]
    rows = coder.W_enc.detach()[ids].float()
    if "r_mag" in coder.extra():
        rows = rows * coder.extra()["r_mag"].detach().exp()[ids].unsqueeze(-1)
    config = coder.config
    rows = rows * config.input_scale
    rule = config.normalise
    if rule.kind == "standardise":
        return rows * coder.fixed()["norm_scale"].detach()
    if rule.kind == "none" or active.std is None:
        return rows
    std = active.std[active.positions[which]]
    if rule.kind == "constant_norm":
        return rows / std
    return (rows - rows.mean(-1, keepdim=True)) / (std + rule.eps)


def written(coder: SparseCoder, active: Active, which: Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
    """What each entry adds to the coder's output at its position: value × decoder row, in the output's units."""
    rows = coder.W_dec.detach()[active.latents[which]].float() * active.values[which].unsqueeze(-1)
    rows = rows * coder.config.output_scale
    rule = coder.config.normalise
    if rule.kind == "none" or not rule.restore:
        return rows
    if rule.kind == "standardise":
        return rows / coder.fixed()["norm_scale"].detach()
    if active.std is None:
        return rows
    std = active.std[active.positions[which]]
    return rows * (std + rule.eps if rule.eps_back else std)


def skipped(coder: SparseCoder, x: Tensor) -> Tensor:
    """The linear skip of `x` [..., d_in] in the output's units; gradients flow to `x`."""
    config = coder.config
    return (x.to(coder.dtype) * config.input_scale) @ coder.W_skip.detach().T * config.output_scale
