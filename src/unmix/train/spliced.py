"""End-to-end training: the model runs as it is, then through the coders' reconstructions; its terms compare the two.

The pass as it is has no gradients and serves every coder. The spliced pass starts where the first coder stands, on the
stream of the other, and ends at the last hook that is looked at; gradients run from there through the frozen layers
into the coders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from unmix.coder.config import CoderConfig
from unmix.core.errors import ConfigError, DataError, ModelError
from unmix.core.seeds import derive
from unmix.data.config import Role
from unmix.data.order import Order
from unmix.lm.contexts import Batch, Contexts, read_batch
from unmix.lm.forward import as_inputs, attach_read, run
from unmix.lm.model import LanguageModel
from unmix.lm.sites import Pass
from unmix.lm.start import Start, find_start
from unmix.train.config import objective_of
from unmix.train.feeds import Feed
from unmix.train.guard import Traceable
from unmix.train.learner import Learner
from unmix.train.objectives import OF_MODEL, ModelStep, Step
from unmix.train.objectives.predictions import NO_TARGET, Head, Name, Predictions
from unmix.train.objectives.specs import AnyTerm, TermSpec
from unmix.train.objectives.tiles import LinearHead
from unmix.train.source import ActivationSource
from unmix.train.splices import Alone, Bare, Together, frozen
from unmix.train.timing import Clock
from unmix.train.trainer import Job


@dataclass(frozen=True)
class Asked:
    """What the model's terms look at in a step."""

    losses: tuple[Name, ...]
    later: tuple[str, ...]
    """Canonical names of downstream hooks."""
    sharers: Mapping[str, int]

    @property
    def nothing(self) -> bool:
        """Whether no term looks at the model now."""
        return not self.losses and not self.later


def acting(terms: Sequence[AnyTerm] | Sequence[TermSpec], progress: float) -> list[TermSpec]:
    """The terms of the model whose time it is."""
    return [
        spec for spec in terms
        if getattr(spec, "term", "") in OF_MODEL and spec.weight > 0 and spec.start <= progress < spec.stop
    ]  # fmt: skip


def of_learner(learner: Learner) -> list[TermSpec]:
    """The model's terms of a learner whose time it is."""
    return acting([term.spec for term in learner.terms], learner.state.step / learner.steps)


