"""Windows in which a latent is silent: they must be, whatever the kind, the shape and the filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.oracle import Stream, bounds, make_stream, rebuilt, streams, write
from index.sliced import Sliced, filters, sliced_streams, write_sliced
from index.test_windows import allowed, check, roles, same, sides, spans
from unmix.core.errors import ConfigError, MachineError
from unmix.core.lock import folder_lock
from unmix.data.config import ROLES
from unmix.index import negatives
from unmix.index.cache import cache_folder
from unmix.index.reader import LatentIndex, open_index


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stream, LatentIndex]:
    """Enough contexts for every role to give several negatives."""
    stream = make_stream(1, n_contexts=400, context=32, vocab=5000, density=0.05)
    return stream, write(tmp_path_factory.mktemp("index") / "i", stream, batch=64)


@settings(max_examples=15, deadline=None)
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


def test_where_hardly_a_window_is_silent_many_contexts_are_looked_at_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make_stream(3, n_contexts=3000, context=8, n_latents=1, density=1.0)
    stream.codes["a"][:] = 1
    stream.codes["a"][[1000, 2000, 2500], :, 0] = 0
    stream.mask[:] = True
    index = write(tmp_path / "i", stream, batch=500)
    looks, silent = [], negatives.silent_places

    def look(positions: np.ndarray, contexts: np.ndarray, *rest: Any) -> np.ndarray:
        looks.append(len(contexts))
        return silent(positions, contexts, *rest)

    monkeypatch.setattr("unmix.index.negatives.silent_places", look)
    found = index[0].negatives("random", 3, context=(8, 8))
    assert sorted(w.context_id for w in found) == [1000, 2000, 2500]
    assert len(looks) <= 9 and sum(looks) <= 3000


@settings(max_examples=20, deadline=None)
@given(
    sliced=sliced_streams, keep=filters, left=sides, right=sides, centred=st.booleans(), n=st.integers(0, 12),
    some=st.booleans(), kind=st.sampled_from(["random", "neighbours", "similar"]),
)  # fmt: skip
def test_negatives_of_every_kind_are_silent_and_fit_the_filter(
    sliced: Sliced, keep: dict[str, Any], left: int, right: int, centred: bool, n: int, some: bool, kind: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    stream = sliced.stream
    index = write_sliced(tmp_path_factory.mktemp("index") / "i", sliced)
    documents = np.unique(stream.documents)[::2].tolist() if some else None
    fits = sliced.keeps(**keep, documents=documents)
    for latent in range(index["a"].n_latents):
        others = [i for i in range(index["a"].n_latents) if i != latent]
        options: dict[str, Any] = keep | ({"neighbours": others} if kind == "neighbours" else {})
        found = index[latent].negatives(kind, n, context=(left, right), centred=centred, documents=documents, **options)
        assert len(found) <= n
        check(index, stream, latent, found, keep.get("role"))
        dense = rebuilt(index, "a", latent)
        for window, (start, end) in zip(found, spans(found, stream.context), strict=True):
            assert not dense[start:end].any() and not window.values.any()
            assert (start, end) == bounds(window.position, stream.context, left, right, centred)
            assert stream.mask.reshape(-1)[window.position] and fits[window.position]
            if kind == "neighbours":
                assert window.neighbour in others
                assert abs(rebuilt(index, "a", window.neighbour)[window.position]) > 0
            else:
                assert window.neighbour is None


@pytest.mark.parametrize("kind", ["random", "neighbours", "similar"])
def test_draws_are_the_same_for_any_segments_and_reading(
    rich: tuple[Stream, LatentIndex], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, index = rich
    again = write(tmp_path / "i", stream, batch=3, segment_tokens=30 * stream.context)
    options = {"neighbours": [4, 0, 2, 3]} if kind == "neighbours" else {}
    first = [index[1].negatives(kind, 25, role, seed=5, **options) for role in (None, "score")]
    monkeypatch.setattr("unmix.index.negatives.WHOLE", 10)  # a dense latent is read context by context
    for role, expected in zip((None, "score"), first, strict=True):
        assert len(expected) > 5
        same(expected, again[1].negatives(kind, 25, role, seed=5, **options))


def test_neighbours_take_turns(rich: tuple[Stream, LatentIndex]) -> None:
    _, index = rich
    busy = [int(i) for i in index["a"].ranking("frequency")[:3]]
    target = int(index["a"].ranking("frequency")[3])
    found = index[target].negatives("neighbours", 31, context=(2, 2), neighbours=busy)
    assert np.bincount([w.neighbour for w in found if w.neighbour is not None], minlength=5)[busy].tolist() == [
        11,
        10,
        10,
    ]
    assert [w.neighbour for w in found[:3]] == busy
    dense = rebuilt(index, "a", target)
    assert not any(dense[s:e].any() for s, e in spans(found, 32))
    near = index[busy[0]].near(index[target], 2).positions  # such peaks exist, and were passed over
    assert len(near) > 5 and not np.isin([w.position for w in found], near).any()
    # A dead latent offers nothing; the others make up for it.
    dead = int(np.flatnonzero(~index["a"].alive)[0])
    mixed = index[target].negatives("neighbours", 30, context=(2, 2), neighbours=[dead, busy[0]])
    assert {w.neighbour for w in mixed} == {busy[0]} and len(mixed) == 30
    same(mixed, index[target].negatives("neighbours", 30, context=(2, 2), neighbours=[dead, busy[0]]))
    for id in (target, 5, -1):
        with pytest.raises(ConfigError, match=rf"neighbour {id} of latent {target}: expected another of the latents"):
            index[target].negatives("neighbours", 3, neighbours=[id])
    for kind, options in (("random", {"neighbours": [0]}), ("neighbours", {"embed": len})):
        name = next(iter(options))
        with pytest.raises(ConfigError, match=f'{name}= belongs to negatives of the kind ".*", this is "{kind}"'):
            index[target].negatives(kind, 3, **options)


def test_the_nearest_neighbours_are_those_that_fire_together(rich: tuple[Stream, LatentIndex]) -> None:
    stream, index = rich
    fires = stream.counted("a").reshape(-1, 5) != 0
    for latent in range(5):
        listed = index[latent].co_firing(3)
        overlaps = {i: index[latent].overlap(index[i]) for i in range(5) if i != latent}
        expected = sorted((i for i in overlaps if overlaps[i].both), key=lambda i: -overlaps[i].jaccard)[:3]
        assert [other.latent for other in listed] == expected
        for other in listed:
            assert other.jaccard == pytest.approx(overlaps[other.latent].jaccard, rel=1e-6)
            assert (other.both, other.firings) == (overlaps[other.latent].both, fires[:, other.latent].sum())
    found = index[0].negatives("neighbours", 9, context=(2, 2))
    assert len(found) == 9
    assert [w.neighbour for w in found[:3]] == [other.latent for other in index[0].co_firing(3)]
    dead = int(np.flatnonzero(~index["a"].alive)[0])
    assert index[dead].co_firing() == index[dead].negatives("neighbours", 5) == []
    with pytest.raises(ConfigError, match="n is 65, expected 0 to 64: an index keeps 64 neighbours"):
        index[0].co_firing(65)


def topics(seed: int = 0, n_contexts: int = 120, context: int = 64) -> Stream:
    """Contexts of three topics with words of their own; latent 0 fires on half of the contexts of topic 0."""
    rng = np.random.default_rng(seed)
    topic = np.arange(n_contexts) % 3
    tokens = rng.integers(0, 40, (n_contexts, context))
    own = 100 + 100 * topic[:, None] + rng.integers(0, 30, tokens.shape)
    tokens = np.where(rng.random(tokens.shape) < 0.4, own, tokens)
    codes = np.zeros((n_contexts, context, 2), np.float32)
    fires = (topic == 0) & (np.arange(n_contexts) % 2 == 0)
    codes[fires, :, 0] = np.where((tokens[fires] >= 100) & (rng.random(tokens[fires].shape) < 0.5), 1.5, 0)
    codes[:, 7, 1] = 1.0
    mask = np.ones(tokens.shape, bool)
    mask[:, 0] = False
    roles_of = (np.arange(n_contexts) // 6 % 2).astype(np.uint8)
    return Stream(tokens, roles_of, np.repeat(np.arange(n_contexts), context).reshape(tokens.shape), mask, {"a": codes})


def bm25(stream: Stream, query: np.ndarray, tile: int = 32) -> np.ndarray:
    """BM25 of every tile, one at a time, over the query's 64 weightiest tokens."""
    tiles = [
        [int(t) for t, m in zip(row[i : i + tile], mask[i : i + tile], strict=True) if m]
        for row, mask in zip(stream.tokens, stream.mask, strict=True)
        for i in range(0, stream.context, tile)
    ]
    mean = np.mean([len(t) for t in tiles])
    weights: dict[int, float] = {}
    for token in np.unique(query).tolist():
        found = sum(token in t for t in tiles)
        if found:
            times = (query == token).sum()
            weights[token] = float(times * 9 / (times + 8) * np.log1p((len(tiles) - found + 0.5) / (found + 0.5)))
    asked = sorted(weights, key=lambda t: (-weights[t], t))[:64]
    scores = np.zeros(len(tiles))
    for i, words in enumerate(tiles):
        for token in asked:
            count = words.count(token)
            if count:
                scores[i] += weights[token] * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(words) / mean))
    return scores


