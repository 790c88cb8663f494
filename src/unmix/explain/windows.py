"""What may be seen: explaining reads contexts of the roles `train` and `explain`, scoring those of `score`.

Everything that explainers and scorers know of an index comes through a `View`, which names its roles in every read;
`only_roles` is the one place that refuses what does not belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64

from unmix.core.errors import DataError
from unmix.core.seeds import derive
from unmix.explain.grids import Grid
from unmix.explain.results import LatentError
from unmix.explain.words import TokenTable
from unmix.index.latent import Latent
from unmix.index.reader import CoderIndex, LatentIndex
from unmix.index.windows import Window

Purpose = Literal["explaining", "scoring"]
ROLES_OF: dict[Purpose, tuple[str, ...]] = {"explaining": ("train", "explain"), "scoring": ("score",)}
TOKENS_READ = 1_000_000
"""Positions of a view's shared sample at most; below that a view reads all of its contexts."""


def only_roles(windows: Sequence[Window], roles: Sequence[str]) -> list[Window]:
    """`windows`, if every one is of an allowed role; else `DataError` (scoring must not see what explaining saw)."""
    for window in windows:
        if window.role not in roles:
            raise DataError(
                f"a window of role {window.role!r} (position {window.position}) was offered where only "
                f"{' and '.join(roles)} may be seen"
            )
    return list(windows)


def open_view(index: LatentIndex, purpose: Purpose, coder: str | None = None, seed: int = 0) -> View:
    """What `purpose` may see of one coder. `DataError` where the index holds no context of its roles."""
    roles = ROLES_OF[purpose]
    present = tuple(role for role in roles if role in index.roles and len(index.contexts_of(role)))
    if not present:
        raise DataError(
            f"{index.folder}: {purpose} reads contexts of the role {' or '.join(roles)}, and the index holds none; "
            "index text that has these roles (data.roles)"
        )
    return View(index, index.coder(coder), present, seed)


class View:
    """One coder's latents, seen through the contexts of some roles only."""

    def __init__(
        self, index: LatentIndex, coder: CoderIndex, roles: tuple[str, ...], seed: int = 0, tokens: int = TOKENS_READ
    ) -> None:
        self.index, self.coder, self.roles, self.seed = index, coder, roles, seed
        self._budget = max(tokens // index.context, 1)

    def __getitem__(self, latent: int) -> LatentView:
        """One latent; `ConfigError` where there is none."""
        return LatentView(self, self.coder[latent])

    @cached_property
    def table(self) -> TokenTable:
        """The vocabulary; where the index holds none, tokens are named by id."""
        vocab = self.index.store.vocab
        if vocab is None:
            vocab = [f"<{i}>" for i in range(int(self.index.tokens.max()) + 1)]
        return TokenTable(vocab)

    @cached_property
    def contexts(self) -> Int64[np.ndarray, " contexts"]:
        """All contexts of the view's roles, ascending."""
        return self.index.contexts_of(self.roles)

    @cached_property
    def sampled(self) -> Int64[np.ndarray, " sampled"]:
        """A uniform sample of `contexts`, ascending: all of them where the budget allows."""
        if len(self.contexts) <= self._budget:
            return self.contexts
        rng = np.random.default_rng(derive(self.seed, "sample", *self.roles))
        return np.sort(rng.choice(self.contexts, self._budget, replace=False))

    @cached_property
    def grid(self) -> Grid:
        """The sampled contexts."""
        return self.grid_of(self.sampled)

    def grid_of(self, contexts: Int64[np.ndarray, " n"]) -> Grid:
        """Some contexts of the view's roles, laid out for matching. `DataError` for a context of another role."""
        if not np.isin(contexts, self.contexts).all():
            raise DataError(f"contexts of other roles than {' and '.join(self.roles)} were asked for")
        return Grid(self.table, np.asarray(self.index.tokens[contexts]), self.index.mask(contexts))


class LatentView:
    """One latent in a view."""

    def __init__(self, view: View, latent: Latent) -> None:
        self.view, self.latent, self.id = view, latent, latent.id

    def windows(
        self, kind: str, n: int, context: tuple[int, int] = (16, 15), centred: bool = True, seed: int = 0
    ) -> list[Window]:
        """Windows in which it fires, as `Latent.windows`, of the view's roles only."""
        roles = self.view.roles
        return only_roles(self.latent.windows(kind, n, roles, context, self._seed(seed), centred), roles)

    def negatives(
        self,
        n: int,
        context: tuple[int, int] = (16, 15),
        centred: bool = True,
        seed: int = 0,
        kind: str = "random",
    ) -> list[Window]:
        """Windows in which it is silent, of the view's roles only. `kind`: as of `Latent.negatives`.

        "similar" looks for them by the latent's own windows of the same roles; "neighbours" takes the order of the
        neighbours from co-firing over all roles, and the windows from the view's.
        """
        roles = self.view.roles
        return only_roles(self.latent.negatives(kind, n, roles, context, self._seed(seed), centred), roles)

    def _seed(self, seed: int) -> int:
        return derive(self.view.seed, "+".join(self.view.roles), seed)

    @cached_property
    def postings(self) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Global positions, ascending, and activations of every firing in the view's roles; explicit zeros left out."""
        positions, values = self.latent.postings(self.view.roles)
        return positions.astype(np.int64)[values != 0], values[values != 0]

    def firings(
        self, contexts: Int64[np.ndarray, " contexts"], grid: Grid
    ) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Places in `grid` (which holds `contexts`, ascending) and activations of the firings there."""
        positions, values = self.postings
        if not len(contexts):
            return positions[:0], values[:0]
        context, offset = np.divmod(positions, grid.length)
        row = np.minimum(np.searchsorted(contexts, context), len(contexts) - 1)
        here = contexts[row] == context
        return grid.places(row[here], offset[here]), values[here]

    def require_firings(self) -> None:
        """`LatentError` `NoFirings` where the latent never fires in the view's roles."""
        if not len(self.postings[0]):
            roles = " or ".join(self.view.roles)
            raise LatentError("NoFirings", f"latent {self.id} never fires in contexts of the role {roles}")
