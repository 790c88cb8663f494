"""`collect` over a real, small index; what is missing shows as missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError
from unmix.index.reader import LatentIndex, open_index
from unmix.index.writer import IndexWriter
from unmix.viewer.data import RunFacts, collect, frequency_histogram
from unmix.viewer.scores import ExplanationRow
from viewer.makebelieve import EVALUATION, HOSTILE

N_LATENTS, CONTEXT, ROWS = 12, 32, 24
DENSE, DEAD = 0, 11
FACTS = RunFacts("tiny", "model", "layers.1", "top-k, k = 3", "words", "runs/tiny")


def stream() -> tuple[np.ndarray, torch.Tensor]:
    """Tokens `[ROWS, CONTEXT]` and dense codes `[ROWS, CONTEXT, N_LATENTS]`: latent i fires on token i, 0 on all."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (ROWS, CONTEXT)).astype(np.int32)
    dense = torch.zeros(ROWS, CONTEXT, N_LATENTS)
    for latent in range(1, DEAD):
        fires = torch.from_numpy(tokens == latent)
        dense[..., latent] = fires * torch.from_numpy(rng.uniform(0.5, 4.0 + latent, tokens.shape)).float()
    dense[..., DENSE] = 0.25
    return tokens, dense


def write_index(folder: Path, vocab: list[str] | None) -> LatentIndex:
    tokens, dense = stream()
    with IndexWriter(folder, {"layers.1": N_LATENTS}, CONTEXT, {}, vocab=vocab, vocab_size=20) as writer:
        writer.add(
            tokens,
            np.repeat(np.arange(4, dtype=np.uint8), ROWS // 4),
            np.repeat(np.arange(ROWS, dtype=np.int32)[:, None], CONTEXT, 1),
            np.ones((ROWS, CONTEXT), bool),
            {"layers.1": Codes.from_dense(dense)},
        )
    return open_index(folder)


@pytest.fixture(scope="module", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Nothing here pulls the plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LatentIndex:
    vocab = [f" word{i}" for i in range(20)]
    vocab[3], vocab[4] = HOSTILE[1], "\n"
    return write_index(tmp_path_factory.mktemp("index") / "index", vocab)


def rows() -> list[ExplanationRow]:
    return [
        {"latent": 3, "explainer": "ngram", "text": "word three", "scores": {"pattern": {"f1": 0.6}}},
        {"latent": 5, "explainer": "ngram", "text": "word five", "scores": {"pattern": {"f1": 0.9}}},
        {"latent": 5, "explainer": "llm", "text": "five again", "scores": {"pattern": {"f1": 0.95}}},
        {"latent": 7, "explainer": "ngram", "text": "not yet scored", "scores": None},
        {"latent": 8, "explainer": "ngram", "text": None, "scores": None, "error": "refused"},
        {"latent": 3, "explainer": "ngram", "text": "of another", "scores": {"pattern": {"f1": 0.2}}, "baseline": True},
    ]


def test_a_given_order_comes_first(index: LatentIndex) -> None:
    table = collect(index, "layers.1", FACTS, explanations=rows(), order=[9, 3]).latents
    assert table["ids"][:4] == [9, 3, 5, 7]
    assert sorted(table["ids"]) == list(range(N_LATENTS))


def test_the_table_puts_the_meaningful_first(index: LatentIndex) -> None:
    table = collect(index, "layers.1", FACTS, explanations=rows()).latents
    assert table["ids"][:3] == [5, 3, 7]
    assert table["ids"][-2:] == [DENSE, DEAD]
    assert sorted(table["ids"]) == list(range(N_LATENTS))
    assert table["texts"][:3] == ["five again", "word three", "not yet scored"]
    assert table["scores"][:4] == [0.95, 0.6, None, None]
    assert table["score_name"] == "F1 (pattern)"
    assert table["explained"] == 3
    place = table["ids"].index(3)
    assert table["tokens"][place] == [HOSTILE[1]]
    assert table["frequencies"][-1] == 0.0
    assert table["tokens"][-1] == []


def test_figures_agree_with_the_stream(index: LatentIndex) -> None:
    tokens, dense = stream()
    data = collect(index, "layers.1", FACTS)
    for latent in (1, 5, 10):
        page = data.page(latent)
        fired = dense[..., latent][dense[..., latent] != 0]
        assert page["frequency"] == pytest.approx(len(fired) / tokens.size, rel=1e-3)
        assert page["max"] == pytest.approx(float(fired.max()), rel=2e-3)
        assert page["tokens"][0]["count"] == len(fired)
        assert page["histogram"] is not None
        assert sum(page["histogram"]["counts"]) == len(fired)
        assert len(page["histogram"]["edges"]) == len(page["histogram"]["counts"]) + 1
        assert page["histogram"]["counts"][0] > 0
        assert page["histogram"]["counts"][-1] > 0


def test_windows_show_the_text_around_a_firing(index: LatentIndex) -> None:
    page = collect(index, "layers.1", FACTS, windows=10, context=(4, 2)).page(5)
    assert len(page["top"]) == 5
    assert 0 < len(page["quantiles"]) <= 5
    for window in [*page["top"], *page["quantiles"]]:
        assert len(window["tokens"]) == len(window["values"]) <= 7
        assert window["tokens"][window["peak"]] == " word5"
        strengths = [value or 0.0 for value in window["values"]]
        assert strengths[window["peak"]] == max(strengths) > 0
    assert not {w["position"] for w in page["top"]} & {w["position"] for w in page["quantiles"]}
    assert [w["tenth"] for w in page["top"]] == [None] * 5


def test_a_latent_that_never_fires_has_a_page(index: LatentIndex) -> None:
    page = collect(index, "layers.1", FACTS).page(DEAD)
    assert (page["frequency"], page["max"], page["histogram"]) == (0.0, 0.0, None)
    assert page["top"] == page["quantiles"] == page["tokens"] == page["explanations"] == []


def test_a_page_holds_all_explanations_and_logits(index: LatentIndex) -> None:
    logits = {"positive": [(" yes", 1.25), ("bad", float("nan"))], "negative": [(" no", -2.0)]}
    data = collect(index, "layers.1", FACTS, explanations=rows(), logits=lambda latent: logits if latent == 5 else None)
    page = data.page(5)
    assert [one["explainer"] for one in page["explanations"]] == ["ngram", "llm"]
    assert page["logits"] == {
        "positive": [{"token": " yes", "value": 1.25}, {"token": "bad", "value": None}],
        "negative": [{"token": " no", "value": -2.0}],
    }
    assert data.page(8)["logits"] is None
    assert data.page(8)["explanations"][0]["error"] == "refused"


def test_a_bare_index_is_enough(index: LatentIndex) -> None:
    data = collect(index, "layers.1", RunFacts("bare"))
    assert data.metrics == data.scores == data.summary == []
    assert data.latents["score_name"] == ""
    assert data.latents["scores"] == [None] * N_LATENTS
    assert data.run["command"] == "unmix view RUN"
    assert data.run["tokens"] == ROWS * CONTEXT
    assert data.frequency is not None
    assert data.frequency["outside"] == 1
    assert sum(data.frequency["counts"]) == N_LATENTS - 1


def test_without_a_vocabulary_ids_are_shown(tmp_path: Path) -> None:
    data = collect(write_index(tmp_path / "index", None), "layers.1", FACTS)
    assert data.page(5)["top"][0]["tokens"][data.page(5)["top"][0]["peak"]] == "<5>"
    assert data.page(5)["tokens"][0]["token"] == "<5>"
    assert data.latents["tokens"][data.latents["ids"].index(5)] == ["<5>"]


def test_pages_of_a_report_are_the_first_and_the_explained(index: LatentIndex) -> None:
    data = collect(index, "layers.1", FACTS, explanations=rows(), n_latents=2)
    assert data.paged[:2] == (5, 3)
    assert set(data.paged) == {3, 5, 7, 8}


def test_evaluation_is_read_with_or_without_its_envelope(index: LatentIndex) -> None:
    plain = collect(index, "layers.1", FACTS, evaluation=EVALUATION)
    wrapped = collect(index, "layers.1", FACTS, evaluation={"metrics": EVALUATION, "seed": 0})
    assert plain.metrics == wrapped.metrics != []
    assert plain.frequency is not None
    assert plain.frequency["outside"] == 290


def test_a_summary_made_elsewhere_is_kept(index: LatentIndex) -> None:
    given = [
        {"explainer": "e", "scorer": "s", "figure": "f1", "mean": 0.5, "low": 0.4, "high": 0.6, "done": 1, "asked": 2}
    ]
    data = collect(index, "layers.1", FACTS, explanations=rows(), summary=given)
    assert [(row["explainer"], row["mean"]) for row in data.summary] == [("e", 0.5)]


def test_wrong_names_are_errors(index: LatentIndex) -> None:
    with pytest.raises(ConfigError, match=r"^no coder 'layers.2'"):
        collect(index, "layers.2", FACTS)
    stray: ExplanationRow = {"latent": 12, "explainer": "e", "text": "t", "scores": None}
    with pytest.raises(ConfigError, match=r"^explanations name latent 12; 'layers.1' has latents 0 to 11$"):
        collect(index, "layers.1", FACTS, explanations=[stray])
    with pytest.raises(ConfigError, match=r"^no latent 12 "):
        collect(index, "layers.1", FACTS).page(12)


def test_frequencies_of_a_dead_coder_have_an_axis() -> None:
    found = frequency_histogram({}, np.zeros(5))
    assert found is not None
    assert (found["outside"], sum(found["counts"])) == (5, 0)
    assert frequency_histogram({}, np.zeros(0)) is None


def test_a_real_index_becomes_a_report(index: LatentIndex, tmp_path: Path) -> None:
    """The whole way, through the package's own names."""
    from unmix import viewer

    data = viewer.collect(index, "layers.1", viewer.RunFacts("tiny"), evaluation=EVALUATION, explanations=rows())
    assert viewer.write_report(data, tmp_path / "report") == tmp_path / "report" / "index.html"
    written = (tmp_path / "report" / "data" / "pages-0000.js").read_text(encoding="ascii")
    assert written.startswith('(window.__unmix=window.__unmix||{})["pages-0"]=[{"id":5,')
    for name in ("Viewer", "serve", "start", "PromptReader"):
        assert getattr(viewer, name).__name__ == name
