"""Activations from a served model: vLLM through interp-engine, or anything that captures one prompt at a time.

Requests are many at once and finish in any order. What keeps the index right: at most `window` contexts are on their
way, from the request to the encoder's hands, so that a slow encoder slows the engine and nothing is dropped or piled
up; arrivals are numbered, put back in order, counted and hashed; a context that is missing, comes twice, or has other
rows than tokens is an error.

Unlike the plain path, a served model's last bits depend on what else it computed at the time: two builds agree to the
engine's precision, not to the byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unmix.core.errors import CorruptError, ModelError, NonFiniteError, ServiceError, missing_extra
from unmix.index.batch import IndexBatch
from unmix.index.sources.live import LiveSource, batch_of, read
from unmix.lm.points import LAYER_POINTS, split_name

WINDOW = 64
ATTEMPTS = 3
TIMEOUT = 600.0
TOLERANCE = 0.05
"""Error of a served activation over the norm of the plain one, at most: bfloat16 through 60 layers stays below."""


class Engine(Protocol):
    """What is asked of an engine: `VLLMModel` and `EagerModel` of interp-engine are such."""

    def capture(self, prompt_token_ids: Sequence[int], points: Sequence[str]) -> Awaitable[Mapping[Any, Tensor]]:
        """Activations of one prompt: [tokens, width] by address, whose text is the point's."""
        ...


@dataclass(frozen=True)
class Arrival:
    """A context that came: its number, the tokens it was asked with, and its activations [context, width] by hook."""

    number: int
    tokens: tuple[int, ...]
    activations: dict[str, Tensor]


class Intake:
    """Puts numbered arrivals in order, counts and hashes them."""

    def __init__(self, first: int, last: int) -> None:
        """Contexts [first, last) are expected, each once."""
        self.next, self.last = first, last
        self._early: dict[int, Arrival] = {}
        self._tokens, self._activations = hashlib.sha256(), hashlib.sha256()

    def take(self, arrival: Arrival) -> list[Arrival]:
        """The arrivals whose turn it is now, in order. `CorruptError` for one that came before or was never asked."""
        number = arrival.number
        if number >= self.last or number < 0:
            raise CorruptError(f"the engine gave context {number}, which was not asked for (up to {self.last - 1})")
        if number < self.next or number in self._early:
            raise CorruptError(f"the engine gave context {number} twice")
        self._early[number] = arrival
        ready: list[Arrival] = []
        while self.next in self._early:
            ready.append(self._early.pop(self.next))
            self._hash(ready[-1])
            self.next += 1
        return ready

    @property
    def waiting(self) -> int:
        """Contexts that came before their turn."""
        return len(self._early)

    def close(self) -> None:
        """`CorruptError` naming the first context that never came."""
        if self.next < self.last:
            raise CorruptError(
                f"the engine never gave context {self.next}; {self.last - self.next} are missing or late"
            )

    @property
    def digests(self) -> tuple[str, str]:
        """SHA-256 of all tokens and of all activations so far, in order."""
        return self._tokens.hexdigest(), self._activations.hexdigest()

    def _hash(self, arrival: Arrival) -> None:
        self._tokens.update(np.asarray(arrival.tokens, "<i8").tobytes())
        for hook in sorted(arrival.activations):
            self._activations.update(arrival.activations[hook].float().contiguous().numpy().tobytes())


