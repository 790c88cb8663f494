"""From an index to a table of scores: right answers, coverage, resumption, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from explain.planted import CAT, DEAD, DEF, DENSE, NUMBERS, RETURN, TRANSFORMER, UNSCORED, UNSEEN, WALK
from unmix.core.errors import ConfigError
from unmix.explain import Ledger, choose_latents, explain, ranked, score, summary
from unmix.explain.explainers.ngram import NgramExplainer
from unmix.explain.explainers.random_baseline import RandomConfig, RandomExplainer
from unmix.explain.rows import Explanation, Score
from unmix.index.reader import LatentIndex

CLEAR = [CAT, RETURN, DEF, TRANSFORMER, WALK, NUMBERS]


def quiet_explain(index: LatentIndex, latents: int | list[int], ledger: Ledger, **more: object) -> object:
    return explain(index, latents, ledger=ledger, progress=False, **more)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def rows(ledger: Ledger) -> list[tuple[object, ...]]:
    """What must not depend on how often one was stopped."""
    made = [(e.latent, e.method, e.status, e.text, str(e.data), e.config_hash) for e in ledger.explanations()]
    return sorted(made) + sorted((s.explanation_id, s.status, str(s.figures)) for s in ledger.scores())


def test_right_explanations_score_one_and_random_ones_nothing(index: LatentIndex, ledger: Ledger) -> None:
    found = explain(index, CLEAR, ledger=ledger, progress=False)
    assert (found.method, found.asked, found.done, found.failed, found.open) == ("ngram", 6, 6, {}, 0)
    quiet_explain(index, CLEAR, ledger, explainer="random:ngram")
    assert score(index, ledger, progress=False).done == 12
    table = {(r["explainer"], r["figure"]): r for r in summary(ledger)["rows"]}
    right, random = table["ngram", "f1"], table["random:ngram", "f1"]
    assert right["mean"] == right["median"] == right["low"] == 1.0
    assert right["baseline"] == random["mean"] < 0.05
    assert table["ngram", "pearson"]["mean"] > 0.95
    assert abs(table["random:ngram", "pearson"]["mean"]) < 0.1
    assert [r["figure"] for r in summary(ledger)["rows"]][:2] == ["f1", "pearson"]


def test_nobody_gets_their_own_explanation(index: LatentIndex, ledger: Ledger) -> None:
    quiet_explain(index, CLEAR, ledger)
    quiet_explain(index, CLEAR, ledger, explainer="random:ngram")
    own = {e.latent: e.text for e in ledger.explanations(method="ngram")}
    dealt = {e.latent: e for e in ledger.explanations(method="random:ngram")}
    assert set(dealt) == set(CLEAR)
    assert sorted(e.data["of_latent"] for e in dealt.values()) == sorted(CLEAR)
    for latent, e in dealt.items():
        assert e.data["of_latent"] != latent
        assert e.text == own[e.data["of_latent"]]


@pytest.mark.parametrize("n", [2, 3, 50])
def test_pairs_are_one_seeded_cycle(n: int) -> None:
    deal = RandomExplainer(RandomConfig()).pair(range(n))
    latent, seen = 0, set[int]()
    while latent not in seen:
        seen.add(latent)
        latent = deal[latent]
    assert len(seen) == n
    assert deal == RandomExplainer(RandomConfig()).pair(list(reversed(range(n))))


def test_failures_are_rows_with_a_reason_and_count_against_the_mean(index: LatentIndex, ledger: Ledger) -> None:
    found = explain(index, [CAT, DEAD, UNSEEN, UNSCORED], ledger=ledger, progress=False)
    assert (found.asked, found.done, found.failed) == (4, 2, {"NoFirings": 2})
    assert score(index, ledger, progress=False).failed == {"NoFirings": 1}
    (row,) = (r for r in summary(ledger)["rows"] if r["figure"] == "f1")
    assert (row["asked"], row["done"], row["failed"], row["why"]) == (4, 1, 3, {"NoFirings": 3})
    (entry,) = summary(ledger)["explainers"]
    assert (entry["asked"], entry["done"], entry["why"]) == (4, 2, {"NoFirings": 2})
    assert all(e.text is None for e in ledger.explanations(status="failed"))


def test_finished_work_is_not_done_again(index: LatentIndex, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_explain(index, [CAT, RETURN], ledger)
    calls: list[int] = []
    inner = NgramExplainer.explain
    monkeypatch.setattr(NgramExplainer, "explain", lambda self, latent: calls.append(latent.id) or inner(self, latent))
    quiet_explain(index, [CAT, RETURN, DEF], ledger)
    assert calls == [DEF]
    quiet_explain(index, [CAT], ledger, config={"max_rules": 3})
    assert calls == [DEF, CAT], "another config is another row"
    assert len(ledger.explanations(latent=CAT)) == 2


def test_failures_are_retried_when_asked(index: LatentIndex, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_explain(index, [DEAD], ledger)
    quiet_explain(index, [DEAD], ledger)
    assert ledger.explanations()[0].attempts == 1
    quiet_explain(index, [DEAD], ledger, retry_failed=True)
    assert ledger.explanations()[0].attempts == 2


def test_a_bug_gives_the_row_back_and_is_not_swallowed(
    index: LatentIndex, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(NgramExplainer, "explain", broken)
        with pytest.raises(ZeroDivisionError):
            quiet_explain(index, [CAT], ledger)
    (row,) = ledger.explanations()
    assert (row.status, row.text, row.error, row.attempts) == ("pending", None, None, 0)
    quiet_explain(index, [CAT], ledger)
    assert ledger.explanations()[0].status == "done"


def test_wrong_input_is_refused_before_work(index: LatentIndex, ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match=r"unknown explainer 'ngrams'\. Did you mean 'ngram'"):
        quiet_explain(index, [CAT], ledger, explainer="ngrams")
    with pytest.raises(ConfigError, match=r"unknown field 'max_rule'\. Did you mean 'max_rules'"):
        quiet_explain(index, [CAT], ledger, config={"max_rule": 3})
    with pytest.raises(ConfigError, match=r"no latent 12 in 'layers\.1': it has latents 0 to 11"):
        quiet_explain(index, [CAT, 12], ledger)
    with pytest.raises(ConfigError, match="'llm' asks a language model: give client=OpenAIClient"):
        quiet_explain(index, [CAT], ledger, explainer="llm")
    with pytest.raises(ConfigError, match="the ledger holds 0 of them for this index"):
        quiet_explain(index, [CAT], ledger, explainer="random:tokens")
    with pytest.raises(ConfigError, match="no finished explanations by 'tokens'"):
        score(index, ledger, explainer="tokens", progress=False)
    with pytest.raises(ConfigError, match="unknown scorer 'patern'"):
        score(index, ledger, scorer="patern", progress=False)
    assert ledger.explanations() == []


def test_the_ledger_lies_beside_the_index_by_default(index: LatentIndex) -> None:
    path = index.folder.parent / "ledger.sqlite"
    assert not path.exists()
    explain(index.folder, [CAT], progress=False)
    score(index.folder, progress=False)
    with Ledger(path, read_only=True) as ledger:
        assert ledger.scores()[0].figures["f1"] == 1.0
    path.unlink()


def test_chosen_latents_can_be_explained_and_scored(index: LatentIndex) -> None:
    all_of_them = choose_latents(index, 100)
    assert {DEAD, DENSE, UNSCORED, UNSEEN}.isdisjoint(all_of_them)
    assert set(CLEAR) - set(all_of_them) == {WALK}, "one token in ten is a form of walk: too dense"
    assert choose_latents(index, 3) == choose_latents(index, 3)
    assert {tuple(choose_latents(index, 3, seed)) for seed in range(8)} != {tuple(choose_latents(index, 3))}
    frequencies = index.coder().frequency[choose_latents(index, 4)]
    assert max(frequencies) > 3 * min(frequencies), "spread over frequencies"
    with pytest.raises(ConfigError, match="0 latents were asked for"):
        choose_latents(index, 0)


def test_clear_latents_are_shown_first_and_silent_ones_not_at_all(index: LatentIndex, ledger: Ledger) -> None:
    latents = [CAT, RETURN, WALK, 2, 11]
    quiet_explain(index, latents, ledger)
    quiet_explain(index, latents, ledger, explainer="random:ngram")
    score(index, ledger, progress=False)
    order = ranked(ledger, index)
    assert set(order[:3]) == {CAT, RETURN, WALK}
    assert DEAD not in order
    assert sorted(order) == sorted(set(range(12)) - {DEAD})


CHILD = """
import sys, time
from unmix.explain import explain
from unmix.explain.explainers.ngram import NgramExplainer
inner = NgramExplainer.explain
def slow(self, latent):
    time.sleep(0.15)
    return inner(self, latent)
