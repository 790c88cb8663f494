"""Sources and a tiny cut for tests of building: 6 shards of 4 contexts, 3 groups of 2."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import unmix.index.plan as plan_module
from index.oracle import ArrayCodes as DenseCodes
from index.oracle import make_stream
from unmix.index.batch import IndexBatch
from unmix.index.sources.arrays import ArrayCodes, ArraySource

SHARD_TOKENS, LEAST_TOKENS = 48, 96
SPEAKERS = ("user", "assistant", "tool")


def small_cut(patch: pytest.MonkeyPatch) -> None:
    """Shards of 48 tokens, segments of 96."""
    patch.setattr(plan_module, "SHARD_TOKENS", SHARD_TOKENS)
    patch.setattr(plan_module, "LEAST_TOKENS", LEAST_TOKENS)


def make_source(
    seed: int = 1, names: tuple[str, ...] = ("a", "layers.1/out"), batch: int = 3, n_contexts: int = 24
) -> ArraySource:
    """Random contexts with two coders and a slicing."""
    stream = make_stream(seed, n_contexts, names=names)
    codes: dict[str, ArrayCodes] = {}
    for name, dense in stream.codes.items():
        csr = DenseCodes.from_dense(dense.reshape(-1, dense.shape[-1]))
        codes[name] = ArrayCodes(csr.indices, csr.values, csr.offsets, csr.n_latents)
    rng = np.random.default_rng(seed)
    return ArraySource(
        stream.tokens, codes, role_numbers=stream.roles, documents=stream.documents, mask=stream.mask,
        slice_numbers={"speaker": rng.integers(0, 3, stream.tokens.shape).astype(np.uint8)},
        slice_values={"speaker": SPEAKERS}, vocab=[f"t{i}" for i in range(7)], meta={"model": "tiny"}, batch=batch,
    )  # fmt: skip


@dataclass(frozen=True)
class Watched(ArraySource):
    """Notes every range that it was asked for in a file, may be slow, and may fail at a context."""

    log: Path = Path("/nowhere")
    pause: float = 0.0
    fail_at: int | None = None
    deadly: bool = False
    """Kills its process in the middle of the first shard."""

    def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
        with self.log.open("a") as file:
            file.write(f"{first} ")
        for batch in super().batches(first, last):
            time.sleep(self.pause)
            if self.fail_at is not None and first <= self.fail_at < last:
                raise RuntimeError("the model fell over")
            yield batch
            if self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)


def watched(log: Path, pause: float = 0.0, fail_at: int | None = None, seed: int = 1, deadly: bool = False) -> Watched:
    plain = make_source(seed)
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    return Watched(**fields, log=log, pause=pause, fail_at=fail_at, deadly=deadly)


def opens(log: Path, **options: object) -> partial[Watched]:
    return partial(watched, log, **options)  # pyright: ignore[reportArgumentType]


def asked(log: Path) -> list[int]:
    """The first contexts of the ranges asked for since the last look."""
    found = [int(word) for word in log.read_text().split()] if log.is_file() else []
    log.unlink(missing_ok=True)
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def changed_codes(source: ArraySource, name: str) -> ArraySource:
    codes = dict(source.codes)
    old = codes[name]
    codes[name] = ArrayCodes(old.indices, old.values * 2, old.offsets, old.n_latents)
    return replace(source, codes=codes)
