"""Chosen windows against a slow oracle, and what must never happen to them."""

from __future__ import annotations

import pickle
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.oracle import Stream, greedy, make_stream, peaks, rebuilt, streams, write
from index.sliced import Sliced, filters, make_sliced, sliced_streams, write_sliced
from unmix.core.errors import ConfigError
from unmix.core.seeds import derive
from unmix.data.config import ROLES
from unmix.index.choosing import by_importance, shuffled, tenths
from unmix.index.reader import LatentIndex
from unmix.index.windows import Window

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


@settings(max_examples=15, deadline=None)
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


@settings(max_examples=12, deadline=None)
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
    fresh = index[0].top(1)[0]
    sent = pickle.dumps(fresh)
    assert len(sent) < 2000 and b"vocab" in sent and pickle.loads(sent).strings == fresh.strings
    assert "strings" not in repr(index[0].top(1)[0]) and "vocab" not in repr(fresh)
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
        (
            lambda: latent.negatives("hard", 3),
            r"unknown kind of windows 'hard'. Allowed: random, neighbours, similar\.",
        ),
        (lambda: latent.top(-1), "n is -1, expected 0 or more"),
        (lambda: latent.top(1, context=(-1, 2)), r"context is \(-1, 2\), expected two sizes of 0 or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()


@settings(max_examples=15, deadline=None)
@given(
    sliced=sliced_streams, keep=filters, left=sides, right=sides, centred=st.booleans(), n=st.integers(0, 9),
    some=st.booleans(), kind=st.sampled_from(["top", "quantiles", "random", "importance"]),
)  # fmt: skip
def test_filters_keep_peaks_by_their_position(
    sliced: Sliced, keep: dict[str, Any], left: int, right: int, centred: bool, n: int, some: bool, kind: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    index = write_sliced(tmp_path_factory.mktemp("index") / "i", sliced)
    documents = np.unique(sliced.stream.documents)[::2].tolist() if some else None
    fits = sliced.keeps(**keep, documents=documents)
    shape: dict[str, Any] = {"context": (left, right), "centred": centred}
    tokens = sliced.stream.tokens.reshape(-1)
    for latent in range(index["a"].n_latents):
        truth = peaks(rebuilt(index, "a", latent), sliced.stream.context, left, right, centred)
        truth = [peak for peak in truth if fits[peak[0]]]
        listed = index[latent].peaks(**shape, **keep, documents=documents)
        assert list(zip(listed.positions, listed.starts, listed.ends, strict=True)) == truth
        found = index[latent].windows(kind, n, **shape, **keep, documents=documents)
        check(index, sliced.stream, latent, found, keep.get("role"))
        expected = greedy(truth, tokens, n)
        taken = [(w.position, *span) for w, span in zip(found, spans(found, index.context), strict=True)]
        assert taken == expected if kind == "top" else set(taken) <= set(truth)
        assert kind == "top" or bool(found) == bool(truth and n)


def test_unknown_filters(tmp_path: Path) -> None:
    index = write_sliced(tmp_path / "i", make_sliced(3))
    plain = write(tmp_path / "j", make_stream(3))
    for call, message in [
        (lambda: index[0].top(3, where={"speakers": "user"}), r"unknown slicing 'speakers'. Did you mean 'speaker'"),
        (
            lambda: index[0].top(3, where={"speaker": "asistant"}),
            r"slicing 'speaker' has no value 'asistant'. Did you mean 'assistant'",
        ),
        (
            lambda: index[0].negatives("random", 3, where={"label": ["code", "x"]}),
            "'label' has no value 'x'. Allowed: ",
        ),
        (lambda: index[0].top(3, documents=99), r"no document 99 in this index: it holds \d documents, ids 0 to 8"),
        (lambda: plain[0].top(3, where={"speaker": "user"}), "unknown slicing 'speaker'. This index has none."),
        (lambda: index[0].top(3, dedupe="nearly"), "dedupe is 'nearly', expected True, False or \"near\""),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()


def test_importance_draws_in_proportion_to_strength(tmp_path: Path) -> None:
    strengths = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    share = strengths / 10
    drawn = np.zeros((4, 4))
    for seed in range(5000):
        drawn[tuple(by_importance(strengths, derive(seed))[:2])] += 1
    np.testing.assert_allclose(drawn.sum(axis=1) / 5000, share, atol=0.025)
    law = share[:, None] * share[None, :] / (1 - share)[:, None]  # without replacement
    np.fill_diagonal(law, 0)
    np.testing.assert_allclose(drawn / 5000, law, atol=0.025)

    stream = make_stream(3, n_contexts=4, context=4, n_latents=1, vocab=10**6)
    stream.mask[:], stream.codes["a"][:] = True, 0
    stream.codes["a"][:, 1, 0] = [1, 2, -3, 10]
    latent = write(tmp_path / "i", stream)[0]
    one = [latent.windows("importance", 1, seed=seed)[0].context_id for seed in range(80)]
    assert 35 <= one.count(3) <= 65 and one.count(0) < one.count(2)
    assert [w.peak for w in latent.windows("importance", 4)] == [10, -3, 2, 1]


def test_dedupe(tmp_path: Path) -> None:
    stream = make_stream(3, n_contexts=12, context=8, n_latents=1)
    stream.mask[:], stream.tokens[:], stream.codes["a"][:] = True, np.arange(8), 0
    stream.tokens[6:9, 7] = 50  # one token changed: most pairs of neighbours are the same
    stream.tokens[9:] = np.arange(24).reshape(3, 8) + 100
    stream.codes["a"][:, 3, 0] = np.arange(12, 0, -1)
    latent = write(tmp_path / "i", stream)[0]
    found = {d: [w.context_id for w in latent.top(20, dedupe=d)] for d in (True, False, "near")}
    assert found == {True: [0, 6, 9, 10, 11], False: list(range(12)), "near": [0, 9, 10, 11]}
    for dedupe in (True, False, "near"):
        for windows in (latent.windows("random", 30, context=(1, 2), dedupe=dedupe), latent.top(30, dedupe=dedupe)):
            taken = spans(windows, 8)
            assert all(a_end <= b or b_end <= a for (a, a_end), (b, b_end) in combinations(taken, 2))
    assert len(latent.negatives("random", 40, context=(1, 1), dedupe=False)) > len(
        latent.negatives("random", 40, context=(1, 1))
    )


@pytest.fixture
def _little(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Limits so low that the small streams here are beyond them: (sample, whole, few, groups)."""
    sample, whole, few, groups = request.param
    for module in ("drawing", "firings", "negatives"):
        monkeypatch.setattr(f"unmix.index.{module}.SAMPLE", sample)
    for module in ("firings", "negatives"):
        monkeypatch.setattr(f"unmix.index.{module}.WHOLE", whole)
    monkeypatch.setattr("unmix.index.drawing.FEW", few)
    monkeypatch.setattr("unmix.index.drawing.EACH", 1)
    monkeypatch.setattr("unmix.index.firings.GROUPS", groups)


LITTLE = pytest.mark.parametrize(
    "_little", [(40, 100, 7, 256), (40, 10**9, 7, 6), (5, 20, 1, 3)], indirect=True, ids=["read", "thinned", "tiny"]
)


@LITTLE
@pytest.mark.usefixtures("_little")
def test_top_of_a_dense_latent_is_what_reading_everything_gives(rich: tuple[Stream, LatentIndex]) -> None:
    stream, index = rich
    for latent, role in ((0, None), (1, "score"), (2, ("train", "explain"))):
        truth = peaks(rebuilt(index, "a", latent, role), stream.context, 3, 4, True)
        for n in (1, 30, 200):
            found = index[latent].top(n, role, (3, 4))
            expected = greedy(truth, stream.tokens.reshape(-1), n)
            assert [w.position for w in found] == [peak[0] for peak in expected]
            check(index, stream, latent, found, role)


@LITTLE
@pytest.mark.usefixtures("_little")
@pytest.mark.parametrize("kind", ["quantiles", "random", "importance"])
def test_draws_from_a_sample(rich: tuple[Stream, LatentIndex], tmp_path: Path, kind: str) -> None:
    stream, index = rich
    again = write(tmp_path / "i", stream, batch=3, segment_tokens=30 * stream.context)
    busy = int(index["a"].ranking("frequency")[0])
    for role in (None, "explain", ("train", "score")):
        truth = peaks(rebuilt(index, "a", busy, role), stream.context, 4, 3, True)
        for n in (5, 40):
            found = index[busy].windows(kind, n, role, (4, 3), seed=1)
            assert len(found) == n
            same(found, again[busy].windows(kind, n, role, (4, 3), seed=1))
            check(index, stream, busy, found, role)
            assert {w.position for w in found} <= {peak[0] for peak in truth}
    # In the end everything is asked for, and everything comes.
    everything = index[busy].windows(kind, 10**6, context=(4, 3))
    assert len(everything) > 0.5 * len(peaks(rebuilt(index, "a", busy), stream.context, 4, 3, True))


@LITTLE
@pytest.mark.usefixtures("_little")
def test_a_sample_is_the_same_however_it_is_read(
    rich: tuple[Stream, LatentIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything read and the other contexts left out, or only the contexts in it read."""
    _, index = rich
    busy = int(index["a"].ranking("frequency")[0])
    for role in (None, "explain"):
        found: list[list[Window]] = []
        for few in (0, 10**9):
            monkeypatch.setattr("unmix.index.firings.FEW", few)
            found.append(index[busy].windows("random", 5, role, (4, 3), seed=1))
        same(*found)


@pytest.mark.parametrize("_little", [(40, 100, 7, 10), (40, 10**9, 7, 256)], indirect=True)
@pytest.mark.usefixtures("_little")
def test_a_sample_favours_nothing(rich: tuple[Stream, LatentIndex]) -> None:
    """Drawn often, weak and strong, early and late peaks come up equally often."""
    stream, index = rich
    busy = int(index["a"].ranking("frequency")[0])
    truth = peaks(rebuilt(index, "a", busy), stream.context, 1, 1, True)
    position = np.array([peak[0] for peak in truth])
    seen = np.zeros(index.n_tokens)
    for seed in range(200):
        for window in index[busy].windows("random", 15, context=(1, 1), seed=seed, dedupe=False):
            seen[window.position] += 1
    counts = seen[position]
    assert counts.sum() == 15 * 200
    by_strength = [part.mean() for part in np.array_split(counts, 4)]
    by_place = [part.mean() for part in np.array_split(seen[np.sort(position)], 4)]
    for means in (by_strength, by_place):
        assert max(means) < 1.3 * min(means)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 3000), seed=st.integers(0, 2**63), cut=st.integers(0, 3000))
def test_a_shuffle_is_a_permutation_whatever_is_asked_of_it(size: int, seed: int, cut: int) -> None:
    whole = shuffled(seed, size, 0, size)
    assert sorted(whole.tolist()) == list(range(size))
    np.testing.assert_array_equal(
        np.concatenate([shuffled(seed, size, 0, cut), shuffled(seed, size, cut, 5000)]), whole
    )


def test_a_shuffle_is_even() -> None:
    firsts = np.bincount([int(shuffled(seed, 40, 0, 1)[0]) for seed in range(4000)], minlength=40)
    assert firsts.min() > 55 and firsts.max() < 150
    order = shuffled(3, 100_000, 0, 100_000)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_roles_of_packed_text_share_no_document(tmp_path: Path) -> None:
    """Documents span contexts; those of one role are packed together, and no window of another role shows them."""
    rng = np.random.default_rng(0)
    context, roles, documents, codes = 8, [], [], []
    for role in range(len(ROLES)):
        lengths = rng.integers(1, 40, 30)
        ids = np.repeat(np.arange(30) * len(ROLES) + role, lengths)
        ids = ids[: len(ids) // context * context].reshape(-1, context)
        documents.append(ids)
        roles.append(np.full(len(ids), role, np.uint8))
    ids, role_of = np.concatenate(documents), np.concatenate(roles)
    codes = np.where(rng.random((*ids.shape, 2)) < 0.2, rng.random((*ids.shape, 2)), 0).astype(np.float32)
    stream = Stream(rng.integers(0, 99, ids.shape), role_of, ids, np.ones(ids.shape, bool), {"a": codes})
    index = write(tmp_path / "i", stream)
    assert any(len(np.unique(np.flatnonzero((ids == d).any(axis=1)))) > 1 for d in range(20))
    shown: dict[str, set[int]] = {}
    for role in ROLES:
        windows = [
            w
            for latent in (index[0], index[1])
            for w in [
                *latent.windows("quantiles", 100, role, (3, 3)), *latent.windows("importance", 100, role, (3, 3)),
                *latent.negatives("random", 100, role, (1, 1)), *latent.negatives("similar", 50, role, (1, 1)),
                *latent.negatives("neighbours", 50, role, (1, 1), neighbours=[1 - latent.id]),
                *(index[0] | index[1]).windows("random", 100, role, (2, 2)), *(index[0] - index[1]).top(50, role),
            ]
        ]  # fmt: skip
        places = [range(s, e) for s, e in spans(windows, context)]
        shown[role] = {int(ids.reshape(-1)[p]) for span in places for p in span}
        assert len(windows) > 200
    assert all(not shown[a] & shown[b] for a, b in combinations(ROLES, 2))
