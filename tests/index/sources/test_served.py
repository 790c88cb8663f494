"""A served model: nothing is dropped, twice or out of turn, however the engine behaves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unmix.core.errors import CorruptError, MachineError, ModelError, NonFiniteError, ServiceError
from unmix.data.shards import TokenShards
from unmix.index.sources.live import LiveSource
from unmix.index.sources.served import Arrival, Intake, Line, ServedSource, tokens_digest, vllm_engine
from unmix.lm import LanguageModel

from .tiny import coder, joined, packed


class StandIn:
    """Captures with the plain model, one context a request, at the whims of a server; as interp-engine's engines do."""

    def __init__(self, lm: LanguageModel, seed: int = 0) -> None:
        self.lm, self.asked, self.running, self.most = lm, 0, 0, 0
        self._random = random.Random(seed)

    async def capture(self, prompt_token_ids: Sequence[int], points: Sequence[str]) -> Mapping[Any, Tensor]:
        self.asked += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.whim()
            hooks = {f"blocks.{p.rpartition('.')[2]}.{p.rpartition('.')[0]}": p for p in points}
            found = self.lm.capture(torch.tensor([list(prompt_token_ids)]), list(hooks))
            return {Address(hooks[hook]): self.changed(values[0]) for hook, values in found.items()}
        finally:
            self.running -= 1

    async def whim(self) -> None:
        """Out of order, in bursts."""
        await asyncio.sleep(self._random.choice([0, 0, 0.001, 0.01]))

    def changed(self, values: Tensor) -> Tensor:
        return values


