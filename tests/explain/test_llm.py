"""What language models are shown and how their replies are read; replies that say nothing are failures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explain.planted import CAT, DEAD, DEF, RETURN, UNSCORED, WALK
from unmix.core.errors import ConfigError
from unmix.explain import Ledger, explain, score, summary
from unmix.explain.clients.calls import CallError, Reply, Request
from unmix.explain.excerpts import marked_text
from unmix.explain.explainers.llm import LLMConfig, LLMExplainer, read_explanation
from unmix.explain.prompts import load_prompt
from unmix.explain.results import LatentError
from unmix.explain.scorers.detection import DetectionConfig, DetectionScorer
from unmix.explain.scorers.fuzzing import FuzzingConfig, FuzzingScorer
from unmix.explain.scorers.judging import judged, read_answers
from unmix.explain.windows import View
from unmix.index.reader import LatentIndex

Answer = Callable[[Request], str | CallError]


class Oracle:
    """A client whose answers are computed: no server, no clock."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.asked, self.probed = answer, list[Request](), 0

    def describe(self) -> dict[str, Any]:
        return {"client": "oracle"}

    def probe(self) -> None:
        self.probed += 1

    def answers(self, jobs: Iterable[tuple[Any, Sequence[Request]]]) -> Iterator[tuple[Any, list[Reply] | CallError]]:
        for key, requests in jobs:
            self.asked += requests
            found = [self.answer(request) for request in requests]
            bad = next((one for one in found if isinstance(one, CallError)), None)
            yield key, bad or [Reply(str(one), 100, 5, 0.25) for one in found]


def excerpts(request: Request) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", request.user, re.MULTILINE)


def perfect_judge(request: Request) -> str:
    """Knows the rule that the explanation names, and reads the marks where there are any."""
    word = re.search(r"responds to: the word (\w+)", request.user)
    assert word is not None
    texts = excerpts(request)
    if "[[" in request.user.split("responds to:")[1].split("Answer with")[0].replace("between [[ and ]]", ""):
        right = [set(re.findall(r"\[\[(.*?)\]\]", t)) for t in texts]
        return json.dumps({"answers": [int(bool(m) and all(word[1] in x.casefold() for x in m)) for m in right]})
    return json.dumps({"answers": [int(word[1] in text.casefold()) for text in texts]})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ('{"explanation": "the word cat"}', "the word cat"),
        ('```json\n{"explanation": " the  word\\ncat "}\n```', "the word cat"),
        ('<think>{"explanation": "a first guess"} hmm</think>Sure! {"explanation": "cats"}', "cats"),
        ('[{"note": 1}, 2] then {"explanation": "cats"} {broken', "cats"),
    ],
)
def test_explanations_are_found_in_replies(reply: str, text: str) -> None:
    assert read_explanation([reply]) == text


@pytest.mark.parametrize(
    "reply",
    [
        "", "the word cat", '{"explanation": ""}', '{"explanation": "..."}', '{"explanation": null}', "[1, 2]",
        '{"explanation": "your phrase"}', '{"Explanation": "cats"}', "<think>{\"explanation\": \"never closed\"}",
        json.dumps({"explanation": "x" * 400}), "I cannot help with that.", '{"explanation": "cut of',
    ],
)  # fmt: skip
def test_everything_else_is_a_failure(reply: str) -> None:
    with pytest.raises(LatentError, match="the reply holds no answer in the asked form") as caught:
        read_explanation([reply])
    assert caught.value.kind == "BadReply"


@pytest.mark.parametrize(
    ("reply", "answers"),
    [
        ('{"answers": [1, 0, 1]}', [True, False, True]),
        ("[1,0,0]", [True, False, False]),
        ('{"answers": ["yes", "No", true]}', [True, False, True]),
    ],
)
def test_answers(reply: str, answers: list[bool]) -> None:
    assert read_answers(reply, 3) == answers


@pytest.mark.parametrize("reply", ['{"answers": [1, 0]}', "[1, 0, 1, 0]", "[1, 0, 2]", "[1, 0, null]", "1 0 1", "{}"])
def test_answers_that_are_not_one_for_each_text_are_a_failure(reply: str) -> None:
    with pytest.raises(LatentError):
        read_answers(reply, 3)