def tokens_digest(tokens: np.ndarray) -> str:
    """What `Intake` says of these contexts [n, context] where each came once and in order."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest()


class Line:
    """An engine on a loop in a thread of its own (engines belong to the loop they first ran on), with back-pressure."""

    def __init__(
        self, engine: Engine, window: int = WINDOW, attempts: int = ATTEMPTS, timeout: float = TIMEOUT
    ) -> None:
        """`window`: contexts on their way at most; `attempts` for each; `timeout` seconds of one attempt."""
        self._engine, self.window, self._attempts, self._timeout = engine, window, attempts, timeout
        self.most = 0
        """Contexts on their way at one time, at most so far: asked, computed or waiting for their turn."""
        self._on_their_way = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="unmix-served", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the loop."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def ordered(self, intake: Intake, tokens: np.ndarray, points: Mapping[str, str]) -> Iterator[Arrival]:
        """The contexts that `intake` expects, in order; `tokens` [n, context] are theirs.

        A context frees its place when the caller asks for the next one. `points`: the engine's name of each hook.
        `ServiceError` for a request that fails on every attempt, `CorruptError` for an answer that does not fit.
        """
        came: queue.SimpleQueue[Arrival | Exception] = queue.SimpleQueue()
        room = asyncio.Semaphore(self.window)
        maker = asyncio.run_coroutine_threadsafe(self._ask_all(intake.next, tokens, points, room, came.put), self._loop)
        try:
            for _ in range(len(tokens)):
                item = came.get()
                if isinstance(item, Exception):
                    raise item
                for arrival in intake.take(item):
                    yield arrival
                    self._loop.call_soon_threadsafe(self._free, room)
            intake.close()
        finally:
            maker.cancel()

    def _free(self, room: asyncio.Semaphore) -> None:
        self._on_their_way -= 1
        room.release()

    async def _ask_all(
        self,
        first: int,
        tokens: np.ndarray,
        points: Mapping[str, str],
        room: asyncio.Semaphore,
        give: Callable[[Arrival | Exception], None],
    ) -> None:
        asked: set[asyncio.Task[None]] = set()
        self._on_their_way = 0

        async def one(number: int, row: tuple[int, ...]) -> None:
            try:
                give(await self._ask(number, row, points))
            except Exception as error:
                give(error)

        try:
            for i in range(len(tokens)):
                await room.acquire()
                self._on_their_way += 1
                self.most = max(self.most, self._on_their_way)
                task = asyncio.ensure_future(one(first + i, tuple(tokens[i].tolist())))
                asked.add(task)
                task.add_done_callback(asked.discard)
            await asyncio.gather(*asked)
        except asyncio.CancelledError:
            for task in asked:
                task.cancel()
            raise

    async def _ask(self, number: int, row: tuple[int, ...], points: Mapping[str, str]) -> Arrival:
        problem: Exception | None = None
        for _ in range(self._attempts):
            try:
                answer = self._engine.capture(list(row), list(points.values()))
                found = await asyncio.wait_for(answer, self._timeout)
            except Exception as error:
                problem = error
                continue
            by_text = {str(address): values for address, values in found.items()}
            return Arrival(number, row, {hook: _checked(number, row, p, by_text) for hook, p in points.items()})
        why = f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
        raise ServiceError(f"the engine failed {self._attempts} times on context {number}: {why}") from problem


def _checked(number: int, row: Sequence[int], point: str, found: Mapping[str, Tensor]) -> Tensor:
    if point not in found:
        raise CorruptError(f"context {number}: the engine gave {', '.join(found) or 'nothing'}, and not {point}")
    values = found[point].detach().cpu()
    if values.ndim != 2 or len(values) != len(row):
        raise CorruptError(f"context {number}: {len(row)} tokens, but {point} has the shape {list(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"context {number}: {point} holds values that are not finite")
    return values


@dataclass(frozen=True)
class Comparison:
    """A served model beside the plain path on the same contexts."""

    contexts: int
    tokens_agree: bool
    """Whether each context came once, in order, with its own tokens (SHA-256)."""
    same_bits: bool
    """Whether activations have one SHA-256."""
    largest: float
    """Largest error of a position over the norm of its plain activation."""

    def require(self, tolerance: float = TOLERANCE) -> None:
        """`CorruptError` where tokens differ or activations by more than `tolerance`."""
        if not self.tokens_agree or not self.largest <= tolerance:
            what = f"activations differ by {self.largest:.3g} of their norm, more than {tolerance:g}"
            raise CorruptError(
                f"the served model is not the plain one on {self.contexts} contexts: "
                + (what if self.tokens_agree else "other tokens came back")
            )


class ServedSource(LiveSource):
    """As `LiveSource`, with activations from an engine; the plain model behind it gives names and what to compare."""

    def __init__(self, plain: LiveSource, engine: Engine, window: int = WINDOW, attempts: int = ATTEMPTS) -> None:
        """`ModelError` where a coder reads what engines do not serve."""
        super().__init__(
            plain.lm, plain.shards, plain.coders, batch=plain.batch, speakers=plain.speakers, meta=plain.more
        )
        if not plain.shards.policy.attend_across:
            raise ModelError("served models let the documents of one context see each other, and these coders do not")
        self.points = {hook: _point(hook) for hooks in self.reads.values() for hook in hooks}
        self._engine, self._window, self._attempts = engine, window, attempts
        self._line: Line | None = None
        self._inputs = {**self._inputs, "served": type(engine).__name__}

    def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
        """Contexts [first, last), encoded as they come back in order."""
        begin = first - first % self.batch
        end = min(-(-last // self.batch) * self.batch, self.n_contexts)
        for start, rows in self._batched(begin, end):
            ids = np.arange(start, start + len(rows))
            stacked = {hook: torch.stack([row.activations[hook] for row in rows]) for hook in self.points}
            codes = self._encoded(stacked)
            yield batch_of(self.slicings, ids, codes, (max(first - start, 0), min(last - start, len(ids))))

    def compare(self, first: int = 0, last: int | None = None) -> Comparison:
        """The engine and the plain path on contexts [first, last) (default: one batch)."""
        last = min(self.batch if last is None else last, self.n_contexts)
        ids = np.arange(first, last)
        plain = self.activations(ids)
        intake, other = Intake(first, last), Intake(first, last)
        largest = 0.0
        for arrival in self._ordered(intake):
            wanted = {hook: values[arrival.number - first].float().cpu() for hook, values in plain.items()}
            other.take(Arrival(arrival.number, arrival.tokens, wanted))
            for hook, values in wanted.items():
                error = (arrival.activations[hook].float() - values).norm(dim=-1) / values.norm(dim=-1).clamp(min=1e-9)
                largest = max(largest, float(error.max()))
        agree = intake.digests[0] == tokens_digest(self.shards.tokens(ids))
        return Comparison(len(ids), agree, intake.digests[1] == other.digests[1], largest)

    @torch.no_grad()
    def _encoded(self, stacked: Mapping[str, Tensor]) -> dict[str, Any]:
        device = self.lm.device
        return {name: coder.encode(read(stacked, self.reads[name]).to(device)) for name, coder in self.coders.items()}

    def _batched(self, first: int, last: int) -> Iterator[tuple[int, list[Arrival]]]:
        intake, held = Intake(first, last), list[Arrival]()
        for arrival in self._ordered(intake):
            held.append(arrival)
            if len(held) == self.batch or arrival.number == last - 1:
                yield held[0].number, held
                held = []
        wanted = tokens_digest(self.shards.tokens(np.arange(first, last)))
        if intake.digests[0] != wanted:
            raise CorruptError(f"contexts {first} to {last - 1} came back with other tokens than they were asked with")

    def _ordered(self, intake: Intake) -> Iterator[Arrival]:
        if self._line is None:
            self._line = Line(self._engine, max(self._window, self.batch), self._attempts)
        tokens = self.shards.tokens(np.arange(intake.next, intake.last))
        return self._line.ordered(intake, tokens, self.points)

    def close(self) -> None:
        """Stop asking the engine."""
        if self._line is not None:
            self._line.close()
            self._line = None


def _point(hook: str) -> str:
    """interp-engine's name of a hook: `resid_post.6` of `blocks.6.resid_post`."""
    point, layer = split_name(hook)
    if point not in LAYER_POINTS or "#" in hook or "~" in hook or hook != f"blocks.{layer}.{point}":
        raise ModelError(f"{hook}: served models give these points of a layer: {', '.join(LAYER_POINTS)}")
    return f"{point}.{layer}"


def vllm_engine(model: str, dtype: str | None, context: int) -> Engine:
    """interp-engine's vLLM engine on this machine's card. `MachineError` where vLLM is not installed."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise missing_extra("vllm", "vllm", "--served vllm")
    from interp_engine import load_model

    engine: Any = load_model(model, backend="vllm", dtype=dtype or "auto", max_model_len=context + 1)
    return engine
