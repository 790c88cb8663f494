"""Token shards through a language model and coders, as they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.config import semantic_hash
from unmix.core.errors import ConfigError
from unmix.data.config import ROLES
from unmix.data.shards import TokenShards
from unmix.index.batch import IndexBatch
from unmix.index.sources.arrays import ArrayCodes
from unmix.index.sources.fitting import fit_coders
from unmix.index.sources.slicing import Slicings
from unmix.lm.model import LanguageModel

BATCH = 16
UNSAID = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"})
"""Fields of a model's config that do not change what it computes (the dtype is said beside it)."""


class LiveSource:
    """One pass of the model to the last hook that a coder reads, then every coder.

    Batches are cut at multiples of `batch` whatever range is asked for, since what a product gives depends, in its
    last bits, on how many rows it has.
    """

    roles: tuple[str, ...] = ROLES

    def __init__(
        self,
        lm: LanguageModel,
        shards: TokenShards,
        coders: Mapping[str, SparseCoder],
        *,
        batch: int = BATCH,
        speakers: tuple[str, ...] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """`ModelError` where a coder does not fit the model; `speakers`: count only what these say in chats."""
        if batch < 1:
            raise ConfigError(f"batch is {batch}, expected at least 1")
        self.lm, self.shards, self.batch = lm, shards, batch
        self.coders = {name: coder.to(lm.device).eval() for name, coder in coders.items()}
        self.reads = fit_coders(lm, self.coders)
        self.slicings = Slicings.of(shards, speakers)
        self.speakers, self.more = speakers, dict(meta or {})
        self._inputs = self._decides()

    @property
    def latents(self) -> dict[str, int]:
        """Number of latents of each coder."""
        return {name: coder.n_latents for name, coder in self.coders.items()}

    @property
    def context(self) -> int:
        """Tokens in a context."""
        return self.shards.context

    @property
    def n_contexts(self) -> int:
        """All contexts of the shards."""
        return self.shards.n_contexts

    @property
    def vocab(self) -> list[str] | None:
        """Display strings of the tokenizer's ids."""
        return self._vocab

    @cached_property
    def _vocab(self) -> list[str] | None:
        return self.lm.token_strings(range(self.lm.vocab_size)) if self.lm.has_tokenizer else None

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding."""
        return self.lm.vocab_size

    @property
    def slices(self) -> dict[str, tuple[str, ...]]:
        """`speaker` and `label`, where the tokens have them."""
        return self.slicings.values

    @property
    def meta(self) -> dict[str, Any]:
        """What model, coders and text this is."""
        return {
            "coder_hash": self.inputs["coders"],
            "tokens_hash": self.shards.hash,
            "model": self.lm.fingerprint.model_dump(mode="json"),
            "hook": {name: hooks[0] for name, hooks in self.reads.items()},
            "hooks": {name: list(hooks) for name, hooks in self.reads.items()},
            "source": self.shards.source_report.get("name", self.shards.config.source),
            **self.more,
        }

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the bytes."""
        return self._inputs

    def _decides(self) -> dict[str, Any]:
        return {
            "model": self._model(),
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "device": self.lm.device.type,
            "coders": {name: coder.hash() for name, coder in self.coders.items()},
            "hooks": {name: list(hooks) for name, hooks in self.reads.items()},
            "tokens": self.shards.hash,
            "policy": self.shards.policy.model_dump(mode="json"),
            "batch": self.batch,
            "speakers": None if self.slicings.counted is None else list(self.slicings.counted),
        }

    def _model(self) -> dict[str, Any]:
        """The weights by hash, by name where they have none, and what the model's config says of the computation."""
        facts = self.lm.fingerprint.model_dump(mode="json")
        if facts["weights_hash"] is not None:
            del facts["name"]
        if self.lm.is_transformers:
            config: Any = self.lm.model.config
            said = {name: value for name, value in config.to_dict().items() if name not in UNSAID}
            facts["config"] = semantic_hash(json.loads(json.dumps(said, default=str, sort_keys=True)))
        return facts

    def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
        """Contexts [first, last), encoded."""
        for start in range(first - first % self.batch, last, self.batch):
            ids = np.arange(start, min(start + self.batch, self.n_contexts))
            yield batch_of(self.slicings, ids, self.encode(ids), (max(first - start, 0), min(last - start, len(ids))))

    @torch.no_grad()
    def encode(self, ids: np.ndarray) -> dict[str, Codes]:
        """Codes of every coder over some contexts."""
        captured = self.activations(ids)
        return {name: coder.encode(read(captured, self.reads[name])) for name, coder in self.coders.items()}

    def activations(self, ids: np.ndarray) -> dict[str, Tensor]:
        """[n, context, d] by canonical hook: one pass that ends at the last of them."""
        hooks = list(dict.fromkeys(hook for reads in self.reads.values() for hook in reads))
        policy = self.shards.policy
        documents = None if policy.attend_across else torch.from_numpy(self.shards.documents(ids).astype(np.int64))
        tokens = torch.from_numpy(self.shards.tokens(ids).astype(np.int64))
        return self.lm.capture(tokens, hooks, policy, documents=documents)


def read(activations: Mapping[str, Tensor], hooks: tuple[str, ...]) -> Tensor:
    """A coder's input [*leading, d_in]: its hooks side by side, in float32."""
    return torch.cat([activations[hook].float() for hook in hooks], dim=-1)


def batch_of(slicings: Slicings, ids: np.ndarray, codes: Mapping[str, Codes], cut: tuple[int, int]) -> IndexBatch:
    """Contexts `cut` (first, behind the last) of an encoded batch over the contexts `ids`."""
    shards, kept = slicings.shards, ids[cut[0] : cut[1]]
    rows = (cut[0] * shards.context, cut[1] * shards.context)
    return IndexBatch(
        tokens=shards.tokens(kept),
        roles=shards.roles[kept],
        documents=shards.documents(kept),
        mask=slicings.mask(kept),
        codes={name: plain_codes(own).rows(*rows) for name, own in codes.items()},
        slices=slicings.numbers(kept),
    )


def plain_codes(codes: Codes) -> ArrayCodes:
    """Codes as arrays on the host."""
    return ArrayCodes(
        codes.indices.cpu().numpy(), codes.values.float().cpu().numpy(), codes.offsets.cpu().numpy(), codes.n_latents
    )
