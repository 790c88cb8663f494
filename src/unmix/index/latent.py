"""`Latent`: one latent of an open index."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt64

from unmix.core.errors import ConfigError, did_you_mean
from unmix.index.figures import Figures
from unmix.index.layout import RoleFilter, role_ids
from unmix.index.negatives import choose_silent
from unmix.index.statistics import TOP_TOKENS, histogram_edges, top_tokens
from unmix.index.store import PostingStore, TokenStore
from unmix.index.windows import CONTEXT, Peaks, Window, choose, find_peaks, stream, tenths, window_shape
from unmix.metrics.windows import window_html

KINDS = ("quantiles", "top", "random")
NEGATIVES = ("random",)


@dataclass(frozen=True)
class TopToken:
    """A token on which a latent fires."""

    token: int
    string: str | None
    sum: float
    """Summed strength (|activation|) over the token's firings."""
    count: int

    @property
    def mean(self) -> float:
        """Mean strength over the token's firings."""
        return self.sum / self.count


class Latent:
    """Postings, windows and figures of one latent. Reads on demand; holds nothing but where to look.

    `role` is everywhere one role, several, or None for all. Windows take `context=(left, right)` positions
    around their peak, clipped to the context; with `centred=False` the context is cut into tiles of
    `left + 1 + right` positions instead, so that the place of the peak gives nothing away.
    """

    def __init__(self, coder: str, id: int, store: TokenStore, postings: PostingStore, figures: Figures) -> None:
        self.coder, self.id = coder, id
        self._store, self._postings, self._figures = store, postings, figures

    def __repr__(self) -> str:
        return f"<latent {self.id} of {self.coder!r}: frequency {self.frequency:.4%}, max {self.max:.4g}>"

    def _repr_html_(self) -> str:
        """Its five strongest windows, shaded, for notebooks."""
        shown = [
            window_html(
                w.strings or [f"<{token}>" for token in w.tokens], w.values.tolist(), self.max, w.peak_at
            )
            for w in self.top(5)
        ]  # fmt: skip
        return f"<div><code>{html.escape(repr(self))}</code>{''.join(shown)}</div>"

    @property
    def frequency(self) -> float:
        """Share of the unmasked positions on which it fires, over all roles."""
        return float(self._figures.frequency[self.id])

    @property
    def max(self) -> float:
        """Largest |activation| over all roles; 0.0 where it never fires."""
        return float(self._figures.max[self.id])

    @property
    def mean(self) -> float:
        """Mean activation where it fires, over all roles."""
        return float(self._figures.mean[self.id])

    def histogram(self) -> tuple[Float64[np.ndarray, " 65"], Int64[np.ndarray, " 64"]]:
        """`(edges, counts)` of |activation| over all roles, in half octaves; the outer edges are 0 and infinity."""
        return histogram_edges(), np.asarray(self._figures.histogram[self.id])

    def postings(self, role: RoleFilter = None) -> tuple[UInt64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Global positions, ascending, and activations of every firing in the given roles."""
        positions, values = self._read(role)
        return positions.astype(np.uint64), values

    def top_tokens(self, n: int = TOP_TOKENS, role: RoleFilter = None) -> list[TopToken]:
        """The `n` tokens with the largest summed strength, at most ten.

        Without a role these are the stored figures; with one they are counted from the role's own postings,
        so that nothing of other roles shows.
        """
        if not 0 <= n <= TOP_TOKENS:
            raise ConfigError(f"n is {n}, expected 0 to {TOP_TOKENS}: an index keeps {TOP_TOKENS} top tokens")
        if role is None:
            stored = (self._figures.top_token_ids, self._figures.top_token_sums, self._figures.top_token_counts)
            ids, sums, counts = (field[self.id] for field in stored)
        else:
            positions, values = self._read(role)
            tokens = self._store.tokens.reshape(-1)[positions]
            latent, strength = np.zeros(len(tokens), np.int64), np.abs(values).astype(np.float64)
            found = top_tokens(np.array([len(tokens)]), latent, tokens, strength)
            ids, sums, counts = (field[0] for field in found)
        strings = self._store.strings(np.maximum(ids, 0))
        return [
            TopToken(int(ids[i]), strings[i] if strings else None, float(sums[i]), int(counts[i]))
            for i in range(n)
            if counts[i]
        ]

    def top(
        self, n: int, role: RoleFilter = None, context: tuple[int, int] = CONTEXT, centred: bool = True
    ) -> list[Window]:
        """The `n` strongest windows, strongest first; fewer where there are fewer."""
        return self.windows("top", n, role, context, centred=centred)

    def windows(
        self,
        kind: str,
        n: int,
        role: RoleFilter = None,
        context: tuple[int, int] = CONTEXT,
        seed: int = 0,
        centred: bool = True,
    ) -> list[Window]:
        """`n` windows in which the latent fires, strongest first; fewer where there are fewer.

        Args:
            kind: "quantiles" (evenly over the ten tenths of the peaks by strength), "top" or "random".
            seed: the draw depends on it, on the coder's name and on the latent, and on nothing else.
        """
        _check(kind, KINDS, n)
        shape = window_shape(context, self._store.context, centred)
        positions, values = self._read(role)
        peaks = find_peaks(positions, values, shape)
        taken = choose(peaks, kind, n, stream(seed, kind, self.coder, self.id), self._store)
        tenth = tenths(len(peaks)) if kind == "quantiles" else None
        return [
            self._window(
                positions, values, int(peaks.positions[i]), int(peaks.starts[i]), int(peaks.ends[i]),
                None if tenth is None else int(tenth[i]),
            )
            for i in taken
        ]  # fmt: skip

    def peaks(self, role: RoleFilter = None, context: tuple[int, int] = CONTEXT, centred: bool = True) -> Peaks:
        """Every window that `windows` draws from, strongest first."""
        return find_peaks(*self._read(role), window_shape(context, self._store.context, centred))

    def negatives(
        self,
        kind: str,
        n: int,
        role: RoleFilter = None,
        context: tuple[int, int] = CONTEXT,
        seed: int = 0,
        centred: bool = True,
    ) -> list[Window]:
        """`n` windows without any firing of the latent; fewer only where no more exist.

        Each is drawn around an unmasked position, from as many different contexts as there are. A masked
        position inside a window counts as silent, for it was never indexed.
        """
        _check(kind, NEGATIVES, n)
        shape = window_shape(context, self._store.context, centred)
        pool = self._store.contexts_of(role)
        positions, values = self._read(role)
        seed = stream(seed, f"negatives-{kind}", self.coder, self.id)
        found = choose_silent(positions, pool, shape, n, seed, self._store)
        return [self._window(positions, values, anchor, start, end) for anchor, start, end in found]

    def _read(self, role: RoleFilter) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        wanted = role_ids(self._store.roles, role)
        positions, values = self._postings.read(self.id)
        if wanted is None:
            return positions, values
        keep = np.isin(self._store.role_of[positions // self._store.context], wanted)
        return positions[keep], values[keep]

    def _window(
        self,
        positions: Int64[np.ndarray, " n"],
        values: Float32[np.ndarray, " n"],
        position: int,
        start: int,
        end: int,
        quantile: int | None = None,
    ) -> Window:
        store = self._store
        context = position // store.context
        tokens = store.tokens.reshape(-1)[start:end].astype(np.int64)
        first, last = np.searchsorted(positions, (start, end))
        shown = np.zeros(end - start, np.float32)
        shown[positions[first:last] - start] = values[first:last]
        return Window(
            tokens, shown, int(store.documents.reshape(-1)[position]), position, context,
            start - context * store.context, store.roles[int(store.role_of[context])], store.strings(tokens),
            position - start, quantile,
        )  # fmt: skip


def _check(kind: str, kinds: tuple[str, ...], n: int) -> None:
    if kind not in kinds:
        raise ConfigError(f"unknown kind of windows {kind!r}. {did_you_mean(kind, kinds)}")
    if n < 0:
        raise ConfigError(f"n is {n}, expected 0 or more")
