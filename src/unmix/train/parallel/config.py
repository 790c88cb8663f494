"""How a training is laid out over processes."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from unmix.core.config import Config


class ParallelConfig(Config):
    """The mesh of `torchrun -m unmix train …`; one process needs none."""

    data: PositiveInt | None = None
    """Slices that each batch is cut into; default: the number of processes of a team over `dictionary`."""
    dictionary: PositiveInt = 1
    """Slices that the latents of every coder are cut into."""
    coders: PositiveInt = 1
    """Teams of data × dictionary processes that the coders of a run are dealt to."""
    timeout: PositiveFloat = 300.0
    """Seconds that a rank waits for the others before it gives up and stops."""
