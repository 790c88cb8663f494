"""What is not trained on a mesh, said before any process meets another."""

from __future__ import annotations

from unmix.coder.config import CoderConfig
from unmix.coder.encoder import ENCODERS
from unmix.core.errors import ConfigError
from unmix.train.config import OptimConfig, objective_of
from unmix.train.objectives.specs import AuxKSpec, L0Spec, L1Spec, MseSpec, TermSpec
from unmix.train.parallel.shard import shard_of

BY_ENTRY = ("adam", "signum", "schedule_free")
"""Optimisers that treat every weight by itself, so that slices of a matrix may be trained apart."""
TERMS = (MseSpec, AuxKSpec, L1Spec, L0Spec)
"""Terms whose value over ranks is known to be that of one process."""


def require_on_mesh(name: str, coder: CoderConfig, config: OptimConfig, data: int, dictionary: int) -> None:
    """`ConfigError` where a coder is not trained on a mesh of `data` × `dictionary` ranks."""
    kind = coder.activation.kind
    if kind in ENCODERS.names():
        raise ConfigError(f"{name}: {kind} coders are not trained on a mesh")
    if dictionary > 1 and config.optimiser not in BY_ENTRY:
        raise ConfigError(
            f"{name}: {config.optimiser} looks at whole matrices, and parallel.dictionary cuts them; "
            f"allowed: {', '.join(BY_ENTRY)}"
        )
    part = shard_of(coder, dictionary)
    if config.k_start is not None and config.k_start > part.n_latents:
        raise ConfigError(f"{name}: k_start is larger than a shard of {part.n_latents} latents; take fewer shards")
    if config.batch % data:
        raise ConfigError(f"{name}: a batch of {config.batch} cannot be cut into {data} equal slices")
    for spec in objective_of(kind, config):
        require_term(name, spec, dictionary)
    if config.held_out:
        raise ConfigError(f"{name}: train.held_out: rows are held out by one process; leave it 0 on a mesh")
    if config.retire:
        raise ConfigError(f"{name}: train.retire: coders leave the training of one process; leave it out on a mesh")
    if config.start_from is not None:
        raise ConfigError(f"{name}: train.start_from: one process goes on from a coder; leave it out on a mesh")
    if config.resample:
        raise ConfigError(f"{name}: train.resample: dead latents are begun anew by one process; leave it out on a mesh")


def require_term(name: str, spec: TermSpec, dictionary: int) -> None:
    """`ConfigError` for a term that is not known to be right on a mesh."""
    if not isinstance(spec, TERMS):
        term = getattr(spec, "term", type(spec).__name__)
        raise ConfigError(f"{name}: the term {term} is not trained on a mesh; allowed: mse, auxk, l1, l0")
    if isinstance(spec, MseSpec) and spec.prefixes and dictionary > 1:
        raise ConfigError(f"{name}: nested prefixes cannot be cut into shards; use parallel.dictionary 1")
