"""Chosen windows against a slow oracle, and what must never happen to them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.oracle import Stream, bounds, greedy, make_stream, peaks, rebuilt, streams, write
from unmix.core.errors import ConfigError
from unmix.data.config import ROLES
from unmix.index.reader import LatentIndex
from unmix.index.windows import Window, tenths

sides = st.integers(0, 6)
roles = st.sampled_from([None, "train", "explain", ("explain", "score")])


def spans(windows: list[Window], context: int) -> list[tuple[int, int]]:
    return [(w.context_id * context + w.start, w.context_id * context + w.start + len(w.tokens)) for w in windows]


def same(left: list[Window], right: list[Window]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.values, b.values)
        fields = ("document", "position", "context_id", "start", "role", "strings", "peak_at", "quantile")
        assert [getattr(a, f) for f in fields] == [getattr(b, f) for f in fields]


def allowed(role: object) -> set[str]:
    return set(ROLES) if role is None else {role} if isinstance(role, str) else set(role)  # pyright: ignore


def check(index: LatentIndex, stream: Stream, latent: int, windows: list[Window], role: object) -> None:
    """What holds for windows of every kind."""
    ctx = stream.context
    dense = rebuilt(index, "a", latent)
    taken = spans(windows, ctx)
    for window, (start, end) in zip(windows, taken, strict=True):
        assert start // ctx == (end - 1) // ctx == window.context_id
        np.testing.assert_array_equal(window.tokens, stream.tokens.reshape(-1)[start:end])
        np.testing.assert_array_equal(window.values, dense[start:end])
        assert window.position == start + window.peak_at and start <= window.position < end
        assert window.document == stream.documents.reshape(-1)[window.position]
        assert window.role == ROLES[stream.roles[window.context_id]] and window.role in allowed(role)
    assert all(a_end <= b or b_end <= a for (a, a_end), (b, b_end) in combinations(taken, 2))
    assert len({tuple(w.tokens) for w in windows}) == len(windows)


@settings(max_examples=30, deadline=None)
@given(stream=streams, left=sides, right=sides, centred=st.booleans(), role=roles, n=st.integers(0, 9))
def test_top_is_the_greedy_choice_among_peaks(
    stream: Stream, left: int, right: int, centred: bool, role: object, n: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    index = write(tmp_path_factory.mktemp("index") / "i", stream)
    for latent in range(stream.codes["a"].shape[-1]):
        found = index[latent].top(n, role=role, context=(left, right), centred=centred)
        truth = peaks(rebuilt(index, "a", latent, role), stream.context, left, right, centred)
        expected = greedy(truth, stream.tokens.reshape(-1), n)
        assert [(w.position, *s) for w, s in zip(found, spans(found, stream.context), strict=True)] == expected
        check(index, stream, latent, found, role)
        assert all(abs(w.peak) == np.abs(w.values).max() for w in found)


@settings(max_examples=25, deadline=None)
@given(stream=streams, left=sides, right=sides, centred=st.booleans(), role=roles, n=st.integers(0, 25))
def test_quantiles_and_random_draw_from_the_peaks(
    stream: Stream, left: int, right: int, centred: bool, role: object, n: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    index = write(tmp_path_factory.mktemp("index") / "i", stream)
    for latent in range(stream.codes["a"].shape[-1]):
        truth = peaks(rebuilt(index, "a", latent, role), stream.context, left, right, centred)
        rank = {peak: i for i, peak in enumerate(truth)}
        for kind in ("quantiles", "random"):
            found = index[latent].windows(kind, n, role=role, context=(left, right), centred=centred, seed=3)
            check(index, stream, latent, found, role)
            places = [rank[(w.position, *s)] for w, s in zip(found, spans(found, stream.context), strict=True)]
            assert places == sorted(places)
            assert len(found) <= n
            if kind == "quantiles":
                assert [w.quantile for w in found] == [(len(truth) - 1 - i) * 10 // len(truth) for i in places]
            else:
                assert all(w.quantile is None for w in found)
            if n >= len(truth):
                # Every peak was asked: what is missing collides with what was taken.
                assert len(found) == len(greedy([truth[i] for i in places], stream.tokens.reshape(-1), n))
                for i, (_, start, end) in enumerate(truth):
                    text = tuple(stream.tokens.reshape(-1)[start:end])
                    collides = any(start < e and s < end for s, e in spans(found, stream.context))
                    assert i in places or collides or text in {tuple(w.tokens) for w in found}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stream, LatentIndex]:
    """Enough firings for every tenth to be full."""
    stream = make_stream(1, n_contexts=400, context=32, vocab=5000, density=0.05)
    return stream, write(tmp_path_factory.mktemp("index") / "i", stream, batch=64)


@pytest.mark.parametrize("n", [1, 7, 10, 20, 40, 43])
def test_quantiles_share_n_evenly(rich: tuple[Stream, LatentIndex], n: int) -> None:
    _, index = rich
    for latent in np.flatnonzero(index["a"].figures.firings > 300):
        found = index[int(latent)].windows("quantiles", n, context=(2, 2))
        counts = np.bincount([w.quantile for w in found if w.quantile is not None], minlength=10)
        assert counts.sum() == n and counts.max() - counts.min() <= 1


def test_a_tenth_holds_a_tenth() -> None:
    assert np.bincount(tenths(1000)).tolist() == [100] * 10
    assert tenths(3).tolist() == [6, 3, 0]
    assert tenths(0).tolist() == []


def test_draws_depend_on_seed_latent_and_nothing_else(rich: tuple[Stream, LatentIndex], tmp_path: Path) -> None:
    stream, index = rich
    again = write(tmp_path / "i", stream, batch=3, budget_bytes=1, segment_tokens=30 * stream.context)
    assert len(again.description.segments) > 10
    for latent in range(5):
        for role in (None, "explain", ("train", "score")):
            for kind in ("top", "quantiles", "random"):
                args = (kind, 15, role, (4, 3), 11)
                same(index[latent].windows(*args), again[latent].windows(*args))
            same(index[latent].negatives("random", 9, role), again[latent].negatives("random", 9, role))
    busy = int(index["a"].ranking("frequency")[0])
    for draw in ("windows", "negatives"):
        drawn = [
            [w.position for w in getattr(index[busy], draw)("random", 20, seed=seed, context=(2, 2))]
            for seed in (0, 0, 1)
        ]
        assert drawn[0] == drawn[1] != drawn[2]


def test_random_reaches_every_peak(rich: tuple[Stream, LatentIndex]) -> None:
    _, index = rich
    latent = int(index["a"].ranking("frequency")[2])
    total = len(index[latent].peaks(context=(1, 1)))
    seen = {
        w.position for seed in range(40) for w in index[latent].windows("random", total // 4, context=(1, 1), seed=seed)
    }
    assert len(seen) > 0.98 * total


def test_roles_never_share_a_position(rich: tuple[Stream, LatentIndex]) -> None:
    stream, index = rich
    for latent in range(4):
        drawn: dict[str, set[int]] = {}
        for role in ROLES:
            windows = index[latent].windows("quantiles", 40, role=role) + index[latent].negatives(
                "random", 40, role=role
            )
            drawn[role] = {p for s, e in spans(windows, stream.context) for p in range(s, e)}
        assert all(not drawn[a] & drawn[b] for a, b in combinations(ROLES, 2))


@settings(max_examples=30, deadline=None)
@given(stream=streams, left=sides, right=sides, centred=st.booleans(), role=roles, n=st.integers(0, 30))
def test_negatives_are_silent_and_only_short_where_no_more_exist(
    stream: Stream, left: int, right: int, centred: bool, role: object, n: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    index = write(tmp_path_factory.mktemp("index") / "i", stream)
    ctx = stream.context
    for latent in range(stream.codes["a"].shape[-1]):
        dense = rebuilt(index, "a", latent)
        found = index[latent].negatives("random", n, role=role, context=(left, right), centred=centred)
        check(index, stream, latent, found, role)
        taken = spans(found, ctx)
        for window, (start, end) in zip(found, taken, strict=True):
            assert not dense[start:end].any() and not window.values.any() and window.peak == 0
            assert (start, end) == bounds(window.position, ctx, left, right, centred)
            assert stream.mask.reshape(-1)[window.position]
        if len(found) < n:
            texts = {tuple(w.tokens) for w in found}
            for position in np.flatnonzero(stream.mask.reshape(-1)):
                if ROLES[stream.roles[position // ctx]] not in allowed(role):
                    continue
                start, end = bounds(int(position), ctx, left, right, centred)
                free = not dense[start:end].any() and not any(start < e and s < end for s, e in taken)
                assert not free or tuple(stream.tokens.reshape(-1)[start:end]) in texts


def test_negatives_come_from_different_contexts_first(rich: tuple[Stream, LatentIndex]) -> None:
    stream, index = rich
    found = index[4].negatives("random", 400, context=(1, 1))
    assert len(found) == 400 and len({w.context_id for w in found}) == 400
    more = index[4].negatives("random", 900, context=(1, 1))
    assert len(more) == 900
    assert set(np.bincount([w.context_id for w in more], minlength=400).tolist()) <= {2, 3}
    assert len({int(w.position) % stream.context for w in more}) == stream.context


def test_a_latent_that_always_fires_has_no_negatives_and_a_dead_one_no_windows(tmp_path: Path) -> None:
    stream = make_stream(2, n_latents=3)
    stream.mask[:] = True
    stream.codes["a"][..., 0] = 1.0
    index = write(tmp_path / "i", stream)
    assert index[0].negatives("random", 5) == []
    assert index[2].top(5) == index[2].windows("quantiles", 5) == index[2].windows("random", 5) == []
    assert len(index[2].negatives("random", 5)) == 5
    assert (index[2].max, index[2].frequency, index[2].mean, index[2].top_tokens()) == (0.0, 0.0, 0.0, [])


def test_identical_text_is_shown_once(tmp_path: Path) -> None:
    stream = make_stream(3, n_contexts=10, context=4, n_latents=1)
    stream.mask[:], stream.tokens[:], stream.codes["a"][:] = True, [1, 2, 3, 4], 0
    stream.codes["a"][:, 1, 0] = np.arange(1, 11)
    index = write(tmp_path / "i", stream)
    assert [w.position for w in index[0].top(5, context=(1, 2))] == [37]
    assert len(index[0].windows("random", 5, context=(1, 2))) == 1


def test_one_token_contexts(tmp_path: Path) -> None:
    stream = make_stream(4, n_contexts=50, context=1, vocab=1000)
    index = write(tmp_path / "i", stream, batch=7)
    for window in index[0].top(10) + index[0].negatives("random", 10):
        assert len(window.tokens) == len(window.values) == 1 and window.start == window.peak_at == 0


def test_windows_carry_token_strings(tmp_path: Path) -> None:
    stream = make_stream(5)
    vocab = ["<a>", " b", "\n", "é", "", '"', "☃"]
    index = write(tmp_path / "i", stream, vocab=vocab)
    for window in index[0].top(3):
        assert window.strings == [vocab[t] for t in window.tokens]
    assert write(tmp_path / "j", stream)[0].top(1)[0].strings is None


def test_a_notebook_shows_hostile_tokens_as_text(tmp_path: Path) -> None:
    stream = make_stream(6)
    index = write(tmp_path / "i", stream, vocab=["<script>alert(1)</script>"] * 7)
    shown = index[0]._repr_html_()
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert shown.count("<div") == 1 + len(index[0].top(5)) and "&lt;latent 0 of &#x27;a&#x27;" in shown
    assert "&lt;3&gt;" in "".join(latent._repr_html_() for latent in write(tmp_path / "j", stream)["a"])


def test_misspelt_arguments(rich: tuple[Stream, LatentIndex]) -> None:
    latent = rich[1][0]
    for call, message in [
        (lambda: latent.top(3, role="explian"), r"unknown role 'explian'. Did you mean 'explain'\?"),
        (
            lambda: latent.negatives("random", 3, role=("score", "nope")),
            "unknown role 'nope'. Allowed: train",
        ),
        (lambda: latent.windows("quantile", 3), r"unknown kind of windows 'quantile'. Did you mean 'quantiles'\?"),
        (lambda: latent.negatives("hard", 3), r"unknown kind of windows 'hard'. Allowed: random\."),
        (lambda: latent.top(-1), "n is -1, expected 0 or more"),
        (lambda: latent.top(1, context=(-1, 2)), r"context is \(-1, 2\), expected two sizes of 0 or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()
