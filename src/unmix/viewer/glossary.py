"""The metrics of a run: which are shown, in which order, and what each means in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from unmix.viewer.shapes import Metric
from unmix.viewer.wire import number


@dataclass(frozen=True)
class Term:
    """One metric's place and meaning."""

    key: str
    label: str
    group: str
    kind: str
    help: str
    aliases: tuple[str, ...] = ()


_REBUILD, _MODEL, _LATENTS = "Reconstruction", "Language model", "Latents"

TERMS = (
    Term("fvu", "FVU", _REBUILD, "share",
         "Fraction of variance unexplained: how much of what varies in the activations the coder loses. "
         "0 % is perfect, 100 % is no better than always answering the mean."),
    Term("explained_variance", "Explained variance", _REBUILD, "share", "The other side of FVU: 100 % is perfect."),
    Term("nmse", "NMSE", _REBUILD, "share",
         "Squared error over the squared length of the activations. Like FVU, but the mean counts as signal too."),
    Term("cosine", "Cosine", _REBUILD, "plain",
         "How well the direction is kept, length aside: cosine between activation and reconstruction, 1 is perfect."),
    Term("ce_orig", "CE original", _MODEL, "nats",
         "Cross-entropy of the untouched model's next-token prediction, in nats a token. Lower is better."),
    Term("ce_spliced", "CE spliced", _MODEL, "nats",
         "The same with the coder's reconstruction put in place of the activations."),
    Term("ce_ablated", "CE zero-ablated", _MODEL, "nats",
         "The same with zeros in their place: what the model loses without this hook.",
         ("ce_ablated_zero", "ce_zero_ablated")),
    Term("ce_increase", "CE increase", _MODEL, "nats", "Spliced minus original: what the reconstruction costs."),
    Term("ce_recovered", "CE recovered", _MODEL, "share",
         "Where spliced lies between zero-ablated (0 %) and original (100 %)."),
    Term("kl_spliced", "KL", _MODEL, "nats",
         "How far the spliced model's predictions move from the original's: KL(original ‖ spliced), nats a token."),
    Term("l0", "L0", _LATENTS, "plain", "How many latents fire on a token, on average."),
    Term("alive_fraction", "Alive", _LATENTS, "share",
         "Share of the latents that fired at least once on the held-out tokens."),
    Term("dense_fraction_1", "Dense, above 1 %", _LATENTS, "share",
         "Share of the latents that fire on more than one token in a hundred. Dense latents are rarely nameable."),
    Term("dense_fraction_10", "Dense, above 10 %", _LATENTS, "share",
         "Share of the latents that fire on more than one token in ten."),
    Term("tokens", "Held-out tokens", _LATENTS, "count", "Tokens that these numbers were measured on."),
)  # fmt: skip


def metrics_of(evaluation: Mapping[str, Any]) -> list[Metric]:
    """The known metrics that `evaluation` holds, in the order of `TERMS`.

    A value is a number, None, or `{"value", "low", "high"}`. What is absent is left out; what is None is shown as
    not measured.
    """
    found: list[Metric] = []
    for term in TERMS:
        key = next((key for key in (term.key, *term.aliases) if key in evaluation), None)
        if key is None:
            continue
        value, low, high = estimate(evaluation[key])
        found.append(
            {
                "key": term.key, "label": term.label, "group": term.group, "help": term.help, "kind": term.kind,
                "value": value, "low": low, "high": high,
            }
        )  # fmt: skip
    return found


def estimate(value: Any) -> tuple[float | None, float | None, float | None]:
    """`(value, low, high)` of a number or of a mapping with those keys; None for what is missing."""
    if isinstance(value, Mapping):
        entry = cast("Mapping[str, Any]", value)
        return _exact(entry.get("value")), _exact(entry.get("low")), _exact(entry.get("high"))
    return _exact(value), None, None


def _exact(value: Any) -> float | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # counts keep all their digits
    return number(value)
