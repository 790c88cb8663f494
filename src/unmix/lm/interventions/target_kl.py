"""How strong an intervention must be to move the next-token distribution by a given amount."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmix.core.errors import ConfigError, ModelError, NonFiniteError
from unmix.lm.forward import as_inputs
from unmix.lm.interventions.acts import Intervention
from unmix.lm.interventions.places import range_of

if TYPE_CHECKING:
    from unmix.lm.bound import BoundModel

FARTHEST = 2.0**40
_UNMOVED = 2.0**16
"""A KL that is 0 up to here stays so: KL grows as the square of the strength."""


@dataclass(frozen=True)
class TargetKL:
    """What the search found."""

    strength: float
    """Factor on the amounts of the interventions given."""
    kl: float
    """Mean KL there, in nats."""
    interventions: tuple[Intervention, ...]
    """Those given, at that strength: ready for `generate`."""
    tried: tuple[tuple[float, float], ...]
    """Every (strength, KL) measured, in order."""


def steer_to_kl(
    bound: BoundModel,
    inputs: str | Any,
    interventions: Sequence[Intervention],
    target: float,
    *,
    over: Literal["prompt", "generated"] = "prompt",
    new_tokens: int = 32,
    tolerance: float = 0.01,
    most: int = 60,
) -> TargetKL:
    """The strength s at which mean KL(p ‖ p_s) = `target`, to a relative `tolerance`.

    p is the next-token distribution of the bound model as it is, p_s that with `interventions` scaled by s (Set, Add
    and Steer: s times their amount; Multiply: 1 + s·(factor − 1)); both on the same tokens. `over="prompt"`: the mean
    over every position of `inputs`. `over="generated"`: the bound model first writes `new_tokens` greedily, without the
    interventions; that text is held fixed and the mean is over its positions, so that KL stays a continuous function.

    Method: halve or double from 1 until the target lies between two neighbours, then regula falsi (Illinois) on
    √KL − √target, which is nearly straight in s since KL grows as s² near 0. Raises `ConfigError` for targets not above
    0 and kinds without a strength, `ModelError` where no strength up to 2⁴⁰ reaches the target or `most` measurements
    do not, `NonFiniteError` where the model's logits are not finite.
    """
    if not (target > 0 and math.isfinite(target)) or not 0 < tolerance < 1 or most < 2:
        raise ConfigError("target must be above 0 and finite, tolerance between 0 and 1, most at least 2")
    if over not in ("prompt", "generated"):
        raise ConfigError(f"over is {over!r}; allowed: prompt, generated")
    if not interventions:
        raise ConfigError("there is no intervention to scale")
    if over == "prompt" and all(range_of(act.where) == "generated" for act in interventions):
        raise ConfigError('where="generated" changes nothing on the prompt, where KL is measured; say over="generated"')
    measure = _Measure(bound, inputs, interventions, over, new_tokens)
    search = _Search(measure, target, tolerance, most)
    strength, kl = search.run()
    return TargetKL(strength, kl, tuple(act.scaled(strength) for act in interventions), tuple(search.tried))


class _Measure:
    """Mean KL at a strength, on tokens that stay the same."""

    def __init__(
        self, bound: BoundModel, inputs: Any, acts: Sequence[Intervention], over: str, new_tokens: int
    ) -> None:
        self.bound, self.acts = bound, acts
        for act in acts:
            bound.plan([act.scaled(1.0)])
        tokens: Int[Tensor, "batch pos"] = as_inputs(bound.lm, inputs, bound.policy)
        self.prompt = tokens.shape[1]
        self.tokens = tokens
        if over == "generated":
            new = bound.generate_tokens(tokens, new_tokens, stop_ids=())
            self.tokens = torch.cat([tokens, new.to(tokens.device)], dim=1)
        places = torch.arange(self.tokens.shape[1], device=tokens.device)
        self.where: Bool[Tensor, " pos"] = places < self.prompt if over == "prompt" else places >= self.prompt
        if not bool(self.where.any()):
            raise ConfigError("no position to measure: new_tokens must be at least 1")
        self.clean = self._log_probs(())

    def __call__(self, strength: float) -> float:
        """Nats a position."""
        moved = self._log_probs([act.scaled(strength) for act in self.acts])
        kl = (self.clean.exp() * (self.clean - moved)).sum(dim=-1)
        return max(0.0, float(kl.double().mean()))

    @torch.no_grad()
    def _log_probs(self, acts: Sequence[Intervention]) -> Float[Tensor, "batch chosen vocab"]:
        found = self.bound(self.tokens, interventions=acts, prompt=self.prompt).logits
        if found is None:
            raise ModelError(f"{self.bound.lm.name} returned no logits")
        chosen = found[:, self.where].float()
        if not bool(chosen.isfinite().all()):
            raise NonFiniteError(f"the logits of {self.bound.lm.name} are not finite under these interventions")
        return chosen.log_softmax(dim=-1)


class _Search:
    """A root of √f(s) − √target, for an f that starts near 0 and grows."""

    def __init__(self, measure: Callable[[float], float], target: float, tolerance: float, most: int) -> None:
        self.measure, self.target, self.tolerance, self.most = measure, target, tolerance, most
        self.tried: list[tuple[float, float]] = []

    def run(self) -> tuple[float, float]:
        """(strength, KL)."""
        (a, fa), (b, fb) = self._bracket()
        ga, gb, side = self._gap(fa), self._gap(fb), 0
        while not (self._near(fa) or self._near(fb)):
            s = (a * gb - b * ga) / (gb - ga)
            found = self._at(s if a < s < b else (a + b) / 2)
            s, gap = self.tried[-1][0], self._gap(found)
            # An end that stays twice counts half: plain regula falsi would creep up from one side.
            if gap < 0:
                a, fa, ga, gb = s, found, gap, gb / 2 if side < 0 else gb
            else:
                b, fb, gb, ga = s, found, gap, ga / 2 if side > 0 else ga
            side = -1 if gap < 0 else 1
        return (a, fa) if self._near(fa) else (b, fb)

    def _bracket(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Two strengths, the lower with KL below the target, the higher with KL at or above it."""
        s = 1.0
        found = self._at(s)
        low = high = (s, found)
        if found >= self.target:
            while found >= self.target:
                high = (s, found)
                s /= 2
                if s < 1 / FARTHEST:
                    raise ModelError(
                        f"KL is {found:.4g} however weak the intervention is: it is above the target "
                        f"{self.target:.4g} at strength 0 already"
                    )
                found = self._at(s)
            return (s, found), high
        while found < self.target:
            low = (s, found)
            s *= 2
            if s > FARTHEST:
                raise ModelError(
                    f"no strength reaches a KL of {self.target:.4g}: the largest found is "
                    f"{max(kl for _, kl in self.tried):.4g}"
                )
            found = self._at(s)
            if found == 0 and s >= _UNMOVED:
                raise ModelError(
                    f"no strength reaches a KL of {self.target:.4g}: at {s:.4g} times what is asked the interventions "
                    "still change nothing at the positions measured"
                )
        return low, (s, found)

    def _at(self, strength: float) -> float:
        if len(self.tried) >= self.most:
            near = min(self.tried, key=lambda pair: abs(pair[1] - self.target))
            raise ModelError(
                f"{self.most} measurements did not find a KL of {self.target:.4g}; nearest: {near[1]:.4g} at "
                f"strength {near[0]:.4g}"
            )
        found = self.measure(strength)
        self.tried.append((strength, found))
        return found

    def _gap(self, kl: float) -> float:
        return math.sqrt(kl) - math.sqrt(self.target)

    def _near(self, kl: float) -> bool:
        return abs(kl - self.target) <= self.tolerance * self.target
