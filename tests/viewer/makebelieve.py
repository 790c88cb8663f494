"""A make-believe run: real words (the interpreter's own manual), invented latents, some of them hostile."""

from __future__ import annotations

import math
import random
import re
from functools import cache

from unmix.viewer.shapes import (
    Explanation,
    Histogram,
    LatentPage,
    LatentTable,
    PromptToken,
    ReportData,
    RunInfo,
    ScoreDistribution,
    ShownWindow,
    SummaryRow,
)

HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "\u2028\u2029",
    "\u202eright to left",
    "\ud800",
    "",
    "]]>--><!--",
    "{{constructor}}{@html 1}",
    "__proto__",
    "\x00\x1b[31m",
)
HOSTILE_TEXT = (
    "<img src=x onerror=\"window.pwned=1\"> </script><script>window.pwned=1</script> \u2028 \u202e \ud800 'q'"
)
HOSTILE_LATENT = 7
DEAD_LATENT = 11

THEMES = (
    ("the keyword “return” in descriptions of functions", ("return", "returns", "returned")),
    ("exceptions being raised or caught", ("raise", "raised", "exception", "except", "error")),
    ("references to iterables and iteration", ("iterable", "iterator", "iteration", "sequence")),
    ("opening of a parenthesised call", ("(", "()")),
    ("the word “not” and other negations", ("not", "never", "cannot", "no")),
    ("modal verbs that state a rule of the language", ("must", "may", "should", "can")),
    ("attribute access and names of attributes", ("attribute", "attributes", "name", "names")),
    ("assignment, targets and left-hand sides", ("assignment", "assigned", "target", "targets", "=")),
    ("class definitions and inheritance", ("class", "classes", "base", "subclass", "metaclass")),
    ("numbers, integers and arithmetic", ("integer", "integers", "number", "numeric", "float")),
    ("string formatting and literals", ("string", "strings", "format", "literal", "literals")),
    ("import statements and modules", ("import", "module", "modules", "package")),
    ("second half of hyphenated adjectives", ("-", "like", "based", "defined")),
    ("articles before a technical noun", ("the", "a", "an")),
    ("ends of sentences", (".",)),
    ("references to the object itself: “self” and “its”", ("self", "its", "itself", "instance")),
    ("conditions introduced by “if” or “when”", ("if", "when", "whether", "otherwise")),
    ("code blocks in documentation, right after the indentation", (">>>", "def", "for", "while")),
    ("versions in which something changed", ("version", "changed", "new", "added")),
    ("comparison and identity operators", ("is", "==", "!=", "comparison", "compare")),
)  # fmt: skip


@cache
def corpus() -> list[str]:
    """Tokens of the manual, with the space before a word belonging to the word."""
    from pydoc_data.topics import topics

    text = "\n".join(body for _, body in sorted(topics.items()))[:400_000]
    return re.findall(r" ?[A-Za-z]+| ?\d+|\n| +(?= )| ?[^\sA-Za-z\d]{1,3}|\s", text)


def run_info(n_latents: int, name: str = "demo") -> RunInfo:
    return {
        "name": name,
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "hook": "layers.10",
        "coder": "layers.10",
        "n_latents": n_latents,
        "activation": "top-k, k = 32",
        "source": "Python documentation",
        "tokens": 699_904,
        "command": "unmix view runs/demo",
        "version": "0.1.0",
    }


EVALUATION = {
    "l0": {"value": 31.98, "low": 31.9, "high": 32.0},
    "fvu": {"value": 0.1873, "low": 0.1831, "high": 0.1921},
    "explained_variance": {"value": 0.8127, "low": 0.8079, "high": 0.8169},
    "nmse": {"value": 0.0921, "low": 0.0902, "high": 0.0945},
    "cosine": {"value": 0.9514, "low": 0.9502, "high": 0.9523},
    "ce_orig": {"value": 2.913, "low": 2.861, "high": 2.968},
    "ce_spliced": {"value": 3.221, "low": 3.165, "high": 3.28},
    "ce_ablated_zero": {"value": 9.871, "low": 9.75, "high": 9.99},
    "ce_increase": {"value": 0.308, "low": 0.291, "high": 0.326},
    "ce_recovered": {"value": 0.9557, "low": 0.9529, "high": 0.9581},
    "kl_spliced": {"value": 0.2871, "low": 0.27, "high": 0.305},
    "alive_fraction": 0.9371,
    "dense_fraction_1": 0.1424,
    "dense_fraction_10": 0.0067,
    "tokens": 24064,
    "mask": "skip_first 1",
    "frequency_histogram": {
        "log10_edges": [-8 + 0.25 * i for i in range(33)],
        "latents": [0] * 11
        + [33, 61, 110, 167, 248, 371, 502, 610, 641, 560, 410, 262, 174, 98, 71, 33, 21, 10, 4, 1, 0],
        "never": 290,
        "tokens": 24064,
    },
}  # fmt: skip


