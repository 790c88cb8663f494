"""What every source of an index is: a fixed list of contexts, any range of which comes encoded, the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from unmix.index.batch import IndexBatch


@runtime_checkable
class Source(Protocol):
    """Contexts 0 … `n_contexts` − 1 with their codes.

    One range gives the same bytes in any process, on any day: an implementation cuts its work at fixed multiples,
    whatever is asked for.
    """

    @property
    def latents(self) -> dict[str, int]:
        """Number of latents of each coder, by coder name."""
        ...

    @property
    def context(self) -> int:
        """Positions in a context."""
        ...

    @property
    def n_contexts(self) -> int:
        """How many contexts there are in all."""
        ...

    @property
    def vocab(self) -> list[str] | None:
        """Display string of every token id; None where nothing is known of them."""
        ...

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids; None where it is not known."""
        ...

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the role numbers."""
        ...

    @property
    def slices(self) -> dict[str, tuple[str, ...]]:
        """Slicings of the positions: name → names of its values."""
        ...

    @property
    def meta(self) -> dict[str, Any]:
        """Facts kept in the index, plain JSON."""
        ...

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the bytes, plain JSON by name: hashes of model, coders, data, policy, batch …

        A build goes on only where all of them are as they were, and says which is not.
        """
        ...

    def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
        """Contexts [first, last) in order, as batches of any size."""
        ...


Open = Callable[[], Source]
"""Opens a source. Where other processes shall work too it is picklable: a `functools.partial` of a function of some
module with plain arguments."""