def test_judges_by_hand() -> None:
    figures = judged(np.array([1, 1, 0, 0], bool), np.array([1, 0, 0, 0], bool))
    assert figures.values == {
        "balanced_accuracy": 0.75, "f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5, "accuracy": 0.75,
    }  # fmt: skip
    assert figures.counted == {"true": [1, 1, 0, 0], "said": [1, 0, 0, 0]}


def test_marks() -> None:
    strings = ["a", " cat", " sat", "\n", " cat"]
    assert marked_text(strings, np.array([0, 1, 1, 0, 1], bool)) == "a [[cat sat]]⏎ [[cat]]"
    assert marked_text(strings) == "a cat sat⏎ cat"


def test_a_prompt_fills_what_it_names_and_nothing_that_values_hold() -> None:
    prompt = load_prompt("detection.v1")
    filled = prompt.fill(explanation="{{count}}", excerpts="1. {{explanation}}", count="1")
    assert "responds to: {{count}}" in filled
    assert "1. {{explanation}}" in filled
    with pytest.raises(ConfigError, match=r"no prompt 'detection\.v2'\. Did you mean 'detection\.v1'"):
        load_prompt("detection.v2")


@pytest.mark.parametrize(
    ("name", "digest"),
    [("explain.v1", "3f52d0303ec6"), ("detection.v1", "7d06ac0242bb"), ("fuzzing.v1", "824a44843d0a")],
)
def test_a_released_prompt_never_changes(name: str, digest: str) -> None:
    assert load_prompt(name).digest == digest


def test_the_explainer_shows_marked_windows_of_explaining_contexts(explaining: View) -> None:
    (request,) = LLMExplainer(LLMConfig()).ask(explaining[CAT]).requests
    texts = excerpts(request)
    assert len(texts) == LLMConfig().windows
    for text in texts:
        assert re.findall(r"\[\[(.*?)\]\]", text)
        assert all("cat" in found.casefold() for found in re.findall(r"\[\[(.*?)\]\]", text))
    with pytest.raises(LatentError, match="never fires"):
        LLMExplainer(LLMConfig()).ask(explaining[DEAD])


def test_detection_shows_as_many_silent_windows_without_marks(scoring: View) -> None:
    from unmix.explain.results import Draft

    question = DetectionScorer(DetectionConfig(windows=12, context=(4, 3), batch=7)).ask(
        scoring[CAT], Draft("the word cat")
    )
    texts = [text for request in question.requests for text in excerpts(request)]
    assert len(texts) == 24
    assert [len(excerpts(request)) for request in question.requests] == [7, 7, 7, 3]
    assert not any("[[" in text for text in texts)
    assert all("a list of 7 numbers" in request.user for request in question.requests[:3])


def test_fuzzing_marks_wrong_tokens_in_windows_that_fire(scoring: View) -> None:
    from unmix.explain.results import Draft

    question = FuzzingScorer(FuzzingConfig(windows=10, context=(4, 3))).ask(scoring[WALK], Draft("the word walk"))
    texts = [text for request in question.requests for text in excerpts(request)]
    assert 16 <= len(texts) <= 20, "windows full of firings have no room for wrong marks"
    assert all("walk" in text for text in texts), "wrong marks stand in windows that fire, too"
    right = [all("walk" in m for m in re.findall(r"\[\[(.*?)\]\]", text)) for text in texts]
    assert 2 * sum(right) == len(texts)


def test_too_few_windows_is_a_failure(scoring: View) -> None:
    from unmix.explain.results import Draft

    for scorer in (DetectionScorer(DetectionConfig()), FuzzingScorer(FuzzingConfig())):
        with pytest.raises(LatentError, match=r"latent 7: 0 windows") as caught:
            scorer.ask(scoring[UNSCORED], Draft("the word sea"))
        assert caught.value.kind == "TooFewWindows"


@pytest.mark.parametrize(
    ("scorer", "config"), [("detection", {"context": (2, 1)}), ("fuzzing", {"context": (8, 7), "windows": 8})]
)
def test_a_perfect_judge_tells_right_explanations_from_random_ones(
    index: LatentIndex, ledger: Ledger, scorer: str, config: dict[str, Any]
) -> None:
    words = iter(["the word return", "the word walk"])
    client = Oracle(lambda _: json.dumps({"explanation": next(words)}))
    explain(index, [RETURN, WALK], explainer="llm", client=client, ledger=ledger, progress=False)
    explain(index, [RETURN, WALK], explainer="random:llm", ledger=ledger, progress=False)
    assert client.probed == 1
    judge = Oracle(perfect_judge)
    assert score(index, ledger, scorer=scorer, client=judge, config=config, progress=False).done == 4
    table = {(r["explainer"], r["figure"]): r["mean"] for r in summary(ledger)["rows"]}
    assert table["llm", "balanced_accuracy"] == 1.0
    assert table["random:llm", "balanced_accuracy"] < 0.65


