"""Growing an attribution graph from the logits downwards, in bounded memory.

A prompt of 4,096 tokens has millions of active latents, and a matrix of all effects between them would be terabytes. So
rows are worked out for the latents that carry most of the outcome so far, a batch at a time, and of each row only the
effects that hold nearly all of its weight are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmix.core.errors import ConfigError, ModelError
from unmix.lm.graphs.graph import AttributionGraph, Edge, Node
from unmix.lm.graphs.replacement import EMBEDDINGS, MEMORY, LocalReplacement, Target
from unmix.lm.graphs.transcoders import Coders
from unmix.lm.points import split_name

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

KEPT = 0.999
"""Share of a row's absolute effects that is kept."""
SPAN = 4096
"""And at most so many of them."""


@dataclass
class Row:
    """A target's effects without the many small ones."""

    sources: Tensor
    weights: Tensor
    total: float
    """Sum of all absolute effects."""
    dropped: float
    """Share of it that was left out."""

    @staticmethod
    def of(dense: Tensor) -> Row:
        """The largest effects of a dense row."""
        sizes = dense.abs()
        total = float(sizes.double().sum())
        if total == 0:
            return Row(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 0.0, 0.0)
        best, order = sizes.topk(min(SPAN, len(sizes)))
        sums = best.double().cumsum(0)
        n = min(len(best), int(torch.searchsorted(sums, KEPT * total)) + 1)
        return Row(order[:n].clone(), dense[order[:n]].clone(), total, max(0.0, 1 - float(sums[n - 1]) / total))


@dataclass
class _Grown:
    """What has been worked out so far."""

    replacement: LocalReplacement
    logits: list[tuple[int, float, Target]]
    """(token id, probability, target)."""
    logit_rows: list[Row] = field(default_factory=lambda: [])
    rows: dict[int, Row] = field(default_factory=lambda: {})
    """By column of the latent."""

    def influence(self) -> Tensor:
        """[columns] float64: what reaches each node from the logits along the rows known so far."""
        found = torch.zeros(self.replacement.columns, dtype=torch.float64)
        for (_, probability, _), row in zip(self.logits, self.logit_rows, strict=True):
            _pour(found, row, probability)
        # A latent's causes lie in layers below its own, so going down every cause is complete before it is passed on.
        for column in sorted(self.rows, key=lambda c: -self.replacement.locate(c)[0].layer):
            _pour(found, self.rows[column], float(found[column]))
        return found


def attribution_graph(
    lm: LanguageModel,
    coders: Coders,
    prompt: str | Tensor,
    *,
    targets: Sequence[int | str] | None = None,
    against: int | str | None = None,
    max_logits: int = 10,
    logit_share: float = 0.95,
    max_latents: int = 1000,
    batch: int = 64,
    memory: int = MEMORY,
    progress: Callable[[int, float], None] | None = None,
) -> AttributionGraph:
    """Which latents, through which, made the model say what it says after `prompt` (Ameisen et al. 2025).

    `coders`: transcoders, one a layer or a cross-layer set; layers without one count as error nodes. `targets`: tokens
    (ids, or texts of one token) to explain; default the likeliest that hold `logit_share` of the probability, at most
    `max_logits`. `against`: explain logit differences to this token instead of to the mean. `max_latents`: latents
    whose own causes are worked out, most influential first; `unexpanded` of the result is what remains. `memory`:
    bytes for the stored pass (it sets how many targets go back at once). `progress(done, unexpanded)` is called after
    each batch.

    Give the model in float32: bfloat16 effects are off by a percent or so. Raises `ModelError` or `ConfigError` before
    any pass where the arguments do not fit.
    """
    if max_latents < 0 or max_logits < 1 or batch < 1 or not 0 < logit_share <= 1:
        raise ConfigError("max_latents must be at least 0, max_logits and batch at least 1, logit_share in (0, 1]")
    wanted = None if targets is None else [token_id(lm, t) for t in targets]
    base = None if against is None else torch.tensor([token_id(lm, against)])
    replacement = LocalReplacement(lm, coders, prompt, memory)
    grown = _Grown(replacement, _logits(replacement, wanted, base, max_logits, logit_share))
    grown.logit_rows = [Row.of(row) for row in replacement.rows([target for *_, target in grown.logits])]
    scale = sum(probability for _, probability, _ in grown.logits)
    waiting = torch.ones(replacement.n_latents, dtype=torch.bool)
    while True:
        influence = grown.influence()
        open_share = float(influence[: replacement.n_latents][waiting].sum()) / scale if replacement.n_latents else 0.0
        if progress is not None:
            progress(len(grown.rows), open_share)
        room = min(batch, max_latents - len(grown.rows))
        candidates = influence[: replacement.n_latents] * waiting
        best = candidates.topk(min(room, len(candidates))) if room > 0 and len(candidates) else None
        chosen = [] if best is None else best.indices[best.values > 0].tolist()
        if not chosen:
            return _finish(grown, influence, open_share, scale)
        for column, row in zip(chosen, _rows(replacement, chosen), strict=True):
            grown.rows[column] = row
        waiting[chosen] = False


