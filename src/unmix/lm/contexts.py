"""Contexts that go through a model: packed shards, or a tensor of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmix.core.errors import DataError
from unmix.core.policy import InputPolicy
from unmix.data.config import Role
from unmix.lm.tokens import policy_mask


class Contexts(Protocol):
    """What is asked of packed tokens: `TokenShards` is one."""

    @property
    def context(self) -> int:
        """Tokens in a context."""
        ...

    @property
    def policy(self) -> InputPolicy:
        """How they were fed and which positions count."""
        ...

    @property
    def hash(self) -> str:
        """Of text, tokenizer and config."""
        ...

    def contexts_of(self, role: Role) -> np.ndarray:
        """Ids of a role's contexts."""
        ...

    def tokens(self, ids: Any) -> np.ndarray:
        """[n, context] token ids."""
        ...

    def documents(self, ids: Any) -> np.ndarray:
        """[n, context] document ids."""
        ...

    def mask(self, ids: Any) -> np.ndarray:
        """[n, context] True where a position counts."""
        ...


@dataclass(frozen=True)
class TokenTensor:
    """Token ids [n, context] in memory, one document a row, all of every role."""

    ids: Int[Tensor, "n context"]
    policy: InputPolicy

    @property
    def context(self) -> int:
        """Tokens in a context."""
        return self.ids.shape[1]

    @property
    def hash(self) -> str:
        """No hash: the tokens were given by hand."""
        return "tensor"

    def contexts_of(self, role: Role) -> np.ndarray:
        """Every row."""
        return np.arange(len(self.ids))

    def tokens(self, ids: Any) -> np.ndarray:
        """[n, context] token ids."""
        return self.ids[torch.as_tensor(ids)].cpu().numpy()

    def documents(self, ids: Any) -> np.ndarray:
        """Each row is a document."""
        return np.repeat(np.asarray(ids)[:, None], self.context, axis=1)

    def mask(self, ids: Any) -> np.ndarray:
        """By the policy."""
        return policy_mask(self.ids[torch.as_tensor(ids)], self.policy).cpu().numpy()


@dataclass(frozen=True)
class Batch:
    """Some contexts, as tensors on the CPU."""

    contexts: Int[Tensor, " batch"]
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    documents: Int[Tensor, "batch pos"] | None
    """Where tokens attend only inside their own document; else None."""

    def context_of(self, where: Bool[Tensor, "batch pos"]) -> Int[Tensor, " n"]:
        """The context id of every true position, in order."""
        return self.contexts[where.nonzero(as_tuple=True)[0]]


def as_contexts(data: Contexts | Tensor, policy: InputPolicy) -> Contexts:
    """`data` itself, or a tensor of token ids under `policy` (the coder's own). `DataError` for other shapes."""
    if not isinstance(data, Tensor):
        return data
    if data.ndim != 2 or data.is_floating_point() or data.shape[1] < 2:
        raise DataError(f"token ids must be whole numbers [contexts, positions >= 2], found {list(data.shape)}")
    return TokenTensor(data.long(), policy)


def read_batch(data: Contexts, ids: np.ndarray) -> Batch:
    """The contexts `ids`."""
    documents = None if data.policy.attend_across else torch.from_numpy(data.documents(ids).astype(np.int64))
    return Batch(
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(data.tokens(ids).astype(np.int64)),
        torch.from_numpy(np.ascontiguousarray(data.mask(ids))),
        documents,
    )
