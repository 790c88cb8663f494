"""A delphi cache as a source of an index: contexts with their codes, a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmix.core.errors import ConfigError, FormatError
from unmix.core.seeds import derive
from unmix.index.batch import IndexBatch
from unmix.index.exchange.delphi_layout import EXTRA, LATENTS, open_hooks
from unmix.index.layout import IndexMeta
from unmix.index.sources.arrays import ArrayCodes
from unmix.index.store import TokenStore

BATCH = 64
ROLES = ("explain", "score")


class DelphiSource:
    """The contexts of a cache in order, each hook a coder.

    Nothing is held but where each row's entries start; the files are memory-mapped. delphi keeps neither documents
    nor roles: each row is a document and, by hash of its tokens, half of the rows show latents to explainers and
    half to scorers, unless the cache was written by `write_delphi`, which left beside it what the index knew.

    Args:
        tokens: token ids [rows, context], for caches without.
        document_token: the id that begins each document inside the rows (delphi's data are joined by the
            end-of-text token), so that documents are known.
        vocab: display string of every token id.

    Raises:
        FormatError: no cache, hooks over different texts, or no tokens anywhere.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokens: np.ndarray | None = None,
        document_token: int | None = None,
        vocab: Sequence[str] | None = None,
        batch: int = BATCH,
    ) -> None:
        self.folder, self.batch = Path(folder), batch
        self.hooks = open_hooks(self.folder)
        self._extra = _open_extra(self.folder)
        self.tokens: np.ndarray = self._find_tokens(tokens)
        self.n_contexts, self.context = self.tokens.shape
        self._document_token, self._vocab = document_token, vocab
        self._orders = {
            name: [split.order(self.n_contexts, self.context) for split in hook.splits]
            for name, hook in self.hooks.items()
        }

    def _find_tokens(self, given: np.ndarray | None) -> np.ndarray:
        stored = {name: hook.tokens for name, hook in self.hooks.items()}
        found = {name: tokens for name, tokens in stored.items() if tokens is not None}
        if self._extra is not None:
            found = {EXTRA: self._extra.tokens, **found}
        if given is not None:
            if found:
                raise ConfigError(f"{self.folder}: holds its own tokens; leave the other ones out")
            if given.ndim != 2 or given.dtype.kind not in "iu":
                raise ConfigError(f"tokens are {given.dtype} {list(given.shape)}, expected integers [rows, context]")
            return given
        if not found:
            raise FormatError(
                f"{self.folder}: an old cache without tokens, and locations alone say nothing of the text; give the "
                "token ids [rows, context] that it was made from (--tokens FILE.npy)"
            )
        first = next(iter(found))
        for name, tokens in found.items():
            if not np.array_equal(tokens, found[first]):
                raise FormatError(f"{self.folder}: {first!r} and {name!r} hold different tokens")
        return found[first]

    @property
    def latents(self) -> dict[str, int]:
        """Number of latents of each hook's coder."""
        return {name: hook.n_latents for name, hook in self.hooks.items()}

    @property
    def vocab(self) -> list[str] | None:
        """Display strings, where they were given or left by `write_delphi`."""
        if self._vocab is not None:
            return list(self._vocab)
        return None if self._extra is None else self._extra.vocab

    @property
    def vocab_size(self) -> int | None:
        """One more than the largest token id, where there is no vocabulary."""
        largest = max((int(self.tokens[i : i + 4096].max()) for i in range(0, self.n_contexts, 4096)), default=0)
        return max(largest + 1, len(self.vocab or ()))

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the roles."""
        return ROLES if self._extra is None else self._extra.roles

    @property
    def slices(self) -> dict[str, tuple[str, ...]]:
        """Slicings, where `write_delphi` left them."""
        return {} if self._extra is None else self._extra.meta.slices

    @property
    def meta(self) -> dict[str, Any]:
        """The hooks' configs, and the facts of the index that the cache was written from."""
        kept = {} if self._extra is None else self._extra.meta.meta
        return {**kept, "delphi": {name: hook.config for name, hook in self.hooks.items()}}

    def batches(self) -> Iterator[IndexBatch]:
        """Every context in order."""
        documents = 0
        for start in range(0, self.n_contexts, self.batch):
            stop = min(start + self.batch, self.n_contexts)
            tokens = np.asarray(self.tokens[start:stop]).astype(np.int64)
            codes = {name: self._codes(name, start, stop) for name in self.hooks}
            if self._extra is not None:
                store, contexts = self._extra, np.arange(start, stop)
                slices = {name: np.asarray(values[start:stop]) for name, values in store.slices.items()}
                yield IndexBatch(
                    tokens, np.asarray(store.role_of[start:stop]), np.asarray(store.documents[start:stop]),
                    store.mask(contexts), codes, slices,
                )  # fmt: skip
                continue
            numbers = self._documents(tokens, start, documents)
            documents = int(numbers[-1, -1])
            yield IndexBatch(tokens, _row_roles(tokens), numbers, np.ones(tokens.shape, bool), codes)

    def _documents(self, tokens: np.ndarray, start: int, before: int) -> np.ndarray:
        if self._document_token is None:
            rows = np.arange(start, start + len(tokens))
            return np.broadcast_to(rows[:, None], tokens.shape)
        return before + np.cumsum(tokens == self._document_token).reshape(tokens.shape)

    def _codes(self, name: str, start: int, stop: int) -> ArrayCodes:
        places: list[np.ndarray] = []
        latents: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for split, (offsets, order) in zip(self.hooks[name].splits, self._orders[name], strict=True):
            cut: Any = slice(int(offsets[start]), int(offsets[stop]))
            cut = cut if order is None else order[cut]
            where = split.locations[cut].astype(np.int64)
            places.append((where[:, 0] - start) * self.context + where[:, 1])
            latents.append(where[:, 2] + split.first)
            values.append(split.activations[cut].astype(np.float32))
        place = np.concatenate(places)
        by_place = np.argsort(place, kind="stable")
        counts = np.bincount(place, minlength=(stop - start) * self.context)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        n_latents = self.hooks[name].n_latents
        return ArrayCodes(np.concatenate(latents)[by_place], np.concatenate(values)[by_place], offsets, n_latents)


def _row_roles(tokens: np.ndarray) -> np.ndarray:
    """Role of each row, by hash of its tokens: equal rows never part."""
    digests = (hashlib.sha256(row.astype("<i8").tobytes()).hexdigest() for row in tokens)
    return np.array([derive(0, "role", digest) % len(ROLES) for digest in digests], np.uint8)


def _open_extra(folder: Path) -> TokenStore | None:
    """What `write_delphi` left beside the cache; None where it was not. `folder`: the cache's or one inside it."""
    for cache in (folder, folder.parent, folder.parent.parent):
        inside = folder.relative_to(cache).parts[:1] in ((), (LATENTS,))
        if inside and (cache / EXTRA / "index.json").is_file():
            return TokenStore(cache / EXTRA, IndexMeta.read(cache / EXTRA))
    return None
