"""From the text to the latents: by token, by document, by position; and the derived tables behind it."""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.oracle import make_stream, rebuilt, write
from index.sliced import Sliced, filters, sliced_streams, write_sliced
from unmix.core.errors import ConfigError
from unmix.index import forward as forward_module
from unmix.index.cache import cache_folder
from unmix.index.checks import CodesLike
from unmix.index.documents import ranges
from unmix.index.forward import open_forward
from unmix.index.reader import LatentIndex, open_index

VOCAB = [" Paris", "Paris", " paris", " Rome", "\n", "é", " Paris"]


def dense_of(index: LatentIndex, name: str = "a") -> np.ndarray:
    """Stored values [positions, latents]."""
    return np.stack([rebuilt(index, name, i) for i in range(index[name].n_latents)], axis=1)


@settings(max_examples=12, deadline=None)
@given(sliced=sliced_streams, bucket=st.sampled_from([1, 7, 2**22]), seed=st.integers(0, 99))
def test_codes_turned_round_are_the_postings(
    sliced: Sliced, bucket: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index = write_sliced(tmp_path_factory.mktemp("index") / "i", sliced)
    coder, dense = index["a"], dense_of(index)
    with pytest.MonkeyPatch.context() as patch:
        if bucket == 7:  # every latent is a dense one, read in pieces
            patch.setattr("unmix.index.forward.PIECE", 5)
            patch.setattr("unmix.index.forward.chunks", lambda counts, _: [(i, i + 1) for i in range(len(counts))])
        forward = open_forward(coder._store, coder._postings, coder._entry, bucket)
    rng = np.random.default_rng(seed)
    contexts = rng.permutation(index.n_contexts)[: rng.integers(0, index.n_contexts + 1)]
    rows = (contexts[:, None] * index.context + np.arange(index.context)).reshape(-1)
    some = np.flatnonzero(rng.random(index.n_tokens) < 0.3)
    for codes, wanted in ((forward.codes_of(contexts), rows), (forward.at(some), some)):
        assert isinstance(codes, CodesLike) and len(codes) == len(wanted)
        found = np.zeros((len(wanted), coder.n_latents), np.float32)
        for i in range(len(codes)):
            latents, values = codes.row(i)
            assert (np.diff(latents) > 0).all()
            found[i, latents] = values
        np.testing.assert_array_equal(found, dense[wanted])


@settings(max_examples=12, deadline=None)
@given(sliced=sliced_streams, keep=filters, by=st.sampled_from(["sum", "count", "mean", "max", "lift"]))
def test_latents_on_a_token(
    sliced: Sliced, keep: dict[str, Any], by: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index = write_sliced(tmp_path_factory.mktemp("index") / "i", sliced)
    dense, tokens = dense_of(index), sliced.stream.tokens.reshape(-1)
    for wanted in (int(tokens[0]), [int(tokens[0]), int(tokens[-1])], [99], [], 10**6):
        here = np.isin(tokens, wanted) & sliced.stream.mask.reshape(-1) & sliced.keeps(**keep)
        hits = index.latents_on(wanted, by=by, **keep)
        truth = dense[here]
        assert {hit.latent for hit in hits} == set(np.flatnonzero((truth != 0).any(axis=0)).tolist())
        for hit in hits:
            values = truth[:, hit.latent].astype(np.float64)
            values = values[values != 0]
            assert hit.count == len(values) and hit.share == len(values) / here.sum() and hit.coder == "a"
            assert hit.sum == pytest.approx(np.abs(values).sum()) and hit.max == np.abs(values).max()
            assert hit.mean == pytest.approx(values.mean())
            assert hit.lift == pytest.approx(hit.share / index["a"].frequency[hit.latent])
        order = [abs(getattr(hit, by)) for hit in hits]
        assert order == sorted(order, reverse=True)
        assert index.latents_on(wanted, by=by, n=1, **keep) == hits[:1]


def test_tokens_by_their_spelling(tmp_path: Path) -> None:
    index = write(tmp_path / "i", make_stream(1), vocab=VOCAB)
    assert index.latents_on(" Paris") == index.latents_on([0, 6])  # two ids are shown alike
    assert index.latents_on([" Rome", 5]) == index.latents_on((3, 5))
    assert index.latents_on("Paris", "a", n=2) == index["a"].latents_on(1)[:2]
    plain = write(tmp_path / "j", make_stream(1))
    for call, message in [
        (
            lambda: index.latents_on("PARIS "),
            r"'PARIS ' is not one token .*\. Did you mean ' Paris' or ' paris' or 'Paris'",
        ),
        (lambda: index.latents_on(" Romee"), r"' Romee' is not one token of this index\. Did you mean ' Rome'"),
        (lambda: index.latents_on("Constantinople"), r"is not one token of this index\. Give the ids of its tokens\."),
        (lambda: index.latents_on(-1), "token id -1 is out of range"),
        (lambda: index.latents_on(99), "token id 99 is out of range: the vocabulary has ids 0 to"),
        (lambda: plain.latents_on(" Paris"), "holds no vocabulary: name tokens by id"),
        (lambda: index.latents_on(3, by="size"), "cannot order latents by 'size'"),
        (lambda: index.latents_on(3, n=-1), "n is -1, expected 0 or more"),
        (lambda: index.latents_on(3, "b"), "no coder 'b'"),
        (lambda: index.by_position(10**6), "position 1000000 is out of range: the last one is 287"),
        (lambda: index.by_position(-1), "positions must ascend from 0"),
        (lambda: index.by_document(77), "no document 77 in this index"),
        (lambda: index["a"].codes_of([24]), "no context 24: there are 0 to 23"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_latents_own_figures(tmp_path: Path) -> None:
    index = write(tmp_path / "i", make_stream(3, n_contexts=60))
    for latent in index["a"]:
        dense = rebuilt(index, "a", latent.id).astype(np.float64)
        values = dense[dense != 0]
        assert latent.count == latent.moments.count == len(values)
        edges, counts = latent.histogram()
        np.testing.assert_array_equal(counts, np.histogram(np.abs(values), edges)[0])
        shares, strengths = latent.quantiles()
        assert (shares[0], shares[5], shares[-1]) == (0, 0.5, 1)
        if not len(values):
            assert not strengths.any() and latent.moments.std == 0
            continue
        np.testing.assert_allclose(
            strengths, np.quantile(np.abs(values), shares, method="lower").astype(np.float32), rtol=1e-3
        )
        centred = values - values.mean()
        moments = latent.moments
        assert moments.mean == pytest.approx(values.mean(), rel=1e-3)
        assert moments.std == pytest.approx(values.std(), rel=2e-3)
        assert moments.skew == pytest.approx((centred**3).mean() / values.std() ** 3, abs=0.02)
        assert moments.kurtosis == pytest.approx((centred**4).mean() / values.std() ** 4 - 3, abs=0.05)


def test_a_frequent_token_is_sampled(tmp_path: Path) -> None:
    stream = make_stream(1, n_contexts=300, vocab=3)
    index, again = write(tmp_path / "i", stream), write(tmp_path / "j", stream, batch=1, segment_tokens=5 * 12)
    whole = index.latents_on(1, occurrences=None)
    some = index.latents_on(1, occurrences=400)
    assert some == again.latents_on(1, occurrences=400) != whole
    shares = {hit.latent: hit.share for hit in whole}
    assert all(abs(hit.share - shares[hit.latent]) < 0.08 for hit in some)
    assert all(hit.share * 400 == pytest.approx(hit.count) for hit in some)


def test_positions_and_documents(tmp_path: Path) -> None:
    stream = make_stream(5, names=("a", "b"))
    index = write(tmp_path / "i", stream)
    dense = {name: dense_of(index, name) for name in index.names}
    for position in (0, 17, index.n_tokens - 1):
        hits = index.by_position(position)
        assert {(h.coder, h.latent): h.mean for h in hits} == {
            (name, int(i)): dense[name][position, i]
            for name in index.names
            for i in np.flatnonzero(dense[name][position])
        }
        sums = [hit.sum for hit in index.by_position(position, "b")]
        assert sums == sorted(sums, reverse=True)
    here = stream.documents.reshape(-1)
    for wanted in (3, [2, 5]):
        rows = np.isin(here, wanted) & stream.mask.reshape(-1)
        hits = index.by_document(wanted, "a", by="count")
        assert {h.latent: h.count for h in hits} == {
            int(i): int(n) for i, n in enumerate((dense["a"][rows] != 0).sum(axis=0)) if n
        }
        assert all(h.share == h.count / rows.sum() for h in hits)
    assert len(index.by_document(3)) == len(index.by_document(3, "a")) + len(index.by_document(3, "b"))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 30), context=st.integers(1, 9), step=st.sampled_from([1, 20, 2**22]))
def test_the_table_of_documents(
    seed: int, n: int, context: int, step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stream = make_stream(seed, n_contexts=n, context=context)
    rng = np.random.default_rng(seed)
    stream.documents[:] = np.repeat(rng.integers(0, 12, n * context), rng.integers(1, 9, n * context))[
        : n * context
    ].reshape(n, context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmix.index.documents.STEP", step)
        table = write(tmp_path_factory.mktemp("index") / "i", stream).documents_table
    flat, mask = stream.documents.reshape(-1), stream.mask.reshape(-1)
    np.testing.assert_array_equal(table.ids, np.unique(flat))
    assert len(table) == len(table.ids) and f"{len(table)} documents over {mask.sum()} unmasked" in repr(table)
    for i, document in enumerate(table.ids.tolist()):
        starts, ends = table.stretches(document)
        covered = np.concatenate([np.arange(s, e) for s, e in zip(starts, ends, strict=True)])
        np.testing.assert_array_equal(covered, np.flatnonzero(flat == document))
        assert (starts[1:] > ends[:-1]).all()
        assert table.positions[i] == mask[flat == document].sum()
        assert table.role[i] == stream.roles[covered[0] // context]
    starts, _ = table.stretches(table.ids.tolist())
    assert (np.diff(starts) > 0).all()


def test_the_forward_side_is_made_once_and_again_when_the_postings_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write(tmp_path / "i", make_stream(1))
    first = index.by_document(3)
    place = cache_folder(index.folder) / "a.forward"
    assert sorted(p.name for p in place.iterdir()) == [
        "latents.bin", "manifest.json", "offsets.bin", "places.bin", "values.bin"
    ]  # fmt: skip
    assert index.verify() == []

    def never(*_: object) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr("unmix.index.forward._write", never)
        assert open_index(index.folder).by_document(3) == first
    changed = write(tmp_path / "i", make_stream(2))
    assert changed.by_document(3) != first
    here = (changed.documents == 3).reshape(-1)
    fires = np.flatnonzero((dense_of(changed)[here] != 0).any(axis=0))
    np.testing.assert_array_equal(np.sort([h.latent for h in changed.by_document(3)]), fires)


def test_an_index_that_took_an_open_ones_place_has_a_cache_of_its_own(tmp_path: Path) -> None:
    old = write(tmp_path / "i", make_stream(1))
    expected = dense_of(old)  # its files are open from here on
    write(tmp_path / "i", make_stream(2))
    assert old.by_position(5)[0].latent in np.flatnonzero(expected[5])
    assert (cache_folder(old.folder) / "a.forward").is_dir()
    new = open_index(tmp_path / "i")
    found = np.zeros((new.n_tokens, new["a"].n_latents), np.float32)
    codes = new["a"].codes_of(np.arange(new.n_contexts))
    for i in range(len(codes)):
        found[i, codes.row(i)[0]] = codes.row(i)[1]
    np.testing.assert_array_equal(found, dense_of(new))


def test_the_same_tokens_in_other_contexts_have_a_cache_of_their_own(tmp_path: Path) -> None:
    stream = make_stream(3, n_contexts=24, context=16)
    halves = replace(
        stream, roles=np.repeat(stream.roles, 2),
        **{name: getattr(stream, name).reshape(48, 8) for name in ("tokens", "documents", "mask")},
        codes={name: codes.reshape(48, 8, -1) for name, codes in stream.codes.items()},
    )  # fmt: skip
    first = write(tmp_path / "i", stream)
    hits = first.by_document(3)
    assert hits and first.store.texts.contexts.tolist() == list(range(24))
    again = write(tmp_path / "i", halves, batch=10)
    assert again.by_document(3) == hits
    assert again.store.texts.contexts.tolist() == list(range(48))


def test_threads_wait_for_the_cache_that_one_of_them_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write(tmp_path / "i", make_stream(1))
    made, slow = [], forward_module._write  # pyright: ignore[reportPrivateUsage]

    def write_slowly(folder: Path, *rest: Any) -> None:
        made.append(folder)
        time.sleep(0.2)
        slow(folder, *rest)

    monkeypatch.setattr("unmix.index.forward._write", write_slowly)

    def ask(index: LatentIndex) -> float:
        coder = index["a"]
        return float(open_forward(coder._store, coder._postings, coder._entry).values.sum())

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, [open_index(index.folder) for _ in range(4)]))
    assert len(made) == 1 and len(set(found)) == 1


def test_turning_round_holds_few_files_open_and_a_read_takes_its_positions_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write(tmp_path / "i", make_stream(1, n_contexts=200, context=4))
    coder = index["a"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 20, hard))
    try:
        forward = open_forward(coder._store, coder._postings, coder._entry, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    taken = []

    def counted(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        taken.append(int((ends - starts).sum()))
        return ranges(starts, ends)

    monkeypatch.setattr("unmix.index.forward.ranges", counted)
    some = np.arange(0, index.n_tokens, 4)
    assert taken == [] and len(forward.at(some).indices) == sum(taken) == (dense_of(index)[some] != 0).sum()


def test_a_wrong_order_is_said_before_anything_is_made(tmp_path: Path) -> None:
    index = write(tmp_path / "i", make_stream(1))
    for ask in (index["a"].latents_on, index["a"].by_document, index["a"].by_position):
        with pytest.raises(ConfigError, match="cannot order latents by 'strength'"):
            ask(3, by="strength")
        with pytest.raises(ConfigError, match="n is -1, expected 0 or more"):
            ask(3, n=-1)
    assert not cache_folder(index.folder).exists()
