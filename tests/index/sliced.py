"""A random stream whose positions are also cut into slicings, and what a filter must keep of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from index.oracle import ArrayCodes, Stream, make_stream
from unmix.data.config import ROLES
from unmix.index.reader import LatentIndex, open_index
from unmix.index.writer import IndexWriter

SLICINGS = {"speaker": ("user", "assistant", "tool"), "label": ("news", "code")}


@dataclass(frozen=True)
class Sliced:
    """`stream` with slice numbers [n_contexts, context] of every slicing."""

    stream: Stream
    slices: dict[str, np.ndarray]

    def keeps(
        self, role: object = None, where: dict[str, object] | None = None, documents: object = None
    ) -> np.ndarray:
        """Which positions a filter keeps, one by one."""
        stream = self.stream
        keep = np.ones(stream.tokens.shape, bool)
        if role is not None:
            names = [role] if isinstance(role, str) else list(role)  # pyright: ignore
            keep &= np.array([ROLES[r] in names for r in stream.roles])[:, None]
        for name, wanted in (where or {}).items():
            values = [wanted] if isinstance(wanted, str) else list(wanted)  # pyright: ignore
            keep &= np.vectorize(lambda i, name=name, values=values: SLICINGS[name][i] in values)(self.slices[name])
        if documents is not None:
            keep &= np.isin(stream.documents, documents)  # pyright: ignore
        return keep.reshape(-1)


def make_sliced(seed: int, **options: object) -> Sliced:
    """Slices in runs, as turns of a conversation are."""
    stream = make_stream(seed, **options)  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng(seed + 1)
    slices = {
        name: np.repeat(rng.integers(0, len(values), stream.tokens.size), rng.integers(1, 6, stream.tokens.size))[
            : stream.tokens.size
        ].reshape(stream.tokens.shape)
        for name, values in SLICINGS.items()
    }
    return Sliced(stream, slices)


sliced_streams = st.builds(
    make_sliced,
    seed=st.integers(0, 2**32 - 1),
    n_contexts=st.integers(1, 16),
    context=st.integers(1, 40),
    n_latents=st.integers(2, 4),
    vocab=st.integers(1, 30),
    density=st.sampled_from([0.02, 0.2, 1.0]),
)
filters = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["train", "explain", ("explain", "score")]),
        "where": st.sampled_from(
            [
                {"speaker": "assistant"}, {"speaker": ("user", "tool")}, {"label": "code"},
                {"speaker": "user", "label": ("news", "code")},
            ]
        ),
    },
)  # fmt: skip


def write_sliced(folder: Path, sliced: Sliced, batch: int = 5, **options: object) -> LatentIndex:
    """Index it in batches of `batch` contexts."""
    stream = sliced.stream
    latents = {name: dense.shape[-1] for name, dense in stream.codes.items()}
    with IndexWriter(folder, latents, stream.context, slices=SLICINGS, **options) as writer:  # pyright: ignore
        for i in range(0, len(stream.tokens), batch):
            part = slice(i, i + batch)
            codes = {n: ArrayCodes.from_dense(d[part].reshape(-1, d.shape[-1])) for n, d in stream.codes.items()}
            writer.add(
                stream.tokens[part], stream.roles[part], stream.documents[part], stream.mask[part], codes,
                {name: numbers[part] for name, numbers in sliced.slices.items()},
            )  # fmt: skip
    return open_index(folder)
