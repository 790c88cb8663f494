"""Does a published coder do on the real model what its publisher says? And if not, what went wrong on the way.

L0 and FVU are measured at the hooks that the coder states, and where they are off under other readings of the same
files: the hooks nearby, scales that a layout forgets to mention, norms folded or not. A reading that fits far better
names the cause. Where no FVU was published, the hooks nearby are looked at in any case: one layer too far, a coder of
the residual stream still explains most of it (FVU 0.08 in place of 0.05 at layer 3 of SmolLM2, 0.10 two layers on).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.coder_set import CoderSet
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, ModelError
from unmix.core.policy import InputPolicy
from unmix.evaluate.hypotheses import Hypothesis, coder_hypotheses, hook_hypotheses
from unmix.evaluate.local import LocalMetrics
from unmix.lm import policy_mask
from unmix.lm.model import LanguageModel
from unmix.metrics.reconstruction import Reconstruction
from unmix.train.session import packed_documents, require_hooks

_BATCH_TOKENS = 2048
_ROWS = 1024
_SEARCH_TOKENS = 2048
"""Other readings are compared on about this many tokens, in contexts spread over the text; those that are named are
measured on all."""
_NEAR_L0 = 1.5
"""Measured L0 this many times the published one, or less, still agrees: it moves with text, BOS and precision."""
_NEAR_FVU = 0.15
"""This much more FVU than published still agrees."""
_BAD_FVU = 0.7
"""Above this a coder explains so little that something is likely wrong, whatever was published."""
_MUCH_BETTER = 0.7
"""Another reading is named as the cause where its FVU is below this share of the stated one's."""
_CLEARLY = 0.02
"""And by this much FVU, where the stated one is no fault in itself."""
_ANOTHER_STEP = 1.25
"""A reading that changes two things must be this much better than one that changes one."""
_NAMED = 3


@dataclass(frozen=True)
class Reading:
    """What one reading of the files gives on the model."""

    what: str
    """In words: `as stated`, or what is done differently."""
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    l0: float
    fvu: float
    tokens: int
    """Positions that it was measured on."""
    cause: str = ""
    """What it would mean, if this reading is the one that fits."""
    steps: int = 0
    """How many things are done differently."""