NgramExplainer.explain = slow
explain(sys.argv[1], [0, 1, 3, 6, 9, 10, 11, 4], ledger=sys.argv[2], progress=False)
"""


def test_killed_anywhere_and_run_again_is_as_if_never_killed(index: LatentIndex, tmp_path: Path) -> None:
    latents = [0, 1, 3, 6, 9, 10, 11, 4]
    path = tmp_path / "killed.sqlite"
    for wanted in (1, 3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(index.folder), str(path)])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child.poll() is None:
            if path.exists() and _done(path) >= wanted:
                break
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    with Ledger(path) as killed, Ledger(tmp_path / "whole.sqlite") as whole:
        assert 3 <= len(killed.explanations(status="done")) < 7
        quiet_explain(index, latents, killed)
        quiet_explain(index, latents, whole)
        for ledger in (killed, whole):
            score(index, ledger, progress=False)
        assert rows(killed) == rows(whole)
        assert len(killed.explanations()) == len(latents)
        assert summary(killed)["rows"] == summary(whole)["rows"]


def _done(path: Path) -> int:
    try:
        with Ledger(path, read_only=True) as ledger:
            return len(ledger.explanations(status="done"))
    except Exception:  # the child may still be making the file
        return 0


def test_two_processes_share_the_work(index: LatentIndex, tmp_path: Path) -> None:
    path = tmp_path / "shared.sqlite"
    children = [subprocess.Popen([sys.executable, "-c", CHILD, str(index.folder), str(path)]) for _ in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    with Ledger(path) as ledger:
        found: list[Explanation] = ledger.explanations()
        assert [e.attempts for e in found] == [1] * 8
        assert {e.status for e in found} == {"done", "failed"}
        scored: list[Score] = ledger.scores()
        assert scored == []
