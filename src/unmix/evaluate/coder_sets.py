"""`evaluate_set`: coders whose writes add up, measured as the one thing that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.coder_set import CoderSet
from unmix.coder.codes import Codes
from unmix.core.errors import ModelError
from unmix.data.config import Role
from unmix.evaluate.contexts import Batch, Contexts, as_contexts, choose
from unmix.evaluate.evaluation import Evaluation
from unmix.evaluate.local import LocalMetrics, coder_facts
from unmix.evaluate.settings import Options
from unmix.evaluate.splicing import Evaluator, Part
from unmix.lm.forward import Edit
from unmix.lm.model import LanguageModel
from unmix.lm.points import Hook
from unmix.lm.splice import Binding, make_bindings
from unmix.metrics.language import Language


def evaluate_set(
    coders: CoderSet,
    lm: LanguageModel,
    data: Contexts | Tensor,
    *,
    name: str = "set",
    tokens: int | None = None,
    role: Role = "evaluate",
    batch: int | None = None,
    ablations: Sequence[str] = ("zero", "mean"),
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Evaluation:
    """Measure coders whose writes add up (a cross-layer transcoder); arguments and errors as for `evaluate`.

    Local metrics are of the model's own activations: L0 of all coders together, errors of the sums over every hook that
    is written, side by side. In the spliced model all those hooks hold the sums at once, and each coder reads what the
    hooks before it left; ablations replace them all at once too.
    """
    first = next(iter(coders.values()))
    source = as_contexts(data, first.config.input_policy)
    options = Options(role, tuple(dict.fromkeys(ablations)), batch, seed, resamples, level)
    own = [make_bindings(lm, {key: coder})[0] for key, coder in coders.items()]
    reads = {hook.name: hook for binding in own for hook in binding.reads}
    writes = {hook.name: hook for binding in own for hook in binding.writes}
    widths = tuple(lm.width(hook) for hook in writes)
    whole = Binding(name, first, tuple(reads.values()), tuple(writes.values()), widths)
    work = _SetEvaluator(lm, name, coders, own, whole, source, choose(source, role, tokens), options)
    return work.results(None)[name]


class _SetEvaluator(Evaluator):
    """Two passes, of one thing that reads and writes several hooks."""

    def __init__(
        self,
        lm: LanguageModel,
        name: str,
        coders: CoderSet,
        own: Sequence[Binding],
        whole: Binding,
        source: Contexts,
        ids: np.ndarray,
        options: Options,
    ) -> None:
        self.set, self.own = coders, list(own)
        super().__init__(lm, {name: next(iter(coders.values()))}, {name: whole}, source, ids, options)

    def _part(self, name: str, means: Mapping[str, Tensor]) -> Part:
        binding = self.bindings[name]
        centre = torch.cat([means[hook.name] for hook in binding.writes])
        return Part(
            binding, _SetMetrics(self.set, self.own, binding, self.lm, centre), Language(self.options.ablations)
        )

    def _changed(self, binding: Binding) -> list[str]:
        return [hook.name for hook in (*binding.reads, *binding.writes)]

    def _run_spliced(
        self, batch: Batch, part: Part, values: Sequence[Tensor], skip: Mapping[str, Tensor] | None
    ) -> Any:
        edits = _Live(self.set, self.own, batch).edits(part.binding)
        return self.passes.run(batch, edits, skip=skip)[0]

    def _result(self, name: str, part: Part, cached: LocalMetrics | None) -> Evaluation:
        found = super()._result(name, part, cached)
        facts = {"name": name, "coders": [coder_facts(coder) for coder in self.set.values()]}
        spliced = "every coder reads what the hooks before it left, and all written hooks hold the sums"
        return replace(found, settings={**found.settings, "coder": facts, "spliced": spliced})


class _SetMetrics(LocalMetrics):
    """Reconstruction of the sums at every written hook, side by side, and sparsity of all latents together."""

    def __init__(
        self, coders: CoderSet, own: Sequence[Binding], whole: Binding, lm: LanguageModel, centre: Tensor
    ) -> None:
        super().__init__(next(iter(coders.values())), centre)
        self.set, self.own, self.whole = coders, own, whole
        self.widths = [lm.width(hook.name) for hook in whole.reads]
        self.sparsity = type(self.sparsity)(sum(coder.n_latents for coder in coders.values()))

    @torch.no_grad()
    def update(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], contexts: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows d_out"]:
        """Add a batch; `x` and `target` are the hooks of the set side by side."""
        parts = x.split(self.widths, dim=-1)
        inputs = {hook.name: part for hook, part in zip(self.whole.reads, parts, strict=True)}
        total: dict[str, Tensor] = {}
        codes = [_write(binding, inputs, total, contexts) for binding in self.own]
        reconstruction = torch.cat([total[hook.name] for hook in self.whole.writes], dim=-1)
        self.reconstruction.update(target, reconstruction, contexts)
        self.sparsity.update(side_by_side(codes), contexts)
        return reconstruction


class _Live:
    """One spliced pass: what the hooks held so far, and what was written to those to come."""

    def __init__(self, coders: CoderSet, own: Sequence[Binding], batch: Batch) -> None:
        self.waiting, self.batch = list(own), batch
        self.contexts = batch.context_of(batch.mask)
        self.inputs: dict[str, Tensor] = {}
        self.total: dict[str, Tensor] = {}

    def edits(self, whole: Binding) -> dict[str, Edit]:
        """By hook: look at it where a coder reads it, replace it where one writes it."""
        written = {hook.name for hook in whole.writes}
        hooks = {hook.name: hook for hook in (*whole.reads, *whole.writes)}
        read = {hook.name for hook in whole.reads}
        return {name: self._edit(hook, name in read, name in written) for name, hook in hooks.items()}

    def _edit(self, hook: Hook, read: bool, written: bool) -> Edit:
        def edit(x: Tensor) -> Tensor:
            where = self.batch.mask.to(x.device)
            if written:
                late = [b.name for b in self.waiting if hook.name in {own.name for own in b.writes}]
                if late:
                    raise ModelError(
                        f"coder {late[0]!r} writes {hook.name} before the model has reached all that it reads; one "
                        "forward pass cannot splice it"
                    )
                x = x.clone()
                x[where] = self.total[hook.name].to(x.dtype)
            if read:
                self.inputs[hook.name] = x[where].float()
                self._advance()
            return x

        return edit

    def _advance(self) -> None:
        """Run the coders that have all they read."""
        ready = [b for b in self.waiting if all(hook.name in self.inputs for hook in b.reads)]
        for binding in ready:
            _write(binding, self.inputs, self.total, self.contexts)
            self.waiting.remove(binding)


def _write(binding: Binding, inputs: Mapping[str, Tensor], total: dict[str, Tensor], contexts: Tensor) -> Codes:
    """Run one coder and add what it writes to `total`."""
    coder: Any = binding.coder
    x = torch.cat([inputs[hook.name] for hook in binding.reads], dim=-1).to(coder.device)
    codes: Codes = coder.encode(x, contexts.to(coder.device) if coder.encoder.sequential else None)
    for hook, part in zip(binding.writes, coder.decode(codes).split(binding.widths, dim=-1), strict=True):
        total[hook.name] = total[hook.name] + part if hook.name in total else part
    return codes


def side_by_side(codes: Sequence[Codes]) -> Codes:
    """Codes of the same rows over the latents of all coders, one coder's after the other's."""
    starts = np.cumsum([0, *[one.n_latents for one in codes]]).tolist()
    rows = torch.cat([one.token_rows() for one in codes])
    order = rows.argsort(stable=True)
    indices = torch.cat([one.indices + start for one, start in zip(codes, starts, strict=False)])[order]
    offsets = torch.stack([one.offsets for one in codes]).sum(0)
    return Codes(indices, torch.cat([one.values for one in codes])[order], offsets, starts[-1], codes[0].leading)