def token_id(lm: LanguageModel, token: int | str) -> int:
    """A token id from an id or a text; `ModelError` where the text is not one token, or the id not the model's."""
    if isinstance(token, str):
        ids = lm.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            pieces = ", ".join(repr(s) for s in lm.token_strings(ids))
            raise ModelError(f"{token!r} is {len(ids)} tokens ({pieces}); give a text of one token, or its id")
        return int(ids[0])
    if not 0 <= token < lm.vocab_size:
        raise ModelError(f"token id {token}: {lm.name} has ids 0 to {lm.vocab_size - 1}")
    return token


def _rows(replacement: LocalReplacement, columns: Sequence[int]) -> list[Row]:
    """Rows of latents, cut as they come so that few are dense at a time."""
    found: list[Row] = []
    step = replacement.flow.batch
    for start in range(0, len(columns), step):
        dense = replacement.rows([replacement.latent_target(c) for c in columns[start : start + step]])
        found += [Row.of(row) for row in dense]
    return found


def _logits(
    replacement: LocalReplacement, wanted: list[int] | None, base: Tensor | None, most: int, share: float
) -> list[tuple[int, float, Target]]:
    lm = replacement.lm
    with torch.no_grad():
        stream = lm.run(replacement.tokens.unsqueeze(0), capture=[lm.last_hook], logits=False).activations[lm.last_hook]
        probabilities = lm.unembed(stream[0, -1]).float().softmax(-1)
    if wanted is None:
        best = probabilities.topk(min(most, len(probabilities)))
        n = int((best.values.cumsum(0) < share).sum()) + 1
        wanted = best.indices[:n].tolist()
    return [(t, float(probabilities[t]), replacement.logit_target(t, base)) for t in wanted]


def _pour(found: Tensor, row: Row, weight: float) -> None:
    if row.total > 0 and weight:
        found.index_add_(0, row.sources, row.weights.double().abs() * (weight / row.total))


def _finish(grown: _Grown, influence: Tensor, open_share: float, scale: float) -> AttributionGraph:
    """Nodes that have any part in it, and the effects between them."""
    replacement, lm = grown.replacement, grown.replacement.lm
    strings = display(replacement)
    share = (influence / scale).tolist() if scale else [0.0] * replacement.columns
    columns = sorted(grown.rows)
    first = replacement.n_latents
    columns += [c for c in range(first, replacement.columns) if share[c] > 0 or c >= replacement.starts[EMBEDDINGS]]
    nodes = [node_of(replacement, column, strings, share[column]) for column in columns]
    places = {column: i for i, column in enumerate(columns)}
    edges: list[Edge] = []
    for column, row in grown.rows.items():
        edges += _edges(row, places, places[column])
    for (token, probability, target), row in zip(grown.logits, grown.logit_rows, strict=True):
        text = lm.token_strings([token])[0] if lm.has_tokenizer else str(token)
        edges += _edges(row, places, len(nodes))
        nodes.append(
            Node(
                "logit",
                lm.n_layers,
                replacement.length - 1,
                token,
                token=text,
                activation=target.value,
                probability=probability,
            )
        )
    rows = [*grown.rows.values(), *grown.logit_rows]
    return AttributionGraph(
        "".join(strings), tuple(strings), lm.name, lm.n_layers, tuple(nodes), tuple(edges), open_share,
        max((row.dropped for row in rows), default=0.0),
    )  # fmt: skip


def node_of(
    replacement: LocalReplacement, column: int, strings: Sequence[str] | None = None, share: float = 0.0
) -> Node:
    """The node of a column; `strings` are the display strings of the prompt's tokens."""
    strings = display(replacement) if strings is None else strings
    if column < replacement.n_latents:
        transcoder, entry = replacement.locate(column)
        active = replacement.active[transcoder.name]
        position = int(active.positions[entry])
        return Node(
            "latent", transcoder.layer, position, int(active.latents[entry]), transcoder.name, strings[position],
            float(active.values[entry]), influence=share,
        )  # fmt: skip
    if column >= replacement.starts[EMBEDDINGS]:
        position = column - replacement.starts[EMBEDDINGS]
        return Node(
            "embedding", -1, position, int(replacement.tokens[position]), token=strings[position], influence=share
        )
    number, position = divmod(column - replacement.n_latents, replacement.length)
    layer = split_name(replacement.outputs[number])[1]
    return Node("error", layer, position, -1, token=strings[position], influence=share)


def display(replacement: LocalReplacement) -> list[str]:
    """The prompt's tokens as strings; ids where there is no tokenizer."""
    ids = replacement.tokens
    return replacement.lm.token_strings(ids) if replacement.lm.has_tokenizer else [str(int(t)) for t in ids]


def _edges(row: Row, places: dict[int, int], target: int) -> list[Edge]:
    return [
        Edge(places[source], target, weight)
        for source, weight in zip(row.sources.tolist(), row.weights.tolist(), strict=True)
        if source in places
    ]
