"""One slice of a coder's latents: its config, its first weights, and the way back to the whole coder."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.core.seeds import derive
from unmix.train.parallel.mesh import Mesh

SHARDED = ("W_enc", "b_enc", "W_dec", "gate_scale")
"""Parameters with one row a latent; to these come the activation's own, where they have any dimension."""
ALONE = ("topk", "batchtopk", "jumprelu", "relu")
"""Activations whose latents can be cut into shards."""
CHUNK = 2**24
"""Random numbers drawn at a time."""


def shard_of(config: CoderConfig, parts: int) -> CoderConfig:
    """The config of one of `parts` slices. `ConfigError` where the latents cannot be cut so."""
    n = config.n_latents
    if parts == 1:
        return config
    rule = config.activation
    if rule.kind not in ALONE or getattr(rule, "keep_max", False):
        kind = f"{rule.kind} (keep_max)" if rule.kind in ALONE else rule.kind
        raise ConfigError(
            f"{config.name}: {kind} latents cannot be cut into shards; allowed with parallel.dictionary above 1: "
            f"{', '.join(ALONE)}"
        )
    if n % parts:
        raise ConfigError(f"{config.name}: n_latents = {n} cannot be cut into {parts} equal shards")
    if getattr(rule, "k", 0) > n // parts:
        raise ConfigError(f"{config.name}: k is larger than a shard of {n // parts} latents; take fewer shards")
    return config.model_copy(update={"n_latents": n // parts})


def slice_of(config: CoderConfig, mesh: Mesh) -> slice:
    """Which latents of the whole coder this rank holds."""
    n = config.n_latents // mesh.dictionary
    return slice(mesh.dictionary_index * n, (mesh.dictionary_index + 1) * n)


def is_sharded(coder: SparseCoder, name: str) -> bool:
    """Whether a parameter has one row a latent."""
    return name in SHARDED or (name in coder.extra() and coder.extra()[name].ndim > 0)


@torch.no_grad()
def draw_weights(coder: SparseCoder, config: CoderConfig, seed: int, mesh: Mesh) -> None:
    """Give a slice the weights that these latents have in a fresh coder of one process.

    Every rank draws all F·d numbers and keeps its own, so that none holds more than its slice: 10⁸ numbers a second.
    """
    own, d_in, d_out = slice_of(config, mesh), config.d_in, config.width_out
    generator = torch.Generator().manual_seed(derive(seed, "coder", config.name))
    rows = torch.nn.functional.normalize(drawn_rows(generator, config.n_latents, d_out, own), dim=-1)
    coder.W_dec.copy_(rows)
    if d_in == d_out:
        coder.W_enc.copy_(rows)
    else:
        coder.W_enc.copy_(drawn_rows(generator, config.n_latents, d_in, own) / d_in**0.5)


def drawn_rows(generator: torch.Generator, n: int, d: int, own: slice, chunk: int = CHUNK) -> Float[Tensor, "own d"]:
    """Rows `own` of `torch.randn(n, d)`, a chunk of rows at a time.

    torch fills tensors 16 numbers at a time, and the last 16 once more where their number is no multiple of that: all
    chunks but the last hold a multiple, and the last is no shorter than one.
    """
    step = max(16, chunk // d // 16 * 16)
    starts = [start for start in range(0, n, step) if start == 0 or n - start >= step]
    kept: list[Tensor] = []
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        rows = torch.randn(stop - start, d, generator=generator)
        low, high = max(own.start, start), min(own.stop, stop)
        if low < high:
            kept.append(rows[low - start : high - start].clone())
    return torch.cat(kept)


@torch.no_grad()
def whole_coder(coder: SparseCoder, config: CoderConfig, mesh: Mesh) -> SparseCoder | None:
    """The coder of all slices on rank 0, in evaluation mode on the CPU; None elsewhere. Every rank must call it."""
    if mesh.data_index > 0:
        return None
    state: dict[str, Tensor] = {}
    for name, part in coder.state_dict().items():
        if not is_sharded(coder, name):
            state[name] = part.detach().cpu()
        elif mesh.first:
            others = [mesh.receive(part, rank) for rank in range(1, mesh.dictionary)]
            state[name] = torch.cat([part.detach().cpu(), *others])
        else:
            mesh.send(part)
    if not mesh.first:
        return None
    return SparseCoder.from_state(config.model_copy(update=_scales(coder.config)), state)


def _scales(config: CoderConfig) -> dict[str, float]:
    """What first weights set in the config."""
    return {"input_scale": config.input_scale, "output_scale": config.output_scale}