class SplicedFeed:
    """Contexts of one role through the model and the spliced model, addressed by step alone."""

    def __init__(
        self,
        lm: LanguageModel,
        data: Contexts,
        coders: Mapping[str, CoderConfig],
        seed: int,
        groups: Sequence[Sequence[str]] | None = None,
        role: Role = "train",
        clock: Clock | None = None,
    ) -> None:
        """`groups`: names of coders that are spliced together, default each alone; all share the bare pass.

        Coders alone read what the model as it is gives; together, each reads what those before it left. `clock` counts
        the bare pass. `DataError` where the role has no position that counts, `ConfigError` for groups that are not a
        partition, `ModelError` for hooks that the model lacks.
        """
        self.lm, self.data, self.coders, self.clock = lm, data, dict(coders), clock or Clock()
        self.groups = [tuple(group) for group in groups] if groups is not None else [(name,) for name in coders]
        if sorted(name for group in self.groups for name in group) != sorted(coders):
            raise ConfigError(f"coders spliced together are {self.groups}; each of {', '.join(coders)} is in one group")
        self._ids = np.asarray(data.contexts_of(role), dtype=np.int64)
        self._rows = sum(int(data.mask(part).sum()) for part in _parts(self._ids))
        if self._rows == 0:
            raise DataError(f"no unmasked position has the role {role!r}: take more text or another policy")
        self._order = Order(derive(seed, "spliced"), len(self._ids), len(self._ids))
        self._canonical: dict[str, str] = {}
        self._samples: dict[tuple[tuple[str, ...], tuple[str, ...]], _Sample] = {}
        for config in self.coders.values():
            for hook in (*config.reads, *config.writes):
                lm.hook(hook)

    @property
    def n_rows(self) -> int:
        """Positions of one epoch that count."""
        return self._rows

    def sample(self, coder: CoderConfig) -> ActivationSource:
        """What the coder reads and writes in the model as it is, in the order of training.

        Coders at the same hooks share one, and its rows are held until training begins: the model runs for them once.
        """
        return self._samples.setdefault((coder.reads, coder.writes), _Sample(self, coder))

    def contexts(self, index: int, size: int) -> Batch:
        """The contexts of step `index`: as many whole ones as hold about `size` positions that count."""
        n = max(1, round(size * len(self._ids) / self._rows))
        return read_batch(self.data, self._ids[np.asarray(self._order.batch(index, n), dtype=np.int64)])

    def places(self, index: int, size: int, rows: Sequence[int]) -> list[dict[str, int]]:
        """Which context and position some rows of a batch come from."""
        batch = self.contexts(index, size)
        found = batch.mask.nonzero()[torch.tensor(list(rows), dtype=torch.int64)].tolist()
        return [
            {"row": int(row), "context": int(batch.contexts[slot]), "position": position}
            for row, (slot, position) in zip(rows, found, strict=True)
        ]

    def steps(self, index: int, size: int, learners: Mapping[str, Learner]) -> Iterator[dict[str, Step]]:
        """One bare pass, then one spliced pass a group; a group goes backward before the next begins."""
        self._samples.clear()
        batch = self.contexts(index, size)
        groups = [group for group in self.groups if group[0] in learners]  # one that is alone may have left
        asked = {group: self._asked([learners[name] for name in group]) for group in groups}
        with self.clock.on("model"):
            bare = self._bare(batch, asked)
        for group in groups:
            own = {name: learners[name] for name in group}
            if asked[group].nothing:
                yield {name: learner.forward(*bare.of(learner.coder.config)) for name, learner in own.items()}
            else:
                yield self._spliced(batch, bare, own, asked[group])

    def _asked(self, learners: Sequence[Learner]) -> Asked:
        found = [spec for learner in learners for spec in of_learner(learner)]
        names = [str(getattr(spec, "term", "")) for spec in found]
        losses: tuple[Name, ...] = tuple(name for name in ("kl", "ce") if name in names)
        later = dict.fromkeys(self._name(hook) for spec in found for hook in getattr(spec, "hooks", ()))
        return Asked(losses, tuple(later), {name: names.count(name) for name in names})

    def _name(self, hook: str) -> str:
        if hook not in self._canonical:
            self._canonical[hook] = self.lm.hook(hook).name
        return self._canonical[hook]

    @cached_property
    def _starts(self) -> dict[tuple[str, ...], Start | None]:
        """Where each group's spliced pass starts."""
        with frozen(self.lm.model):
            return {group: find_start(self.lm, self._hooks(group)) for group in self.groups}

    def _hooks(self, group: Sequence[str]) -> list[str]:
        hooks = [hook for name in group for hook in (*self.coders[name].reads, *self.coders[name].writes)]
        return list(dict.fromkeys(hooks))

    @cached_property
    def _by_stream(self) -> bool:
        return self.lm.ends_in_stream([hook for config in self.coders.values() for hook in config.writes])

    @cached_property
    def _head(self) -> Head:
        head = self.lm.plain_head
        return self.lm.unembed if head is None else LinearHead(self.lm.before_head, head.weight, head.bias)

    @torch.no_grad()
    def _bare(self, batch: Batch, asked: Mapping[tuple[str, ...], Asked]) -> Bare:
        wanted = self._hooks(list(self.coders))
        for group, ask in asked.items():
            start = self._starts[group]
            wanted += [*ask.later, *([start.hook] if start is not None and not ask.nothing else [])]
        logits = any("kl" in ask.losses for ask in asked.values())
        if logits and self._by_stream:
            wanted.append(self.lm.last_hook)
        with frozen(self.lm.model):
            found = self.lm.run(
                batch.tokens, capture=list(dict.fromkeys(wanted)), documents=batch.documents,
                logits=logits and not self._by_stream,
            )  # fmt: skip
        mask = batch.mask.to(self.lm.device)
        if not logits:
            return Bare(found.activations, mask, None)
        last = found.activations[self.lm.last_hook] if self._by_stream else found.logits
        return Bare(found.activations, mask, self._some(last)[mask])

    def _spliced(self, batch: Batch, bare: Bare, learners: Mapping[str, Learner], asked: Asked) -> dict[str, Step]:
        splice = Alone(self.lm, bare, learners) if len(learners) == 1 else Together(self.lm, bare, learners)
        seen: dict[str, Tensor] = {}
        last = [self.lm.last_hook] if asked.losses and self._by_stream else []

        def prepare(current: Pass) -> None:
            splice.attach(current)
            for name in dict.fromkeys([*asked.later, *last]):
                attach_read(current, self.lm.hook(name), lambda x, name=name: seen.__setitem__(name, x))

        start = self._starts[tuple(learners)]
        with frozen(self.lm.model):
            logits, _ = run(
                self.lm, as_inputs(self.lm, batch.tokens), prepare, documents=batch.documents,
                logits=bool(asked.losses) and not self._by_stream,
                skip=None if start is None else start.skip(bare.activations[start.hook]),
            )  # fmt: skip
        for name in asked.later:
            if not seen[name].requires_grad:
                raise ConfigError(f"downstream: nothing of {', '.join(learners)} reaches {name}; give later hooks")
        later = {name: (bare.activations[name][bare.mask], seen[name][bare.mask]) for name in asked.later}
        rows = self._some(seen[last[0]] if last else logits)[bare.mask] if asked.losses else None
        model = ModelStep(self._predictions(batch, bare, rows, asked), self._aliased(learners, later), asked.sharers)
        return {name: replace(step, model=model) for name, step in splice.steps().items()}

    def _predictions(self, batch: Batch, bare: Bare, rows: Tensor | None, asked: Asked) -> Predictions | None:
        if rows is None:
            return None
        targets = torch.full_like(batch.tokens, NO_TARGET)
        targets[:, :-1] = batch.tokens[:, 1:]
        head = self._head if self._by_stream else nn.Identity()
        return Predictions(rows, bare.last, targets[batch.mask].to(rows.device), head, asked.losses)

    def _aliased(
        self, learners: Mapping[str, Learner], later: dict[str, tuple[Tensor, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Under the names that the objectives use, which may be aliases."""
        specs = [spec for learner in learners.values() for spec in of_learner(learner)]
        return {hook: later[self._name(hook)] for spec in specs for hook in getattr(spec, "hooks", ())}

    def _some(self, found: Tensor | None) -> Tensor:
        if found is None:
            raise ModelError(f"{self.lm.name} returned no logits, which kl and ce compare")
        return found


class _Sample:
    """Rows of the model as it is for one coder."""

    def __init__(self, feed: SplicedFeed, coder: CoderConfig) -> None:
        self.feed, self.coder = feed, coder
        self.hash = feed.data.hash
        self._held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return self.feed.n_rows

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """`(input [size, d_in], target [size, d_out])`, float32."""
        if (step, size) not in self._held:
            self._held[step, size] = self._made(step, size)
        return self._held[step, size]

    def _made(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        size = min(size, self.n_rows)
        parts: list[tuple[Tensor, Tensor]] = []
        found, index = 0, 0
        hooks = list(dict.fromkeys([*self.coder.reads, *self.coder.writes]))
        while found < size:
            contexts = self.feed.contexts(step + index, min(size, 2048))
            with frozen(self.feed.lm.model):
                kept = self.feed.lm.capture(contexts.tokens, hooks, documents=contexts.documents)
            parts.append(Bare(kept, contexts.mask.to(self.feed.lm.device), None).of(self.coder))
            found, index = found + len(parts[-1][0]), index + 1
        x = torch.cat([x for x, _ in parts])[:size]
        return x, x if self.coder.reads == self.coder.writes else torch.cat([y for _, y in parts])[:size]


class StagedFeed:
    """Rows while no term looks at the model, the spliced model while one does: fine-tuning late in the training."""

    def __init__(self, rows: Feed, spliced: SplicedFeed) -> None:
        self.rows, self.spliced = rows, spliced
        self._last: tuple[int, Feed] | None = None

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return self.rows.n_rows

    def sample(self, coder: CoderConfig) -> ActivationSource:
        """Of the rows."""
        return self.rows.sample(coder)

    def steps(self, index: int, size: int, learners: Mapping[str, Learner]) -> Iterator[dict[str, Step]]:
        """By what the learners' objectives ask for at this step."""
        now = any(of_learner(learner) for learner in learners.values())
        self._last = index, self.spliced if now else self.rows
        yield from self._last[1].steps(index, size, learners)

    def places(self, index: int, size: int, rows: Sequence[int]) -> list[dict[str, int]]:
        """Where rows of the batch that was made last come from, where its feed knows."""
        if self._last is None or self._last[0] != index:
            return []
        feed = self._last[1]
        return feed.places(index, size, rows) if isinstance(feed, Traceable) else []


def with_model(
    rows: Feed, lm: Callable[[], LanguageModel], data: Contexts, jobs: Mapping[str, Job], seed: int, clock: Clock
) -> Feed:
    """`rows`, or where objectives look at the model a feed that runs it: throughout, or while one of them does.

    `lm` is called where a model is needed.
    """
    specs = [
        spec for job in jobs.values() for spec in objective_of(job.coder.activation.kind, job.config)
        if spec.term in OF_MODEL and spec.weight > 0
    ]  # fmt: skip
    if not specs:
        return rows
    coders = {name: job.coder for name, job in jobs.items()}
    spliced = SplicedFeed(lm(), data, coders, seed, spliced_together(jobs), clock=clock)
    throughout = any(spec.start == 0 and spec.stop == 1 for spec in specs)
    return spliced if throughout else StagedFeed(rows, spliced)


def spliced_together(jobs: Mapping[str, Job]) -> list[list[str]]:
    """Names by pass. Coders with `splice: together` go to the first pass in which nobody writes their hooks."""
    passes: list[tuple[list[str], set[str]]] = []
    alone: list[list[str]] = []
    for name, job in jobs.items():
        if job.config.splice == "alone":
            alone.append([name])
            continue
        writes = set(job.coder.writes)
        names, taken = next(((n, t) for n, t in passes if not t & writes), ([], set[str]()))
        if not names:
            passes.append((names, taken))
        names.append(name)
        taken |= writes
    return [names for names, _ in passes] + alone


def _parts(ids: np.ndarray, size: int = 4096) -> list[np.ndarray]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]
