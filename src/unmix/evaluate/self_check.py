"""Does a published coder do on the real model what its publisher says? And if not, what went wrong on the way.

L0 and FVU are measured at the hook that the coder states, and then under other readings of the same files: the hooks
nearby, scales that a layout forgets to mention, norms folded or not. A reading that fits far better names the cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, ModelError
from unmix.evaluate.hypotheses import Hypothesis, coder_hypotheses, hook_hypotheses
from unmix.evaluate.local import LocalMetrics
from unmix.lm import policy_mask
from unmix.lm.model import LanguageModel

_BATCH = 8
_NEAR_L0 = 1.5
"""Measured L0 this many times the published one, or less, still agrees: it moves with text, BOS and precision."""
_NEAR_FVU = 0.15
"""As much FVU apart still agrees."""
_BAD_FVU = 0.7
"""Above this a coder explains so little that something is likely wrong, whatever was published."""
_MUCH_BETTER = 0.7
"""Another reading is named as the cause where its FVU is below this share of the stated one's."""


@dataclass(frozen=True)
class Reading:
    """What one reading of the files gives on the model."""

    what: str
    """In words: `as stated`, or what is done differently."""
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    l0: float
    fvu: float
    cause: str = ""
    """What it would mean, if this reading is the one that fits."""


@dataclass(frozen=True)
class SelfCheck:
    """Published beside measured."""

    stated: Reading
    published: dict[str, float]
    others: tuple[Reading, ...]
    """Other readings, the best FVU first; empty where the stated one was good enough."""
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
        return asdict(self)


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
    `thorough` the other readings are tried even where the stated one agrees. `ModelError` where the stated hooks do not
    exist or have another width, `ConfigError` where the coder states none or no position counts.
    """
    told = published if published is not None else coder.config.training.get("published") or {}
    known = {k: float(v) for k, v in told.items() if k in ("l0", "fvu")}
    bench = _Bench(lm, tokens, coder)
    stated = bench.measure(Hypothesis("as stated", coder, coder.config.reads, coder.config.writes))
    wrong = _disagreements(stated, known)
    if not wrong and not thorough:
        return SelfCheck(stated, known, (), bench.counted, (), ())
    others = _others(bench, coder, stated)
    return SelfCheck(stated, known, others, bench.counted, wrong, _causes(stated, others, known) if wrong else ())


def _others(bench: _Bench, coder: SparseCoder, stated: Reading) -> tuple[Reading, ...]:
    """Other hooks with the coder as it is; then other readings of the coder, at the stated hook and the best one."""
    hooks = [bench.measure(h) for h in hook_hypotheses(coder, bench.lm)]
    best = min([stated, *hooks], key=lambda r: r.fvu)
    places = dict.fromkeys([(stated.reads, stated.writes), (best.reads, best.writes)])
    readings = [
        bench.measure(hypothesis)
        for reads, writes in places
        for hypothesis in coder_hypotheses(coder, bench.inputs(reads), reads, writes)
    ]
    return tuple(sorted([*hooks, *readings], key=lambda r: r.fvu))


class _Bench:
    """One model, one text: activations of any hook, captured once, at the positions that the coder's policy counts."""

    def __init__(self, lm: LanguageModel, tokens: Tensor, coder: SparseCoder) -> None:
        self.lm, self.tokens, self.coder = lm, tokens, coder
        self.mask = policy_mask(tokens, coder.config.input_policy)
        self.counted = int(self.mask.sum())
        if not self.counted:
            raise ConfigError("no position counts under the coder's input policy: give longer text")
        rows = torch.arange(len(tokens)).unsqueeze(-1).expand_as(tokens)
        self.contexts = rows[self.mask]
        self._kept: dict[str, Tensor] = {}

    def inputs(self, hooks: Sequence[str]) -> Float[Tensor, "rows d"]:
        """Activations of the hooks, concatenated, float32."""
        missing = [hook for hook in hooks if hook not in self._kept]
        if missing:
            parts: dict[str, list[Tensor]] = {hook: [] for hook in missing}
            for start in range(0, len(self.tokens), _BATCH):
                some = slice(start, start + _BATCH)
                policy = self.coder.config.input_policy
                found = self.lm.capture(self.tokens[some].to(self.lm.device), missing, policy)
                for hook in missing:
                    parts[hook].append(found[hook][self.mask[some].to(found[hook].device)].float().cpu())
            self._kept |= {hook: torch.cat(values) for hook, values in parts.items()}
        return torch.cat([self._kept[hook] for hook in hooks], dim=-1)

    def measure(self, hypothesis: Hypothesis) -> Reading:
        """L0 and FVU of one reading."""
        coder = hypothesis.coder
        if hypothesis.reads == ("input",):
            raise ConfigError(f"{coder.name}: its files do not say which hook it reads; give it with --hook")
        x, target = self.inputs(hypothesis.reads), self.inputs(hypothesis.writes)
        for hooks, found, expected in (
            (hypothesis.reads, x.shape[-1], coder.config.d_in),
            (hypothesis.writes, target.shape[-1], coder.config.width_out),
        ):
            if found != expected:
                raise ModelError(
                    f"{coder.name}: {' + '.join(hooks)} of {self.lm.name} is {found} wide, the coder needs {expected}"
                )
        metrics = LocalMetrics(coder, target.double().mean(0))
        for start in range(0, len(x), 1024):
            part = slice(start, start + 1024)
            metrics.update(x[part].to(coder.device), target[part].to(coder.device), self.contexts[part])
        found = metrics.intervals(seed=0, resamples=2, level=0.95)
        # Undefined where the activation never varies: then no reading can be told from another.
        l0, fvu = (math.nan if (value := found[name].value) is None else value for name in ("l0", "fvu"))
        return Reading(hypothesis.what, hypothesis.reads, hypothesis.writes, l0, fvu, hypothesis.cause)


def _disagreements(stated: Reading, published: Mapping[str, float]) -> tuple[str, ...]:
    wrong: list[str] = []
    l0, fvu = published.get("l0"), published.get("fvu")
    if l0 is not None and not l0 / _NEAR_L0 <= stated.l0 <= l0 * _NEAR_L0:
        wrong.append(f"L0 is {stated.l0:.4g}, published {l0:.4g}")
    if fvu is not None and abs(stated.fvu - fvu) > _NEAR_FVU:
        wrong.append(f"FVU is {stated.fvu:.3g}, published {fvu:.3g}")
    if fvu is None and not stated.fvu <= _BAD_FVU:
        wrong.append(f"FVU is {stated.fvu:.3g}: {_judged(stated.fvu)}")
    return tuple(wrong)


def _judged(fvu: float) -> str:
    return "worse than the mean activation alone" if fvu >= 1 else "almost nothing of the activation is explained"


def _causes(stated: Reading, others: Sequence[Reading], published: Mapping[str, float]) -> tuple[str, ...]:
    """The causes behind readings that fit much better, best first."""
    fitting = [r for r in others if r.fvu < stated.fvu * _MUCH_BETTER and r.fvu < _BAD_FVU]
    l0 = published.get("l0")
    if l0 is not None:
        # Of readings that reconstruct alike, the one whose L0 was published comes first.
        fitting.sort(key=lambda r: (round(r.fvu, 1), abs(math.log(max(r.l0, 1e-3) / l0))))
    return tuple(f"{r.cause} (then L0 {r.l0:.4g}, FVU {r.fvu:.3g})" for r in fitting[:3])
