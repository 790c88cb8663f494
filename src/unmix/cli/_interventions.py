"""Interventions as words of a command line: `--set 123=8 --add layers.3:77=-2 --clamp 4=0:3`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from unmix.core.errors import ConfigError

if TYPE_CHECKING:
    from unmix.lm.interventions.acts import Intervention

KINDS = ("set", "add", "multiply", "ablate", "clamp", "steer")


def parse_where(text: str) -> Literal["all", "prompt", "generated"] | tuple[int, ...]:
    """`all`, `prompt`, `generated`, or positions `0,3,5`."""
    if text == "all" or text == "prompt" or text == "generated":
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--where {text}: expected all, prompt, generated, or positions such as 0,3,5") from None


def make_intervention(kind: str, text: str, where: Any, units: Any) -> Intervention:
    """One flag's value, `[CODER:]LATENT=…`, as an intervention; `ConfigError` naming the flag where it is none."""
    from unmix.lm.intervene import Ablate, Add, Clamp, Multiply, Set, Steer

    place, equals, amount = text.partition("=")
    name, _, number = place.rpartition(":")
    shown = f"--{kind} {text}"
    try:
        latent = int(number)
    except ValueError:
        raise ConfigError(f"{shown}: {number!r} is no latent; it looks like --{kind} {_example(kind)}") from None
    common: dict[str, Any] = {"latent": latent, "where": where, "coder": name or None}
    if kind == "ablate":
        return Ablate(
            **common, to=amount if amount in ("zero", "mean") else _number(shown, amount) if equals else "zero"
        )
    if not equals:
        raise ConfigError(f"{shown}: a value is missing; it looks like --{kind} {_example(kind)}")
    if kind == "clamp":
        low, colon, high = amount.partition(":")
        if not colon:
            raise ConfigError(f"{shown}: expected two bounds, one of them may be left out: --clamp {_example(kind)}")
        bounds = [_number(shown, bound) if bound else None for bound in (low, high)]
        return Clamp(**common, minimum=bounds[0], maximum=bounds[1], units=units)
    value = _number(shown, amount)
    if kind == "multiply":
        return Multiply(**common, factor=value)
    if kind == "steer":
        return Steer(scale=value, **common)
    return (Set if kind == "set" else Add)(**common, value=value, units=units)


def _number(shown: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{shown}: {text!r} is no number") from None


def _example(kind: str) -> str:
    return {"ablate": "123 (or 123=mean)", "clamp": "123=0:3"}.get(kind, "123=8")
