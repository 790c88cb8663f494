"""Explaining never sees what scores are counted on, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explain.planted import CAT, DENSE, UNSCORED, UNSEEN, planted_index
from unmix.core.errors import DataError
from unmix.data.config import ROLES
from unmix.explain.results import LatentError
from unmix.explain.windows import ROLES_OF, View, only_roles, open_view
from unmix.index.reader import LatentIndex


def test_the_two_purposes_share_no_role() -> None:
    assert ROLES_OF == {"explaining": ("train", "explain"), "scoring": ("score",)}
    assert set(ROLES_OF["explaining"]).isdisjoint(ROLES_OF["scoring"])


def test_a_window_of_another_role_is_refused(index: LatentIndex) -> None:
    (window,) = index[CAT].top(1, "score")
    assert only_roles([window], ("score",)) == [window]
    with pytest.raises(DataError, match=r"a window of role 'score' \(position \d+\) was offered where only train and"):
        only_roles([window], ROLES_OF["explaining"])


def test_a_view_refuses_windows_that_the_index_would_slip_it(
    index: LatentIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmix.index.latent import Latent

    inner: Callable[..., Any] = Latent.windows
    monkeypatch.setattr(Latent, "windows", lambda self, kind, n, role, *more: inner(self, kind, n, None, *more))
    with pytest.raises(DataError, match="a window of role"):
        open_view(index, "scoring")[DENSE].windows("random", 50)


@pytest.mark.parametrize("purpose", ["explaining", "scoring"])
def test_everything_a_view_gives_has_its_roles(index: LatentIndex, purpose: Any) -> None:
    view = open_view(index, purpose)
    allowed = ROLES_OF[purpose]
    latent = view[DENSE]
    windows = [w for kind in ("quantiles", "top", "random", "importance") for w in latent.windows(kind, 40)]
    silent = [w for kind in ("random", "neighbours", "similar") for w in latent.negatives(5, (2, 2), kind=kind)]
    roles = {w.role for w in [*windows, *silent]}
    assert roles <= set(allowed)
    numbers = [ROLES.index(role) for role in allowed]
    contexts = latent.postings[0] // index.context
    assert set(index.store.role_of[contexts]) <= set(numbers)
    assert set(index.store.role_of[view.sampled]) <= set(numbers)


def test_views_share_no_context_and_no_window(explaining: View, scoring: View) -> None:
    assert not set(explaining.contexts) & set(scoring.contexts)
    assert not set(explaining[DENSE].postings[0]) & set(scoring[DENSE].postings[0])


def test_a_context_of_another_role_is_refused(explaining: View, scoring: View) -> None:
    with pytest.raises(DataError, match="contexts of other roles than train and explain were asked for"):
        explaining.grid_of(scoring.contexts[:1])


def test_what_fires_only_elsewhere_is_unseen(explaining: View, scoring: View) -> None:
    explaining[UNSCORED].require_firings()
    scoring[UNSEEN].require_firings()
    for latent in (explaining[UNSEEN], scoring[UNSCORED]):
        with pytest.raises(LatentError, match="never fires in contexts of the role"):
            latent.require_firings()


def test_an_index_without_scoring_text_is_refused(index: LatentIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    role_of = index.store.role_of
    monkeypatch.setattr(index.store, "role_of", np.zeros_like(role_of))
    monkeypatch.setattr(index.store, "_pools", {})
    with pytest.raises(DataError, match="scoring reads contexts of the role score, and the index holds none"):
        open_view(index, "scoring")


def test_firings_land_on_their_tokens(explaining: View, index: LatentIndex) -> None:
    latent, grid = explaining[CAT], explaining.grid
    places, values = latent.firings(explaining.sampled, grid)
    assert len(places) == len(latent.postings[0]) > 50
    tokens = np.asarray(index.tokens).reshape(-1)[latent.postings[0]]
    assert np.array_equal(grid.level("token")[places], tokens)
    assert np.array_equal(values, latent.postings[1])
    assert grid.counts[places].all()


def test_a_small_budget_samples_uniformly_and_the_same_each_time(index: LatentIndex) -> None:
    coder = index.coder()
    small = [View(index, coder, ("train",), seed=s, tokens=20 * index.context) for s in (0, 0, 1)]
    assert len(small[0].sampled) == 20
    assert np.array_equal(small[0].sampled, small[1].sampled)
    assert not np.array_equal(small[0].sampled, small[2].sampled)
    places, _ = small[0][DENSE].firings(small[0].sampled, small[0].grid)
    contexts = small[0][DENSE].postings[0] // index.context
    assert len(places) == np.isin(contexts, small[0].sampled).sum()


def test_an_index_without_a_vocabulary_names_tokens_by_id(tmp_path: Path) -> None:
    bare = planted_index(tmp_path / "bare", vocab=False)
    table = open_view(bare, "explaining").table
    assert table.strings[3] == "<3>"
