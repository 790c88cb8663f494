"""`diff` and `unmix diff` on real indexes with planted differences."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.differences.simulated import write_index
from index.oracle import ArrayCodes
from unmix.cli.diff import command
from unmix.core.errors import ConfigError
from unmix.index import diff
from unmix.index.differences.text import table
from unmix.index.reader import LatentIndex
from unmix.index.writer import IndexWriter

LATENTS, DOCUMENTS = 30, 240
MORE_BOOKS, MORE_WIKI = (4, 17), (9,)


def firings(seed: int, more: tuple[int, ...] = (), less: tuple[int, ...] = ()) -> np.ndarray:
    """Documents in which latents fire in clusters; those of `more` and `less` oftener or not."""
    rng = np.random.default_rng(seed)
    share = np.full(LATENTS, 0.2)
    share[list(more)], share[list(less)], share[29] = 0.7, 0.02, 0.0
    topic = rng.random((DOCUMENTS, LATENTS)) < share
    return np.where(topic, 1 + rng.poisson(3, topic.shape), 0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LatentIndex:
    """Even documents are of wikipedia, odd ones of books; nothing is of the third label."""
    labels = np.arange(DOCUMENTS) % 2
    fired = np.where((labels == 1)[:, None], firings(1, MORE_BOOKS, MORE_WIKI), firings(2, (), MORE_BOOKS))
    return write_index(tmp_path_factory.mktemp("one") / "index", 0, fired, labels, coder_hash={"a": "h"}, model="m")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> LatentIndex:
    """The same text on another model, where latent 9 is commoner."""
    labels = np.arange(DOCUMENTS) % 2
    folder = tmp_path_factory.mktemp("other") / "index"
    return write_index(folder, 0, firings(3, MORE_WIKI), labels, coder_hash={"a": "other"}, model="chat")


def test_slices_of_one_index(index: LatentIndex) -> None:
    found = diff(index, slice="label=wikipedia", against="label=books")
    assert found.found.tolist() == sorted([*MORE_BOOKS, *MORE_WIKI])
    assert found.n_tested == LATENTS - 1
    rows = {row.latent: row for row in found.top(10, n_witnesses=2)}
    assert {row.more for row in rows.values() if row.latent in MORE_BOOKS} == {"label=books"}
    assert rows[9].more == "label=wikipedia"
    assert rows[9].log2_ratio > 1 and rows[9].cohen_h > 0.5
    assert rows[4].log2_ratio < -1 and rows[4].interval[1] < 0 and rows[4].share_difference < -0.3


def test_counts_are_those_of_the_postings(index: LatentIndex) -> None:
    """Every figure of every latent, counted from postings."""
    found = diff(index, slice="speaker=user", against="label=books")
    speakers, labels = (index.store.slices[name].reshape(-1) for name in ("speaker", "label"))
    for side, here in ((found.a.counts, speakers == 0), (found.b.counts, labels == 1)):
        documents = index.documents.reshape(-1)
        assert side.tokens == here.sum()
        assert side.n_documents == len(np.unique(documents[here]))
        for latent in index["a"]:
            positions, values = latent.postings()
            kept = here[positions]
            assert side.firings[latent.id] == kept.sum()
            assert side.documents[latent.id] == len(np.unique(documents[positions[kept]]))
            np.testing.assert_allclose(side.sum[latent.id], values[kept].sum(), rtol=1e-6, atol=1e-12)
            each = np.bincount(documents[positions[kept]], minlength=DOCUMENTS)
            lengths = np.bincount(documents[here], minlength=DOCUMENTS)
            assert side.squares[latent.id] == (each**2).sum()
            assert side.cross[latent.id] == (each * lengths).sum()
            assert side.token_squares == (lengths**2).sum()


def test_witnesses_are_of_the_side_and_of_different_documents(index: LatentIndex) -> None:
    found = diff(index, slice="label=wikipedia", against="label=books")
    for row in found.top(3, n_witnesses=4):
        assert len({window.document for window in row.witnesses}) == 4
        side = 1 if row.more == "label=books" else 0
        assert {window.document % 2 for window in row.witnesses} == {side}
        assert [w.peak for w in row.witnesses] == sorted((w.peak for w in row.witnesses), reverse=True)
        positions, values = index["a"][row.latent].postings()
        best = values[index.documents.reshape(-1)[positions] % 2 == side].max()
        assert row.witnesses[0].peak == best


def test_a_long_document_does_not_crowd_out_the_others(tmp_path: Path) -> None:
    """Its twenty windows are the strongest; one of them is shown, and then those of the others."""
    values = np.zeros((24, 64, 1), np.float32)
    values[:, 30, 0] = np.arange(24, 0, -1)
    documents = np.repeat(np.array([0] * 20 + [1, 2, 3, 4]), 64).reshape(24, 64)
    tokens = np.random.default_rng(0).integers(0, 50, (24, 64))
    with IndexWriter(tmp_path / "index", {"a": 1}, 64, slices={"label": ("x", "y")}) as writer:
        codes = ArrayCodes.from_dense(values.reshape(-1, 1))
        labels = {"label": np.where(documents == 4, 1, 0)}
        writer.add(tokens, np.zeros(24, np.uint8), documents, np.ones((24, 64), bool), {"a": codes}, labels)
    found = diff(tmp_path / "index", slice="label=x", against="label=y")
    assert [window.document for window in found.latent(0, 3).witnesses] == [0, 1, 2]
    assert [window.document for window in found.latent(0, 9).witnesses] == [0, 1, 2, 3]


def test_roles_are_slices_too(index: LatentIndex) -> None:
    """Roles alternate with contexts, and nothing differs between them."""
    assert len(diff(index, slice="role=explain", against="role=score").found) == 0


def test_two_models_over_the_same_text(index: LatentIndex, other: LatentIndex) -> None:
    found = diff(index, other)
    assert 9 in found.found
    text = " ".join(found.remarks)
    assert "the same text on both sides" in text
    assert "two coders of one size on two models" in text
    row = found.latent(9)
    assert row.more == str(other.folder)
    assert row.documents == (int(index["a"].figures.documents[9]), int(other["a"].figures.documents[9]))


def test_two_indexes_may_be_sliced_alike(index: LatentIndex, other: LatentIndex) -> None:
    found = diff(index, other, slice="label=books")
    assert found.a.counts.n_documents == found.b.counts.n_documents == DOCUMENTS // 2
    assert found.a.name != found.b.name


def test_orders(index: LatentIndex) -> None:
    found = diff(index, slice="label=wikipedia", against="label=books")
    p = found.evidence.p[found.ranking("q")]
    assert (np.diff(p) >= 0).all()
    best = found.ranking("effect")[0]
    certain = np.maximum(found.evidence.low, -found.evidence.high)
    assert certain[best] == certain[found.found].max()
    with pytest.raises(ConfigError, match=r"cannot sort by 'size'\. Allowed: q, effect"):
        found.ranking("size")


def test_remarks_about_speakers_of_one_document(index: LatentIndex) -> None:
    said = " ".join(diff(index, slice="speaker=user", against="speaker=assistant").remarks)
    assert "documents may lie on both sides of 'speaker'" in said
    assert "documents have 8 tokens in speaker=user and 16 in speaker=assistant" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slice": "labl=books", "against": "label=books"}, r"has no slicing 'labl'\. Did you mean 'label'\?"),
        ({"slice": "label=book", "against": "label=books"}, r"'label' has no value 'book'\. Did you mean 'books'\?"),
        ({"slice": "label", "against": "label=books"}, r"slice 'label': expected NAME=VALUE .* label, speaker, role"),
        ({"slice": "label=empty", "against": "label=books"}, r"label=empty has no position that counts"),
        ({"slice": "role=train", "against": "role=score"}, r"role=train has no position that counts"),
        ({"slice": "label=books", "against": "label=books"}, r"both sides are the same positions"),
        ({"slice": "label=books"}, r"give both `slice` and `against`"),
        ({"slice": "label=books", "against": "label=wikipedia", "q": 0.0}, r"q is 0\.0"),
        ({"slice": "label=books", "against": "label=wikipedia", "min_documents": 0}, r"min_documents is 0"),
        ({"slice": "label=books", "against": "label=wikipedia", "coder": "b"}, r"no coder 'b'"),
    ],
)
def test_what_cannot_be_compared(index: LatentIndex, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        diff(index, **arguments)  # pyright: ignore[reportArgumentType]


def test_different_coders_are_refused(index: LatentIndex, tmp_path: Path) -> None:
    labels = np.zeros(40, np.int64)
    small = write_index(tmp_path / "small", 0, firings(0)[:40, :7], labels, coder_hash={"a": "h"}, model="m")
    with pytest.raises(ConfigError, match=r"has 30 latents, 'a' in .* has 7: latents are compared by number"):
        diff(index, small)
    foreign = write_index(tmp_path / "foreign", 0, firings(0)[:40], labels, coder_hash={"a": "g"}, model="m")
    with pytest.raises(ConfigError, match=r"different coders of one model \(hashes h and g\)"):
        diff(index, foreign)


def test_the_command(index: LatentIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, target = str(index.folder), tmp_path / "found.json"
    words = [place, "--slice", "label=wikipedia", "--against", "label=books", "--json", str(target)]
    assert command([*words, "--n", "2", "--windows=2"]) == 0
    out = capsys.readouterr().out
    assert "a  label=wikipedia: 120 documents, 2,880 tokens, coder a" in out
    assert "29 of 30 latents tested (in at least 10 documents); 3 differ at q ≤ 0.05" in out
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.lstrip().startswith("latent "))
    assert lines[head].split()[:3] == ["latent", "more", "in"]
    assert {line.split()[0] for line in lines[head + 1 : head + 3]} <= {"4", "9", "17"}
    assert out.count("⟦") == 4
    facts = json.loads(target.read_text(encoding="utf-8"))
    assert facts["found"] == 3 and facts["tested"] == 29 and len(facts["latents"]) == 2
    assert facts["latents"][0]["witnesses"][0]["strings"][0].startswith(" w")
    assert command([*words[:-1], "-", "--n", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["a"]["slice"] == "label=wikipedia"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["PLACE"], "give both --slice and --against"),
        (["PLACE", "PLACE", "PLACE"], "takes A B"),
        (["PLACE", "--slice", "label=books", "--against", "label=wikipedia", "--sort", "size"], "--sort size"),
        (["PLACE", "--slice", "label=books", "--against", "label=wikipedia", "--n", "-1"], "--n -1"),
        (["PLACE", "--sliced", "label=books"], "Did you mean 'slice'"),
    ],
)
def test_what_the_command_refuses(index: LatentIndex, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        command([str(index.folder) if word == "PLACE" else word for word in words])


def test_hostile_tokens_stay_on_their_line(index: LatentIndex) -> None:
    found = diff(index, slice="label=wikipedia", against="label=books")
    row = found.latent(4, 1)
    row.top_tokens[0] = "a\x1b[31m\nb"
    hostile = "label=\x1b]0;x\n\u202e"  # labels are of the data, too
    row = replace(row, more=hostile)
    found = replace(found, a=replace(found.a, name=hostile), remarks=[f"of {hostile}"])
    lines = table(found, [row])
    assert any("a\\x1b[31m\\nb" in line for line in lines)
    assert all(line.isprintable() for line in lines)