@dataclass(frozen=True)
class SelfCheck:
    """Published beside measured."""

    stated: Reading
    published: dict[str, float]
    others: tuple[Reading, ...]
    """Other readings, the best fitting first; empty where the stated one has the FVU that was published."""
    tokens: int
    disagreements: tuple[str, ...]
    """What does not agree, in words; empty is good."""
    causes: tuple[str, ...]
    """What would explain it, the likeliest first."""

    @property
    def agrees(self) -> bool:
        """Whether nothing disagrees."""
        return not self.disagreements

    def model_dump(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {**asdict(self), "agrees": self.agrees}


@torch.no_grad()
def self_check(
    coder: SparseCoder,
    lm: LanguageModel,
    tokens: Int[Tensor, "n pos"],
    published: Mapping[str, float] | None = None,
    thorough: bool = False,
) -> SelfCheck:
    """Measure `coder` on `tokens`, and look for the cause where the numbers are off.

    `published` holds `l0` and `fvu` where they are known; by default what the coder's files or release said. With
    `thorough` other readings are tried even where the stated one agrees, and every pair of a hook and a change.
    `ModelError` where the stated hooks do not exist or have another width, `ConfigError` where the coder states none or
    no position counts.
    """
    known = published_of([coder]) if published is None else dict(published)
    require_hooks(coder.name, coder.config.reads)
    start = Hypothesis("as stated", coder, coder.config.reads, coder.config.writes)
    bench = _Bench(lm, tokens, coder.config.input_policy)
    bench.fits(start)
    stated = bench.measure(start)
    wrong = _disagreements(stated, known)
    if not wrong and not thorough and "fvu" in known:
        return SelfCheck(stated, known, (), bench.counted, (), ())
    some = _Bench(lm, tokens[:: max(1, tokens.numel() // _SEARCH_TOKENS)], coder.config.input_policy)
    if wrong:
        tried = _search(some, start, known, thorough)
        named = [pair for pair in tried if _fits(pair[1], stated, known)]
    else:
        tried = _search(some, start, known, True) if thorough else _tried(some, some.moves(start), known)
        named = _elsewhere(tried, some.measure(start))
    whole = [bench.measure(hypothesis) for hypothesis, _ in named[:_NAMED]]
    if wrong:
        whole = sorted((r for r in whole if _fits(r, stated, known)), key=lambda r: _distance(r, known))
    elif whole:
        wrong = (f"FVU is {stated.fvu:.3g}, and {whole[0].fvu:.3g} at {' + '.join(whole[0].reads)}",)
    rest = [reading for hypothesis, reading in tried if not any(hypothesis is h for h, _ in named[:_NAMED])]
    causes = tuple(f"{r.cause} (then L0 {r.l0:.4g}, FVU {r.fvu:.3g})" for r in whole)
    return SelfCheck(stated, known, (*whole, *rest), bench.counted, wrong, causes)


@torch.no_grad()
def self_check_set(
    coders: CoderSet, lm: LanguageModel, tokens: Int[Tensor, "n pos"], published: Mapping[str, float] | None = None
) -> SelfCheck:
    """Measure coders whose writes add up: L0 of all together, FVU of the sums over every hook that is written.

    `others` are the hooks one by one. No other readings are tried. Raises as `self_check`.
    """
    first = next(iter(coders.values()))
    known = published_of(coders.values()) if published is None else dict(published)
    bench = _Bench(lm, tokens, first.config.input_policy)
    for name, coder in coders.items():
        require_hooks(name, coder.config.reads)
        bench.fits(Hypothesis("as stated", coder, coder.config.reads, coder.config.writes))
    writes = tuple(coders.widths)
    bench.capture([*coders.reads, *writes])
    targets = {hook: bench.inputs((hook,)) for hook in writes}
    whole = Reconstruction(torch.cat([t.double().mean(0) for t in targets.values()]))
    single = {hook: Reconstruction(t.double().mean(0)) for hook, t in targets.items()}
    fired = 0
    for part in bench.chunks():
        inputs = {hook: bench.inputs((hook,))[part].to(first.device) for hook in coders.reads}
        codes = coders.encode(inputs)
        fired += sum(int((own.values != 0).sum()) for own in codes.values())
        sums = {hook: value.cpu() for hook, value in coders.decode(codes).items()}
        for hook, metric in single.items():
            metric.update(targets[hook][part], sums[hook])
        whole.update(torch.cat([targets[h][part] for h in writes], -1), torch.cat([sums[h] for h in writes], -1))
    l0 = fired / bench.counted
    stated = Reading("as stated, summed", coders.reads, writes, l0, _number(whole.result()["fvu"]), bench.counted)
    each = tuple(
        Reading(f"at {hook}", (), (hook,), l0, _number(metric.result()["fvu"]), bench.counted)
        for hook, metric in single.items()
    )
    return SelfCheck(stated, known, each, bench.counted, _disagreements(stated, known), ())


def published_of(coders: Iterable[SparseCoder]) -> dict[str, float]:
    """L0 and FVU as files or release state them; of several coders that write together, only what all state alike."""
    told = [dict(coder.config.training.get("published") or {}) for coder in coders]
    first = told[0] if told and all(one == told[0] for one in told) else {}
    return {key: float(value) for key, value in first.items() if key in ("l0", "fvu") and value is not None}


_Tried = list[tuple[Hypothesis, Reading]]


def _search(bench: _Bench, start: Hypothesis, known: Mapping[str, float], thorough: bool) -> _Tried:
    """Every single change; then a second one on top of the best (`thorough`: of every hook). Best first."""
    elsewhere = bench.moves(start)
    first = _tried(bench, [*elsewhere, *bench.changes(start)], known)
    if thorough:
        second = [two for base in elsewhere for two in bench.changes(base)]
    elif not first or not _disagreements(first[0][1], known):
        second = []
    else:
        best = first[0][0]
        moved = (best.reads, best.writes) != (start.reads, start.writes)
        second = bench.changes(best) if moved else bench.moves(best)
    return sorted([*first, *_tried(bench, second, known)], key=lambda pair: _distance(pair[1], known))


def _tried(bench: _Bench, hypotheses: Iterable[Hypothesis], known: Mapping[str, float]) -> _Tried:
    """Each measured, the best first."""
    return sorted([(h, bench.measure(h)) for h in hypotheses], key=lambda pair: _distance(pair[1], known))


def _elsewhere(tried: _Tried, stated: Reading) -> _Tried:
    """Hooks where a coder that is not bad at its own fits far better still. Only them: a change of scale or norm can
    flatter a coder that is read rightly."""
    return [
        (hypothesis, reading)
        for hypothesis, reading in tried
        if hypothesis.steps == 1
        and (reading.reads, reading.writes) != (stated.reads, stated.writes)
        and reading.fvu < min(stated.fvu * _MUCH_BETTER, stated.fvu - _CLEARLY)
    ]


class _Bench:
    """One model, one text: activations of any hook, captured once, at the positions that the policy counts."""

    def __init__(self, lm: LanguageModel, tokens: Tensor, policy: InputPolicy) -> None:
        self.lm, self.tokens, self.policy = lm, tokens, policy
        self.mask = policy_mask(tokens, policy)
        self.counted = int(self.mask.sum())
        if not self.counted:
            raise ConfigError("no position counts under the coder's input policy: give longer text")
        rows = torch.arange(len(tokens)).unsqueeze(-1).expand_as(tokens)
        self.contexts = rows[self.mask]
        self._documents = packed_documents(tokens, policy)
        self._kept: dict[str, Tensor] = {}

    def fits(self, hypothesis: Hypothesis) -> None:
        """`ModelError` where a hook is not in the model, or not as wide as the coder needs."""
        config = hypothesis.coder.config
        for hooks, expected in ((hypothesis.reads, config.d_in), (hypothesis.writes, config.width_out)):
            widths = [self.lm.width(hook) for hook in hooks]
            if sum(widths) != expected:
                raise ModelError(
                    f"{hypothesis.coder.name}: {' + '.join(hooks)} of {self.lm.name} is "
                    f"{' + '.join(map(str, widths))} wide, the coder needs {expected}"
                )

    def moves(self, base: Hypothesis) -> list[Hypothesis]:
        """`base` at the hooks nearby, whose activations are captured all at once."""
        found = list(hook_hypotheses(base, self.lm))
        self.capture([hook for h in found for hook in (*h.reads, *h.writes)])
        return found

    def changes(self, base: Hypothesis) -> list[Hypothesis]:
        """`base` with other settings, at its hooks."""
        return list(coder_hypotheses(base, self.inputs(base.reads), self.inputs(base.writes)))

    def capture(self, hooks: Sequence[str]) -> None:
        """Activations of hooks that are not there yet, in one pass over the text."""
        parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks if hook not in self._kept}
        step = max(1, _BATCH_TOKENS // self.tokens.shape[1])
        for start in range(0, len(self.tokens) if parts else 0, step):
            some = slice(start, start + step)
            documents = None if self._documents is None else self._documents[some]
            found = self.lm.capture(self.tokens[some], list(parts), self.policy, documents=documents)
            for hook, values in parts.items():
                values.append(found[hook].cpu()[self.mask[some]].float())
        self._kept |= {hook: torch.cat(values) for hook, values in parts.items()}

    def chunks(self) -> Iterator[slice]:
        """About `_ROWS` rows at a time, whole contexts: some coders look at the tokens before."""
        lengths = self.mask.sum(-1).tolist()
        start = stop = 0
        for length in lengths:
            if stop > start and stop + length - start > _ROWS:
                yield slice(start, stop)
                start = stop
            stop += length
        yield slice(start, stop)

    def inputs(self, hooks: Sequence[str]) -> Float[Tensor, "rows d"]:
        """Activations of the hooks, concatenated, float32 on the CPU."""
        self.capture(hooks)
        return torch.cat([self._kept[hook] for hook in hooks], dim=-1)

    def measure(self, hypothesis: Hypothesis) -> Reading:
        """L0 and FVU of one reading."""
        h, coder = hypothesis, hypothesis.coder
        self.capture([*h.reads, *h.writes])
        x, target = self.inputs(h.reads), self.inputs(h.writes)
        metrics = LocalMetrics(coder, target.double().mean(0))
        for part in self.chunks():
            metrics.update(x[part].to(coder.device), target[part].to(coder.device), self.contexts[part])
        l0, fvu = metrics.sparsity.result()["l0"], metrics.reconstruction.result()["fvu"]
        return Reading(h.what, h.reads, h.writes, _number(l0), _number(fvu), len(x), h.cause, h.steps)


def _number(value: float | None) -> float:
    """NaN where undefined: where an activation never varies, no reading can be told from another."""
    return math.nan if value is None else value


def _disagreements(stated: Reading, published: Mapping[str, float]) -> tuple[str, ...]:
    wrong: list[str] = []
    l0, fvu = published.get("l0"), published.get("fvu")
    if l0 is not None and not l0 / _NEAR_L0 <= stated.l0 <= l0 * _NEAR_L0:
        wrong.append(f"L0 is {stated.l0:.4g}, published {l0:.4g}")
    if fvu is not None and not stated.fvu <= fvu + _NEAR_FVU:
        wrong.append(f"FVU is {stated.fvu:.3g}, published {fvu:.3g}")
    if fvu is None and not stated.fvu <= _BAD_FVU:
        wrong.append(f"FVU is {stated.fvu:.3g}: {_judged(stated.fvu)}")
    return tuple(wrong)


def _judged(fvu: float) -> str:
    if math.isnan(fvu):
        return "undefined, since the activation never varies"
    return "worse than the mean activation alone" if fvu >= 1 else "almost nothing of the activation is explained"


def _fits(reading: Reading, stated: Reading, published: Mapping[str, float]) -> bool:
    """Whether a reading takes every disagreement away, or explains the activation far better than the stated one."""
    much_better = reading.fvu < stated.fvu * _MUCH_BETTER and reading.fvu < _BAD_FVU
    return much_better or not _disagreements(reading, published)


def _distance(reading: Reading, published: Mapping[str, float]) -> float:
    """How far a reading is from what was published, 1 being the edge of agreement; what changes less comes first."""
    l0, fvu = published.get("l0"), published.get("fvu")
    away = reading.fvu / _BAD_FVU if fvu is None else max(reading.fvu - fvu, 0.0) / _NEAR_FVU + 0.1 * reading.fvu
    if l0:
        away += abs(math.log(max(reading.l0, 1e-3) / l0)) / math.log(_NEAR_L0)
    return math.inf if math.isnan(away) else away * _ANOTHER_STEP ** (reading.steps - 1)
