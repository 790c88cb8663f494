"""Forward passes of an evaluation: the model as it is, and with activations replaced at the positions that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmix.core.errors import ModelError
from unmix.evaluate.contexts import Batch
from unmix.lm.forward import Edit
from unmix.lm.model import LanguageModel
from unmix.metrics.language import Rows, logits_rows


@dataclass(frozen=True)
class Passes:
    """Runs batches through one language model.

    Where every write is inside a block, a pass ends after the last one and logits are formed from its stream for
    a few positions at a time. Otherwise (a coder on the head's input) the model's whole logits are held.
    """

    lm: LanguageModel
    by_stream: bool

    @classmethod
    def over(cls, lm: LanguageModel, writes: Sequence[str]) -> Passes:
        """Passes for coders that write at these canonical hooks."""
        return cls(lm, lm.ends_in_stream(writes))

    @torch.no_grad()
    def run(
        self,
        batch: Batch,
        edits: Mapping[str, Edit] | None = None,
        capture: Sequence[str] = (),
        skip: Mapping[str, Tensor] | None = None,
    ) -> tuple[Rows, dict[str, Tensor]]:
        """The logits' rows, and the activations [batch, pos, d] at `capture`. `ModelError` where it has no logits.

        `skip`: blocks left out, and what they gave (`Start.skip`).
        """
        last = [self.lm.last_hook] if self.by_stream else []
        found = self.lm.run(
            batch.tokens,
            edits,
            list(dict.fromkeys([*capture, *last])),
            documents=batch.documents,
            logits=not self.by_stream,
            skip=skip,
        )
        if self.by_stream:
            return self._unembedded(found.activations[last[0]]), found.activations
        if found.logits is None:
            raise ModelError(f"{self.lm.name} returned no logits")
        return logits_rows(found.logits), found.activations

    def _unembedded(self, stream: Tensor) -> Rows:
        @torch.no_grad()
        def rows(batch: Tensor, position: Tensor) -> Tensor:
            return self.lm.unembed(stream[batch.to(stream.device), position.to(stream.device)])

        return rows
