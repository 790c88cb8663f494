"""`evaluate`: local metrics and the cost of the splice, in two passes over the same contexts.

The first pass takes the mean activation at every hook that is written; the second runs the model as it is, with
each coder's reconstruction (its error dropped), and with the activations ablated to zero and to that mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from unmix.coder.coder_set import CoderSet
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, DataError, NonFiniteError
from unmix.core.progress import task
from unmix.data.config import Role
from unmix.evaluate.contexts import Batch, Contexts, as_contexts, choose, read_batch
from unmix.evaluate.evaluation import Evaluation
from unmix.evaluate.local import LocalMetrics, Rows, local_metrics
from unmix.evaluate.passes import Passes
from unmix.evaluate.settings import Options, Scope, settings_of
from unmix.lm.forward import put
from unmix.lm.model import LanguageModel
from unmix.lm.splice import Binding, make_bindings
from unmix.lm.start import find_start
from unmix.metrics.intervals import Estimate
from unmix.metrics.language import Language, TokenLosses, predictions, token_losses


@overload
def evaluate(  # pyright: ignore[reportOverlappingOverload] (a set is a mapping too, and comes first)
    coders: SparseCoder | CoderSet,
    lm: LanguageModel,
    data: Contexts | Tensor,
    *,
    tokens: int | None = None,
    role: Role = "evaluate",
    batch: int | None = None,
    ablations: Sequence[str] = ("zero", "mean"),
    activations: Iterable[Rows] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Evaluation: ...


@overload
def evaluate(
    coders: Mapping[str, SparseCoder],
    lm: LanguageModel,
    data: Contexts | Tensor,
    *,
    tokens: int | None = None,
    role: Role = "evaluate",
    batch: int | None = None,
    ablations: Sequence[str] = ("zero", "mean"),
    activations: Iterable[Rows] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Evaluation]: ...


def evaluate(
    coders: SparseCoder | Mapping[str, SparseCoder],
    lm: LanguageModel,
    data: Contexts | Tensor,
    *,
    tokens: int | None = None,
    role: Role = "evaluate",
    batch: int | None = None,
    ablations: Sequence[str] = ("zero", "mean"),
    activations: Iterable[Rows] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Evaluation | dict[str, Evaluation]:
    """Measure a coder (or several, each spliced alone; a `CoderSet` as the one thing it is) on a language model.

    `data`: token shards, of which the first contexts of `role` that hold `tokens` tokens are read (all by
    default), or token ids [contexts, positions] under the coder's own input policy. `batch` contexts go through
    the model at a time (default: about 2048 tokens); it does not change results beyond rounding.
    `activations` (one coder only): rows for the local metrics, say from a cache, instead of those captured here.

    Masked positions are read by nobody, replaced by nothing, and predict nothing: `l0`, `fvu` and their kind are
    over unmasked positions; cross-entropies over predictions made *from* unmasked positions (whatever comes next,
    the start of another document included), the original model's as well. `seed`, `resamples` and `level` are of
    the bootstrap intervals. The forward pass costs 2 + len(ablations) of the model's a coder, shared where
    coders write one hook; all but two begin behind the blocks below the first hook that is written.

    Raises `ModelError` (a coder that does not fit the model), `DataError` (no contexts), `ConfigError`,
    `NonFiniteError` (naming hook or logits, and context).
    """
    if isinstance(coders, CoderSet):
        from unmix.evaluate.coder_sets import evaluate_set

        if activations is not None:
            raise ConfigError("evaluate: activations are of one coder's hook; of a set the model's own are taken")
        return evaluate_set(
            coders, lm, data, tokens=tokens, role=role, batch=batch, ablations=ablations, seed=seed,
            resamples=resamples, level=level,
        )  # fmt: skip
    single = isinstance(coders, SparseCoder)
    named = {coders.name: coders} if isinstance(coders, SparseCoder) else dict(coders)
    if not named:
        raise ConfigError("evaluate: no coder given")
    if activations is not None and len(named) > 1:
        raise ConfigError("evaluate: activations are of one coder's hook; evaluate several coders one at a time")
    source = as_contexts(data, next(iter(named.values())).config.input_policy)
    options = Options(role, tuple(dict.fromkeys(ablations)), batch, seed, resamples, level)
    bindings = {name: make_bindings(lm, {name: coder})[0] for name, coder in named.items()}
    ids = choose(source, role, tokens)
    work = Evaluator(lm, named, bindings, source, ids, options)
    cached = None if activations is None else local_metrics(next(iter(named.values())), activations)
    results = work.results(cached)
    return next(iter(results.values())) if single else results


@dataclass
class Part:
    """What is gathered for one coder."""

    binding: Binding
    local: LocalMetrics
    language: Language


class Evaluator:
    """Two passes over the contexts `ids`."""

    def __init__(
        self,
        lm: LanguageModel,
        coders: Mapping[str, SparseCoder],
        bindings: Mapping[str, Binding],
        source: Contexts,
        ids: np.ndarray,
        options: Options,
    ) -> None:
        self.lm, self.coders, self.bindings = lm, coders, bindings
        self.source, self.ids, self.options = source, ids, options
        self.writes = {hook.name: hook for binding in bindings.values() for hook in binding.writes}
        reads = [hook.name for binding in bindings.values() for hook in binding.reads]
        self.hooks = list(dict.fromkeys([*reads, *self.writes]))
        self.passes = Passes.over(lm, list(self.writes))
        # Below the first write nothing changes, so every pass but the first begins there, on the stream of the first.
        self.starts = {name: find_start(lm, self._changed(binding)) for name, binding in bindings.items()}
        self.step = options.batch or max(1, 2048 // source.context)
        self.counted = self.predicted = 0

    def results(self, cached: LocalMetrics | None) -> dict[str, Evaluation]:
        """Both passes, then the metrics of every coder."""
        total = 2 * len(self.ids) * self.source.context
        with task("evaluate", total) as progress, torch.no_grad():
            means = self._means(progress)
            parts = {name: self._part(name, means) for name in self.coders}
            for batch in self._batches():
                self._measure(batch, parts, means)
                progress.advance(batch.tokens.numel())
        return {name: self._result(name, part, cached) for name, part in parts.items()}

    def _batches(self) -> Iterator[Batch]:
        for start in range(0, len(self.ids), self.step):
            yield read_batch(self.source, self.ids[start : start + self.step])

    def _means(self, progress: Any) -> dict[str, Tensor]:
        """float64 mean at each written hook over unmasked positions; `DataError` where every one is masked."""
        sums = {name: torch.zeros(self.lm.width(name), dtype=torch.float64) for name in self.writes}
        for batch in self._batches():
            found = self.lm.capture(batch.tokens, list(self.writes), documents=batch.documents)
            for name, activation in found.items():
                rows = activation[batch.mask.to(activation.device)]
                _require_finite_rows(rows, name, batch)
                sums[name] += rows.cpu().double().sum(0)
            self.counted += int(batch.mask.sum())
            self.predicted += int(predictions(batch.mask).sum())
            progress.advance(batch.tokens.numel())
        if self.predicted == 0:
            raise DataError(f"the mask leaves nothing to predict from in {len(self.ids)} contexts")
        return {name: total / self.counted for name, total in sums.items()}

    def _part(self, name: str, means: Mapping[str, Tensor]) -> Part:
        binding = self.bindings[name]
        centre = torch.cat([means[hook.name] for hook in binding.writes])
        return Part(binding, LocalMetrics(self.coders[name], centre), Language(self.options.ablations))

    def _measure(self, batch: Batch, parts: Mapping[str, Part], means: Mapping[str, Tensor]) -> None:
        streams = [start.hook for start in self.starts.values() if start is not None]
        original, found = self.passes.run(batch, capture=[*self.hooks, *streams])
        kept = {name: activation[batch.mask.to(activation.device)] for name, activation in found.items()
                if name in self.hooks}  # fmt: skip
        others: dict[str, Any] = {}
        for name, part in parts.items():
            start = self.starts[name]
            skip = None if start is None else start.skip(found[start.hook])
            values = self._reconstruct(part, kept, batch)
            others[f"spliced {name}"] = self._run_spliced(batch, part, values, skip)
            for ablation in self.options.ablations:
                key = _ablated(ablation, part.binding)
                if key not in others:
                    constant = [_constant(ablation, means[hook.name], self.lm) for hook in part.binding.writes]
                    others[key] = self._run_with(batch, part.binding, constant, skip)
        losses = token_losses(batch.tokens, batch.mask, original, others)
        contexts = batch.context_of(predictions(batch.mask))
        for name, part in parts.items():
            ablated: dict[str, TokenLosses] = {
                ablation: losses[_ablated(ablation, part.binding)] for ablation in self.options.ablations
            }
            part.language.update(losses["original"], losses[f"spliced {name}"], ablated, contexts)

    def _reconstruct(self, part: Part, kept: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
        """The reconstruction at unmasked positions, cut by write hook; local metrics are updated on the way."""
        x = torch.cat([kept[hook.name] for hook in part.binding.reads], dim=-1)
        target = torch.cat([kept[hook.name] for hook in part.binding.writes], dim=-1)
        output = part.local.update(x, target, batch.context_of(batch.mask))
        return list(output.split(part.binding.widths, dim=-1))

    def _changed(self, binding: Binding) -> list[str]:
        """Hooks at which a spliced pass first differs from the model as it is, or is looked at."""
        return [hook.name for hook in binding.writes]

    def _run_spliced(
        self, batch: Batch, part: Part, values: Sequence[Tensor], skip: Mapping[str, Tensor] | None
    ) -> Any:
        """With `values`, the reconstruction of what the model as it is gave."""
        return self._run_with(batch, part.binding, values, skip)

    def _run_with(
        self, batch: Batch, binding: Binding, values: Sequence[Tensor], skip: Mapping[str, Tensor] | None
    ) -> Any:
        edits = {hook.name: put(value, batch.mask) for hook, value in zip(binding.writes, values)}
        return self.passes.run(batch, edits, skip=skip)[0]

    def _result(self, name: str, part: Part, cached: LocalMetrics | None) -> Evaluation:
        options = self.options
        local = part.local if cached is None else cached
        metrics: dict[str, Estimate] = {
            **local.intervals(options.seed, options.resamples, options.level),
            **part.language.intervals(seed=options.seed, resamples=options.resamples, level=options.level),
        }
        scope = Scope(len(self.ids), len(self.ids) * self.source.context, self.counted, self.predicted)
        settings = settings_of(self.lm, self.coders[name], part.binding, self.source, options, scope)
        if cached is not None:
            settings["local_metrics"] = {
                "tokens_counted": cached.sparsity.n_tokens,
                "source": "activations given by the caller; every row counts",
            }
        return Evaluation(metrics, local.sparsity.histogram(), settings)


def _ablated(ablation: str, binding: Binding) -> str:
    """One ablated pass serves every coder that writes the same hooks."""
    return f"{ablation}-ablated {' + '.join(hook.name for hook in binding.writes)}"


def _constant(ablation: str, mean: Tensor, lm: LanguageModel) -> Tensor:
    value = torch.zeros_like(mean) if ablation == "zero" else mean
    return value.to(device=lm.device, dtype=torch.float32)


def _require_finite_rows(rows: Tensor, hook: str, batch: Batch) -> None:
    if bool(torch.isfinite(rows).all()):
        return
    bad = (~torch.isfinite(rows)).any(-1).nonzero().squeeze(-1)
    places = batch.mask.nonzero()[bad[0].cpu()]
    raise NonFiniteError(
        f"evaluate: the model's activations at {hook} are not finite at {len(bad)} positions, first in context "
        f"{int(batch.contexts[places[0]])}, position {int(places[1])}"
    )
