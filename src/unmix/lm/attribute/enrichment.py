"""Token sets: does a latent raise the logits of a set of tokens more than those of the rest?

The statistic is Mann and Whitney's: over all pairs of a token inside and one outside, how often the inside one has
the larger logit (`auc`, 0.5 by chance), with its normal approximation as z and p. It looks at ranks alone, so the
norm's scale, soft caps and outliers do not enter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.core.errors import ConfigError, ModelError
from unmix.lm.attribute.direct import LatentLogits

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel


@dataclass(frozen=True)
class Enrichment:
    """One latent and one set."""

    latent: int
    name: str
    auc: float
    """Chance that a token of the set has a larger logit than one outside it; ties count half."""
    z: float
    p: float
    """Two-sided."""
    q: float
    """Benjamini and Hochberg's p over everything asked for at once: the false discovery rate at this p."""
    mean_difference: float
    """Mean logit inside − mean logit outside, in standard deviations of all logits."""
    size: int


def token_set_enrichment(
    logits: LatentLogits, sets: Mapping[str, Sequence[int]], vocabulary: Sequence[int] | None = None
) -> list[Enrichment]:
    """Every latent of `logits` against every set of token ids, most enriched first.

    `vocabulary`: the ids that make up set and rest (default: all; give the tokenizer's own where an embedding has
    padding rows). `ConfigError` for a set without tokens, or without a rest.
    """
    ids = torch.arange(logits.logits.shape[-1]) if vocabulary is None else torch.tensor(sorted(set(vocabulary)))
    values = logits.logits[:, ids].double()
    ranks = _ranks(values)
    spread = values.std(-1).clamp(min=1e-30)
    found: list[tuple[int, str, float, float, float, int]] = []
    for name, members in sets.items():
        inside = torch.isin(ids, torch.tensor(sorted(set(members))))
        n, rest = int(inside.sum()), int((~inside).sum())
        if not n or not rest:
            raise ConfigError(f"token set {name!r}: {n} tokens inside and {rest} outside; both need some")
        u = ranks[:, inside].sum(-1) - n * (n + 1) / 2
        auc = u / (n * rest)
        deviation = (n * rest * _tie_factor(values, n + rest) / 12).sqrt().clamp(min=1e-30)
        z = (u - n * rest / 2) / deviation
        gap = (values[:, inside].mean(-1) - values[:, ~inside].mean(-1)) / spread
        for i, latent in enumerate(logits.latents):
            found.append((latent, name, float(auc[i]), float(z[i]), float(gap[i]), n))
    ps = [math.erfc(abs(z) / math.sqrt(2)) for _, _, _, z, _, _ in found]
    rows = [
        Enrichment(latent, name, auc, z, p, q, gap, n)
        for (latent, name, auc, z, gap, n), p, q in zip(found, ps, _false_discovery(ps))
    ]
    return sorted(rows, key=lambda row: -row.z)


def token_sets(lm: LanguageModel) -> dict[str, list[int]]:
    """Sets that most vocabularies have, by how a token is written; sets without tokens are left out."""
    texts = lm.token_strings(range(min(lm.vocab_size, len(lm.tokenizer))))
    kinds: dict[str, list[int]] = {
        "begins a word": [], "goes on": [], "Capitalised": [], "UPPERCASE": [], "digits": [], "punctuation": [],
        "line breaks": [], "outside ASCII": [],
    }  # fmt: skip
    for i, text in enumerate(texts):
        core = text.strip(" ")
        if text.startswith(" ") and core[:1].isalpha():
            kinds["begins a word"].append(i)
        elif core[:1].isalpha():
            kinds["goes on"].append(i)
        if len(core) > 1 and core.isalpha():
            if core.isupper():
                kinds["UPPERCASE"].append(i)
            elif core[0].isupper():
                kinds["Capitalised"].append(i)
        if core.isdigit():
            kinds["digits"].append(i)
        elif core and core.isascii() and core.isprintable() and not any(c.isalnum() or c.isspace() for c in core):
            kinds["punctuation"].append(i)
        if "\n" in text:
            kinds["line breaks"].append(i)
        if not text.isascii():
            kinds["outside ASCII"].append(i)
    return {name: members for name, members in kinds.items() if members}


def as_token_set(lm: LanguageModel, words: Sequence[str]) -> list[int]:
    """Ids of words, each with and without a space before, where that is one token. `ModelError` where none is."""
    ids: set[int] = set()
    for word in words:
        for form in (word, f" {word}"):
            found: list[int] = list(lm.tokenizer(form, add_special_tokens=False)["input_ids"])
            if len(found) == 1:
                ids.add(int(found[0]))
    if not ids:
        raise ModelError(f"none of {', '.join(map(repr, words))} is one token of {lm.name}")
    return sorted(ids)


def _ranks(values: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Ranks from 1, equal values sharing their mean rank."""
    rows: list[Tensor] = []
    for row in values:
        _, owner, counts = row.unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        rows.append((ends - (counts.double() - 1) / 2)[owner])
    return torch.stack(rows)


def _tie_factor(values: Tensor, total: int) -> Tensor:
    """N + 1 less what ties take from the variance [n]."""
    lost: list[float] = []
    for row in values:
        counts = row.unique(return_counts=True)[1].double()
        lost.append(float((counts**3 - counts).sum()) / (total * (total - 1)))
    return total + 1 - torch.tensor(lost, dtype=torch.float64)


def _false_discovery(ps: Sequence[float]) -> list[float]:
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    found = [0.0] * len(ps)
    least = 1.0
    for rank in range(len(order), 0, -1):
        least = min(least, ps[order[rank - 1]] * len(ps) / rank)
        found[order[rank - 1]] = least
    return found