class Address:
    """As interp-engine's: its text is the point's name."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


@pytest.fixture
def plain(lm: LanguageModel, shards: TokenShards) -> LiveSource:
    return LiveSource(lm, shards, {"a": coder("topk"), "b": coder("crosscoder")}, batch=8)


@pytest.fixture
def close() -> Iterator[list[ServedSource]]:
    opened: list[ServedSource] = []
    yield opened
    for source in opened:
        source.close()


def served(plain: LiveSource, engine: Any, close: list[ServedSource], **options: Any) -> ServedSource:
    close.append(ServedSource(plain, engine, **options))
    return close[-1]


def test_every_context_comes_once_in_order_with_the_plain_path_s_codes(
    plain: LiveSource, close: list[ServedSource]
) -> None:
    engine = StandIn(plain.lm)
    source = served(plain, engine, close, window=8)
    found, wanted = joined(source.batches(3, 90)), joined(plain.batches(3, 90))
    for name in ("tokens", "documents", "mask", "slice label", "a indices", "a lengths", "b indices", "b lengths"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    np.testing.assert_allclose(found["a values"], wanted["a values"], rtol=1e-4, atol=1e-5)
    assert engine.asked == 96  # whole batches, each context once
    assert engine.most > 1


def test_a_slow_encoder_slows_the_engine(plain: LiveSource) -> None:
    """At no time are more contexts asked, computed or waiting than the window says."""
    engine, tokens = StandIn(plain.lm), plain.shards.tokens(np.arange(40))
    line = Line(engine, window=5)
    try:
        arrivals = line.ordered(Intake(0, 40), tokens, {"blocks.1.resid_post": "resid_post.1"})
        assert next(arrivals).number == 0
        asyncio.run(asyncio.sleep(0.3))  # time enough for all forty
        assert engine.asked <= 6
        assert [arrival.number for arrival in arrivals] == list(range(1, 40))
        assert line.most <= 5
    finally:
        line.close()


def test_the_first_may_be_the_slowest(plain: LiveSource, close: list[ServedSource]) -> None:
    class FirstLast(StandIn):
        async def whim(self) -> None:
            await asyncio.sleep(0.3 if self.asked == 1 else 0)

    engine = FirstLast(plain.lm)
    source = served(plain, engine, close, window=8)
    numbers = joined(source.batches(0, 40))["tokens"]
    np.testing.assert_array_equal(numbers, plain.shards.tokens(np.arange(40)))


def test_a_request_that_fails_is_asked_again(plain: LiveSource, close: list[ServedSource]) -> None:
    class Flaky(StandIn):
        async def whim(self) -> None:
            if self.asked % 3 == 0:
                raise ConnectionError("lost")

    engine = Flaky(plain.lm)
    source = served(plain, engine, close, attempts=9)
    assert len(joined(source.batches(0, 16))["tokens"]) == 16
    assert engine.asked > 16


@pytest.mark.parametrize(
    ("behaviour", "kind", "message"),
    [
        ("dead", ServiceError, r"the engine failed 2 times on context \d+: ConnectionError: gone"),
        ("short", CorruptError, r"context \d+: 16 tokens, but resid_post.1 has the shape \[15, 32\]"),
        ("nan", NonFiniteError, r"context \d+: resid_post.\d holds values that are not finite"),
        ("other", CorruptError, r"context \d+: the engine gave z.9.*, and not resid_post.1"),
    ],
)
def test_what_does_not_fit_is_an_error(
    plain: LiveSource, close: list[ServedSource], behaviour: str, kind: type[Exception], message: str
) -> None:
    class Broken(StandIn):
        async def capture(self, prompt_token_ids: Sequence[int], points: Sequence[str]) -> Mapping[Any, Tensor]:
            if behaviour == "dead":
                raise ConnectionError("gone")
            found = await super().capture(prompt_token_ids, points)
            return {Address("z.9"): v for v in found.values()} if behaviour == "other" else found

        def changed(self, values: Tensor) -> Tensor:
            return {"short": values[1:], "nan": values * float("nan")}.get(behaviour, values)

    with pytest.raises(kind, match=message):
        list(served(plain, Broken(plain.lm), close, attempts=2).batches(0, 8))


def test_an_engine_that_never_answers_is_given_up(plain: LiveSource) -> None:
    class Silent(StandIn):
        async def whim(self) -> None:
            await asyncio.sleep(60)

    line = Line(Silent(plain.lm), attempts=2, timeout=0.05)
    try:
        with pytest.raises(ServiceError, match="failed 2 times on context 0: TimeoutError"):
            next(line.ordered(Intake(0, 1), plain.shards.tokens([0]), {"blocks.1.resid_post": "resid_post.1"}))
    finally:
        line.close()


def arrival(number: int) -> Arrival:
    return Arrival(number, (number, 1), {"h": torch.full((2, 3), float(number))})


def test_arrivals_are_put_in_order_counted_and_hashed() -> None:
    intake = Intake(0, 5)
    ready = [[a.number for a in intake.take(arrival(n))] for n in (2, 0, 1, 4, 3)]
    assert ready == [[], [0], [1, 2], [], [3, 4]]
    intake.close()
    assert intake.digests[0] == tokens_digest(np.array([[n, 1] for n in range(5)]))
    other = Intake(0, 5)
    for number in range(5):
        other.take(arrival(number))
    assert other.digests == intake.digests


def test_a_missing_a_repeated_and_an_unknown_context_are_errors() -> None:
    intake = Intake(0, 3)
    intake.take(arrival(1))
    with pytest.raises(CorruptError, match="gave context 1 twice"):
        intake.take(arrival(1))
    intake.take(arrival(0))
    with pytest.raises(CorruptError, match="gave context 0 twice"):
        intake.take(arrival(0))
    with pytest.raises(CorruptError, match=r"gave context 7, which was not asked for \(up to 2\)"):
        intake.take(arrival(7))
    with pytest.raises(CorruptError, match="never gave context 2; 1 are missing"):
        intake.close()


def test_a_served_model_is_compared_with_the_plain_one(plain: LiveSource, close: list[ServedSource]) -> None:
    found = served(plain, StandIn(plain.lm), close).compare(4, 20)
    assert (found.contexts, found.tokens_agree) == (16, True)
    assert found.largest < 1e-4
    found.require()

    class Other(StandIn):
        def changed(self, values: Tensor) -> Tensor:
            return values * 1.2

    worse = served(plain, Other(plain.lm), close).compare()
    assert worse.largest == pytest.approx(0.2, abs=0.01) and not worse.same_bits
    with pytest.raises(CorruptError, match=r"activations differ by 0.2 of their norm, more than 0.05"):
        worse.require()


def test_what_engines_do_not_serve_is_said(lm: LanguageModel, shards: TokenShards, text: Any, tmp_path: Any) -> None:
    made = coder("topk", reads=("blocks.1.resid_post~centred",))
    with pytest.raises(ModelError, match=r"blocks.1.resid_post~centred: served models give these points"):
        ServedSource(LiveSource(lm, shards, {"a": made}), StandIn(lm))
    policy = {**shards.policy.model_dump(), "attend_across": False}
    apart = packed(lm, text, tmp_path / "apart", policy=policy)
    with pytest.raises(ModelError, match="let the documents of one context see each other"):
        ServedSource(LiveSource(lm, apart, {"a": coder("topk")}), StandIn(lm))


def test_vllm_that_is_not_installed_is_named() -> None:
    with pytest.raises(MachineError, match=r"--served vllm needs the package 'vllm': pip install 'unmix\[vllm\]'"):
        vllm_engine("gpt2", None, 64)


def test_interp_engine_s_own_model_is_such_an_engine(tiny_model_folder: Any, plain: LiveSource) -> None:
    """Its eager backend has the interface of its vLLM one, and runs here."""
    from interp_engine import load_model

    engine: Any = load_model(str(tiny_model_folder), backend="eager", device="cpu", dtype="float32")
    source = ServedSource(plain, engine, window=4)
    try:
        found = source.compare(0, 8)
    finally:
        source.close()
    assert found.tokens_agree and found.largest < 1e-4