class World:
    """Invented latents over the real words; the same numbers every time."""

    def __init__(self, n_latents: int = 600, explained: int = 200) -> None:
        self.n_latents, self.explained = n_latents, min(explained, n_latents)
        self.tokens = corpus()
        self.places: dict[str, list[int]] = {}
        for i, token in enumerate(self.tokens):
            self.places.setdefault(token.strip().lower() or token, []).append(i)

    def rng(self, latent: int) -> random.Random:
        return random.Random(latent * 7919 + 13)

    def theme(self, latent: int) -> tuple[str, tuple[str, ...]]:
        return THEMES[latent % len(THEMES)]

    def frequency(self, latent: int) -> float:
        return 0.0 if latent == DEAD_LATENT else 10 ** min(self.rng(latent).gauss(-3.1, 0.7), -0.4)

    def maximum(self, latent: int) -> float:
        return 0.0 if latent == DEAD_LATENT else 2 + 18 * self.rng(latent + 1).random() ** 2

    def window(self, latent: int, place: int, strength: float, tenth: int | None) -> ShownWindow:
        _, words = self.theme(latent)
        rng, start = self.rng(latent + place), max(0, place - 20)
        tokens = self.tokens[start : place + 9]
        peak = place - start
        values = [
            round(strength * self.maximum(latent), 3)
            if i == peak
            else round(strength * self.maximum(latent) * rng.random() * 0.8, 3)
            if token.strip().lower() in words or (abs(i - peak) == 1 and rng.random() < 0.4)
            else 0.0
            for i, token in enumerate(tokens)
        ]
        return {
            "tokens": tokens, "values": values, "peak": peak, "role": "explain", "document": place // 3000,
            "position": place, "tenth": tenth,
        }  # fmt: skip

    def page(self, latent: int) -> LatentPage:
        if latent == DEAD_LATENT:
            return dead_page(latent)
        rng = self.rng(latent)
        _, words = self.theme(latent)
        places = [p for word in words for p in self.places.get(word, [])] or list(range(50, 2000))
        chosen = rng.sample(places, min(24, len(places)))
        top = [self.window(latent, p, 1 - 0.02 * i, None) for i, p in enumerate(chosen[:12])]
        spread = [self.window(latent, p, 0.9 - 0.07 * i, 9 - i * 10 // 12) for i, p in enumerate(chosen[12:])]
        if latent == HOSTILE_LATENT:
            top.insert(0, hostile_window())
        return {
            "id": latent,
            "explanations": self.explanations(latent),
            "frequency": self.frequency(latent),
            "max": self.maximum(latent),
            "mean": 0.31 * self.maximum(latent),
            "histogram": {
                "edges": [round(0.25 * 2 ** (0.5 * i), 4) for i in range(15)],
                "counts": [int(800 * math.exp(-((i - 5.5) ** 2) / 9)) for i in range(14)],
                "outside": 0,
            },
            "tokens": [
                {"token": f" {word}", "count": 400 // (i + 1), "mean": 0.6 * self.maximum(latent) / (i + 1)}
                for i, word in enumerate((*words, "of", "in"))
            ]
            + ([{"token": token, "count": 1, "mean": 0.5} for token in HOSTILE] if latent == HOSTILE_LATENT else []),
            "logits": {
                "positive": [{"token": f" {w}", "value": round(1.9 - 0.2 * i, 3)} for i, w in enumerate(words)],
                "negative": [
                    {"token": w, "value": -round(1.2 - 0.1 * i, 3)} for i, w in enumerate((" the", "\n", ",", "  "))
                ],
            },
            "top": top,
            "quantiles": spread,
        }

    def score(self, latent: int) -> float:
        return round(min(0.99, max(0.05, self.rng(latent).gauss(0.74, 0.14))), 3)

    def explanations(self, latent: int) -> list[Explanation]:
        if latent >= self.explained or latent == DEAD_LATENT:
            return []
        text = HOSTILE_TEXT if latent == HOSTILE_LATENT else self.theme(latent)[0]
        f1 = self.score(latent)
        found: list[Explanation] = [
            {
                "explainer": "ngram",
                "text": text,
                "error": None,
                "scores": [
                    {"scorer": "pattern", "figure": "f1", "value": f1, "low": f1 - 0.06, "high": min(1.0, f1 + 0.05)},
                    {"scorer": "pattern", "figure": "precision", "value": f1, "low": None, "high": None},
                    {"scorer": "pattern", "figure": "recall", "value": f1 - 0.03, "low": None, "high": None},
                ],
            }
        ]
        if latent % 5 == 0:
            found.append({"explainer": "llm", "text": None, "error": "the reply held no explanation", "scores": []})
        elif latent % 3 == 0:
            found.append(
                {"explainer": "tokens", "text": "the tokens “ return”, “ returns”", "error": None, "scores": []}
            )
        return found


def hostile_window() -> ShownWindow:
    return {
        "tokens": list(HOSTILE), "values": [float(i % 3) for i in range(len(HOSTILE))], "peak": 2, "role": "<b>",
        "document": 0, "position": 1, "tenth": None,
    }  # fmt: skip


def dead_page(latent: int) -> LatentPage:
    return {
        "id": latent, "explanations": [], "frequency": 0.0, "max": 0.0, "mean": 0.0, "histogram": None, "tokens": [],
        "logits": None, "top": [], "quantiles": [],
    }  # fmt: skip


def score_histogram(values: list[float]) -> Histogram:
    counts = [0] * 20
    for value in values:
        counts[min(19, int(value * 20))] += 1
    return {"edges": [i / 20 for i in range(21)], "counts": counts, "outside": 0}


def table_of(world: World) -> LatentTable:
    order = sorted(
        range(world.n_latents),
        key=lambda i: (i == DEAD_LATENT, i >= world.explained, -world.score(i) if i < world.explained else i),
    )
    texts = {i: next((e["text"] for e in world.explanations(i) if e["text"]), None) for i in order}
    return {
        "ids": order,
        "texts": [texts[i] for i in order],
        "scores": [None if texts[i] is None else world.score(i) for i in order],
        "frequencies": [world.frequency(i) for i in order],
        "maxima": [world.maximum(i) for i in order],
        "tokens": [
            [] if i == DEAD_LATENT
            else list(HOSTILE[:4]) if i == HOSTILE_LATENT
            else [f" {word}" for word in world.theme(i)[1]][:5]
            for i in order
        ],
        "chunks": [-1] * len(order),
        "explained": sum(text is not None for text in texts.values()),
        "score_name": "F1 (pattern)",
    }  # fmt: skip


def make_report_data(n_latents: int = 600, explained: int = 200, paged: int = 240, name: str = "demo") -> ReportData:
    """A whole run. Latent 7 is hostile, latent 11 never fires."""
    import numpy as np

    from unmix.viewer.data import frequency_histogram
    from unmix.viewer.glossary import metrics_of

    world = World(n_latents, explained)
    table = table_of(world)
    scores = [world.score(i) for i in range(world.explained)]
    chance = [min(0.99, max(0.0, random.Random(i).gauss(0.42, 0.12))) for i in range(world.explained)]
    distribution: ScoreDistribution = {
        "explainer": "ngram", "scorer": "pattern", "figure": "f1", "histogram": score_histogram(scores),
        "mean": round(sum(scores) / len(scores), 4), "baseline": score_histogram(chance)["counts"],
        "baseline_mean": round(sum(chance) / len(chance), 4),
    }  # fmt: skip
    mean = distribution["mean"] or 0.0
    row: SummaryRow = {
        "explainer": "ngram", "scorer": "pattern", "figure": "f1", "mean": mean, "low": mean - 0.02,
        "high": mean + 0.02, "done": len(scores), "asked": len(scores), "baseline": False,
    }  # fmt: skip
    summary: list[SummaryRow] = [
        row,
        {**row, "mean": 0.42, "low": 0.4, "high": 0.44, "baseline": True},
        {**row, "figure": "precision", "mean": 0.78, "low": 0.76, "high": 0.8},
        {**row, "explainer": "tokens", "mean": 0.66, "low": 0.64, "high": 0.68, "done": len(scores) - 9},
        {**row, "explainer": "llm", "scorer": "", "figure": "", "mean": None, "low": None, "high": None, "done": 0},
    ]
    return ReportData(
        run=run_info(n_latents, name),
        metrics=metrics_of(EVALUATION),
        frequency=frequency_histogram(EVALUATION, np.zeros(n_latents)),
        scores=[distribution, {**distribution, "explainer": "tokens", "baseline": None, "baseline_mean": None}],
        summary=summary,
        latents=table,
        page=world.page,
        paged=tuple(table["ids"][:paged]),
    )


class FakeReader:
    """Latents by the letters of each word: the same every time, no model."""

    def __init__(self, n_latents: int = 600) -> None:
        self.n_latents, self.texts = n_latents, list[str]()

    def read(self, text: str) -> list[PromptToken]:
        self.texts.append(text)
        found: list[PromptToken] = []
        for i, token in enumerate(re.findall(r" ?\w+|\n| ?[^\w\s]|\s", text)):
            rng = random.Random(token)
            latents = sorted({rng.randrange(self.n_latents): round(rng.uniform(0.5, 9), 3) for _ in range(12)}.items(),
                             key=lambda pair: -pair[1])  # fmt: skip
            found.append({"token": token, "latents": [] if i == 0 else latents})
        return found
