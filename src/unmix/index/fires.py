"""What a latent and a set of latents have in common: windows in which they fire, and windows in which they do not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from unmix.core.errors import ConfigError
from unmix.index.choosing import KINDS, Dedupe, check_draw
from unmix.index.drawing import draw_windows
from unmix.index.filters import Documents, Where, make_filter
from unmix.index.firings import Firings, read_contexts
from unmix.index.layout import RoleFilter
from unmix.index.negatives import KINDS as NEGATIVES
from unmix.index.negatives import draw_neighbours, draw_random, draw_similar
from unmix.index.shared import SharedStore
from unmix.index.similar import Embed
from unmix.index.windows import CONTEXT, Peaks, Window, find_peaks, window_shape

QUERY = 20
"""Strongest windows of its own by which "similar" text is looked for."""


class Fires(ABC):
    """Something that fires at positions.

    `role` is everywhere one role, several, or None for all; `where` asks for values of slicings
    (`{"speaker": "assistant"}`), `documents` for one document id or several. Roles hold for whole contexts. `where` and
    `documents` hold for the position that a window is drawn around, and its other positions may lie outside. Windows
    take `context=(left, right)` positions around it, clipped to the context; with `centred=False` the context is cut
    into tiles of `left + 1 + right` positions instead, so that the place of the peak gives nothing away. Windows of one
    answer never share a position; by `dedupe` they also never hold the same tokens (True), nor mostly the same
    ("near"), or they may (False).
    """

    def __init__(self, store: SharedStore) -> None:
        self._store = store

    @property
    @abstractmethod
    def firings(self) -> Firings:
        """Where it fires."""

    @abstractmethod
    def _stream(self, seed: int, kind: str) -> int:
        """The seed of one draw, its own for everything that fires and every kind."""

    def _nearest(self, neighbours: Sequence[int] | None) -> list[tuple[int, Firings]]:
        """The neighbours named, or the nearest known; `ConfigError` where there can be none."""
        raise ConfigError('negatives of the kind "neighbours" belong to one latent; draw them from index[latent]')

    def top(
        self,
        n: int,
        role: RoleFilter = None,
        context: tuple[int, int] = CONTEXT,
        centred: bool = True,
        *,
        dedupe: Dedupe = True,
        where: Where = None,
        documents: Documents = None,
    ) -> list[Window]:
        """The `n` strongest windows, strongest first; fewer where there are fewer."""
        return self.windows("top", n, role, context, 0, centred, dedupe=dedupe, where=where, documents=documents)

    def windows(
        self,
        kind: str,
        n: int,
        role: RoleFilter = None,
        context: tuple[int, int] = CONTEXT,
        seed: int = 0,
        centred: bool = True,
        *,
        dedupe: Dedupe = True,
        where: Where = None,
        documents: Documents = None,
    ) -> list[Window]:
        """`n` windows in which it fires, strongest first; fewer where there are fewer.

        Args:
            kind: "top"; "quantiles" (evenly over the ten tenths of the peaks by strength); "random" (every peak as
                likely as any other); "importance" (with probability proportional to the strength of the peak, without
                replacement). The last three draw from about 8,000 firings (or 64 for each window wanted), those of a
                uniform sample of contexts, where there are more.
            seed: the draw depends on it, on what fires, and on nothing else (not on segments).
        """
        check_draw(kind, KINDS, n)
        shape = window_shape(context, self._store.context, centred)
        keep = make_filter(self._store, role, where, documents)
        return draw_windows(self.firings, keep, shape, kind, n, self._stream(seed, kind), dedupe)

    def peaks(
        self,
        role: RoleFilter = None,
        context: tuple[int, int] = CONTEXT,
        centred: bool = True,
        *,
        where: Where = None,
        documents: Documents = None,
    ) -> Peaks:
        """Every window that `windows` could draw, strongest first. Reads all firings of the roles or documents."""
        keep = make_filter(self._store, role, where, documents)
        peaks = find_peaks(*read_contexts(self.firings, keep), window_shape(context, self._store.context, centred))
        return peaks.where(keep.keeps(peaks.positions))

    def negatives(
        self,
        kind: str,
        n: int,
        role: RoleFilter = None,
        context: tuple[int, int] = CONTEXT,
        seed: int = 0,
        centred: bool = True,
        *,
        dedupe: Dedupe = True,
        where: Where = None,
        documents: Documents = None,
        neighbours: Sequence[int] | None = None,
        embed: Embed | None = None,
    ) -> list[Window]:
        """`n` windows without any firing.

        Each is drawn around an unmasked position. A masked position inside a window counts as silent, for it was never
        indexed.

        Args:
            kind: "random", from as many different contexts as there are, fewer only where no more exist;
                "neighbours", around peaks of the latents most alike (`neighbours`, or those that fire together with it
                most), from each in turn; "similar", from the text most alike to its own strongest windows of the same
                roles, most alike first, by one BM25 index over at most 200,000 stretches of text.
            neighbours: for "neighbours", ids of latents of the same coder, the most alike first: say by decoder cosine.
            embed: for "similar", texts → vectors; likeness is then the cosine, over at most 20,000 stretches of text
                that are embedded once for all latents.
        """
        check_draw(kind, NEGATIVES, n)
        for name, value, belongs in (("neighbours", neighbours, "neighbours"), ("embed", embed, "similar")):
            if value is not None and kind != belongs:
                raise ConfigError(f'{name}= belongs to negatives of the kind "{belongs}", this is "{kind}"')
        shape = window_shape(context, self._store.context, centred)
        keep = make_filter(self._store, role, where, documents)
        seed = self._stream(seed, f"negatives-{kind}")
        if kind == "neighbours":
            return draw_neighbours(self.firings, self._nearest(neighbours), keep, shape, n, seed, dedupe)
        if kind == "similar":
            own = draw_windows(
                self.firings,
                keep.without_positions(),
                window_shape(CONTEXT, self._store.context, True),
                "top",
                QUERY,
                0,
            )
            return draw_similar(self.firings, own, keep, shape, n, dedupe, embed)
        return draw_random(self.firings, keep, shape, n, seed, dedupe)