def test_a_constant_judge_is_at_chance(index: LatentIndex, ledger: Ledger) -> None:
    explain(index, [CAT, RETURN], ledger=ledger, progress=False)
    judge = Oracle(lambda request: json.dumps([0] * len(excerpts(request))))
    score(index, ledger, scorer="detection", client=judge, config={"context": (4, 3)}, progress=False)
    (row,) = (r for r in summary(ledger)["rows"] if r["figure"] == "balanced_accuracy")
    assert row["mean"] == 0.5


def test_bad_replies_are_failed_rows_with_the_reply(index: LatentIndex, ledger: Ledger) -> None:
    replies = iter(["I would say it is cats.", '{"explanation": "the word return"}'])
    client = Oracle(lambda _: next(replies))
    found = explain(index, [CAT, RETURN], explainer="llm", client=client, ledger=ledger, progress=False)
    assert (found.done, found.failed) == (1, {"BadReply": 1})
    bad, good = ledger.explanations()
    assert (bad.status, bad.text, bad.raw) == ("failed", None, ["I would say it is cats."])
    assert (good.text, good.prompt_tokens, good.cost) == ("the word return", 100, 0.25)
    half = Oracle(lambda request: "[1, 0]")
    assert score(index, ledger, scorer="detection", client=half, progress=False).failed == {"BadReply": 1}
    assert ledger.scores()[0].figures == {}
    assert ledger.scores()[0].raw[0] == "[1, 0]"


def test_a_refused_key_stops_at_once_and_leaves_rows_pending(index: LatentIndex, ledger: Ledger) -> None:
    client = Oracle(lambda _: CallError("Unauthorised", "status 401: the key was refused", 401, fatal=True))
    with pytest.raises(CallError, match="the key was refused"):
        explain(index, [CAT, RETURN, DEF], explainer="llm", client=client, ledger=ledger, progress=False)
    assert [(e.status, e.attempts) for e in ledger.explanations()] == [("pending", 0)] * 3
    assert len(client.asked) == 1


def test_a_service_that_is_gone_is_given_up(index: LatentIndex, ledger: Ledger) -> None:
    client = Oracle(lambda _: CallError("ServerError", "status 500: boom", 500))
    latents = [0, 1, 2, 3, 5, 6, 7, 9, 10, 11]
    with pytest.raises(CallError, match=r"8 in a row failed, the last: status 500: boom\. What was not done stays"):
        explain(index, latents, explainer="llm", client=client, ledger=ledger, progress=False)
    states = [e.status for e in ledger.explanations()]
    assert (states.count("failed"), states.count("pending")) == (8, 2)
    well = Oracle(lambda _: '{"explanation": "words"}')
    found = explain(index, latents, explainer="llm", client=well, ledger=ledger, retry_failed=True, progress=False)
    assert found.done == 10


def test_text_cannot_be_run_as_a_pattern(index: LatentIndex, ledger: Ledger) -> None:
    client = Oracle(lambda _: '{"explanation": "the word cat"}')
    explain(index, [CAT], explainer="llm", client=client, ledger=ledger, progress=False)
    with pytest.raises(ConfigError, match="scorer 'pattern' cannot score the explanations by 'llm': it runs patterns"):
        score(index, ledger, explainer="llm", progress=False)


def test_another_model_is_another_row_and_nothing_pending_asks_nobody(index: LatentIndex, ledger: Ledger) -> None:
    client = Oracle(lambda _: '{"explanation": "the word cat"}')
    for _ in range(2):
        explain(index, [CAT], explainer="llm", client=client, ledger=ledger, progress=False)
    assert (len(client.asked), client.probed) == (1, 1)
    client.describe = lambda: {"client": "oracle", "model": "another"}  # type: ignore[method-assign]
    explain(index, [CAT], explainer="llm", client=client, ledger=ledger, progress=False)
    assert len(ledger.explanations()) == 2