def test_similar_is_bm25_of_the_latents_own_windows(tmp_path: Path) -> None:
    stream = topics()
    index = write(tmp_path / "i", stream)
    query = np.concatenate([w.tokens for w in index[0].top(20)])
    scores, _ = index.store.texts.scores(query)
    np.testing.assert_allclose(scores, bm25(stream, query), rtol=1e-9)
    found = index[0].negatives("similar", 15, context=(4, 4))
    assert len(found) == 15
    tile = [w.position // 32 for w in found]
    assert (np.diff(scores[tile]) <= 0).all()
    assert {w.context_id % 3 for w in found} == {0}  # the same topic, where it did not fire
    assert {w.context_id % 3 for w in index[0].negatives("random", 15, context=(4, 4))} == {0, 1, 2}
    # What scores higher and was passed over has no silent window left to give.
    dense, words = rebuilt(index, "a", 0).reshape(stream.tokens.shape), stream.tokens
    for better in np.flatnonzero(scores > scores[tile].min()):
        context, first = better // 2, better % 2 * 32
        silent = [not dense[context, max(p - 4, 0) : p + 5].any() and stream.mask[context, p] for p in range(64)]
        assert better in tile or not any(silent[first : first + 32])
    assert all(words[w.context_id].tolist().count(int(w.tokens[w.peak_at])) for w in found)


def test_similar_keeps_to_its_roles(tmp_path: Path) -> None:
    """Neither the windows asked with nor those that come back are of another role."""
    stream = topics()
    silent = topics()
    silent.codes["a"][silent.roles == 1, :, 0] = 0  # what it does in role 1 must not change what role 0 sees
    one, other = write(tmp_path / "i", stream), write(tmp_path / "j", silent)
    same(one[0].negatives("similar", 20, ROLES[0]), other[0].negatives("similar", 20, ROLES[0]))
    assert {w.role for w in one[0].negatives("similar", 20, ROLES[1])} == {ROLES[1]}
    assert other[0].negatives("similar", 20, ROLES[1]) == []  # it never fires there: nothing is like it


def test_similar_by_a_given_embedding(tmp_path: Path) -> None:
    stream = topics()
    index = write(tmp_path / "i", stream, vocab=[f" w{i}" for i in range(400)])
    calls: list[int] = []

    def embed(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        hundreds = [[sum(f"w{h}" in word and len(word) == 4 for word in text.split()) for h in "123"] for text in texts]
        return np.array(hundreds, np.float64) + 1e-6

    found = index[0].negatives("similar", 12, context=(3, 3), embed=embed)
    assert len(found) == 12 and {w.context_id % 3 for w in found} == {0}
    first = sum(calls)
    assert first == index.store.texts.n_tiles + 20
    index[1].negatives("similar", 12, embed=embed)
    assert sum(calls) == first + 20  # the tiles are embedded once
    with pytest.raises(ConfigError, match=r"embed gave \[3, 2, 2\] for 512 texts|embed gave \[3, 2, 2\] for 240 texts"):
        index[0].negatives("similar", 3, embed=lambda texts: np.zeros((3, 2, 2)))
    plain = write(tmp_path / "j", stream)
    with pytest.raises(ConfigError, match="holds no vocabulary, so there is no text to embed"):
        plain[0].negatives("similar", 3, embed=embed)


def test_the_text_index_is_made_once_and_never_part_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = topics()
    index = write(tmp_path / "i", stream)
    first = index[0].negatives("similar", 5)
    place = cache_folder(tmp_path / "i") / "texts"
    assert (place / "manifest.json").is_file() and index.verify() == []
    made = (place / "tiles.bin").stat().st_mtime_ns
    same(first, open_index(tmp_path / "i")[0].negatives("similar", 5))
    assert (place / "tiles.bin").stat().st_mtime_ns == made
    # What a killed one left is swept away; a broken or an outdated one is made again.
    (place.parent / ".texts.killed.tmp").mkdir()
    (place / "tiles.bin").write_bytes(b"short")
    same(first, open_index(tmp_path / "i")[0].negatives("similar", 5))
    assert sorted(p.name for p in place.parent.iterdir()) == [".lock", "texts"]
    other = topics(seed=1)
    changed = write(tmp_path / "i", other)
    np.testing.assert_allclose(
        changed.store.texts.scores(np.arange(100, 130))[0], bm25(other, np.arange(100, 130)), rtol=1e-9
    )
    # Where nothing can be written, or another process writes, it is made elsewhere and goes with the index.
    write(tmp_path / "k", stream)
    with folder_lock(cache_folder(tmp_path / "k")):
        same(first, open_index(tmp_path / "k")[0].negatives("similar", 5))

    def refuse(folder: Path) -> None:
        raise MachineError(f"cannot write {folder}: the file system is read-only")

    monkeypatch.setattr("unmix.index.cache.folder_lock", refuse)
    elsewhere = open_index(tmp_path / "k")
    same(first, elsewhere[0].negatives("similar", 5))
    assert [p.name for p in cache_folder(tmp_path / "k").iterdir()] == [".lock"]
    cache = elsewhere.store.texts.cache
    assert cache is not None and cache.folder.is_dir() and tmp_path not in cache.folder.parents


def test_a_large_index_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmix.index.similar.TILES", 60)
    index = write(tmp_path / "i", topics())
    assert index.store.texts.n_tiles == 60
    contexts = index.store.texts.contexts
    assert (np.diff(contexts) > 0).all() and contexts[-1] > 90
    found = index[0].negatives("similar", 10, context=(4, 4))
    assert len(found) == 10 and {w.context_id for w in found} <= set(contexts.tolist())


def test_text_without_a_countable_token(tmp_path: Path) -> None:
    stream = topics(n_contexts=4)
    stream.mask[:] = False
    index = write(tmp_path / "i", stream)
    for kind in ("random", "similar"):
        assert index[0].negatives(kind, 5) == []
