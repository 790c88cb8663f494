"""Whether two sides may be compared at all, and what has to be said about how they hang together."""

from __future__ import annotations

from typing import Any

from unmix.core.errors import ConfigError
from unmix.core.manifest import read_manifest
from unmix.index.differences.evidence import alike
from unmix.index.differences.sides import ROLE, Side
from unmix.index.layout import DOCUMENTS, KIND, TOKENS
from unmix.index.reader import CoderIndex, LatentIndex


def check_coders(a: LatentIndex, one: CoderIndex, b: LatentIndex, other: CoderIndex) -> None:
    """`ConfigError` where latent i of the one cannot be the latent i of the other.

    The same coder always may; another one of the same size only on another model (a coder for each of two models).
    """
    if one.n_latents != other.n_latents:
        raise ConfigError(
            f"{one.name!r} in {a.folder} has {one.n_latents} latents, {other.name!r} in {b.folder} has "
            f"{other.n_latents}: latents are compared by number, so both must be of one dictionary"
        )
    if _same_coder(a, one, b, other) is False and not _models_differ(a, b):
        raise ConfigError(
            f"{one.name!r} in {a.folder} and {other.name!r} in {b.folder} are different coders of one model "
            f"(hashes {_hash(a, one)} and {_hash(b, other)}): latent i of the one has nothing to do with latent i "
            "of the other"
        )


def remarks(a: Side, b: Side) -> list[str]:
    """What a reader of the result has to know."""
    said: list[str] = []
    if a.index.folder != b.index.folder:
        said += _between_indexes(a, b)
    elif a.where is not None and b.where is not None and _shared_documents(a):
        said.append(
            f"documents may lie on both sides of {a.where.slicing!r} at once; the test takes the sides as independent, "
            "which is cautious where a latent fires on both sides of the same documents"
        )
    if not alike(a.counts, b.counts):
        said.append(
            f"documents have {a.counts.length:.0f} tokens in {a.name} and {b.counts.length:.0f} in {b.name}: shares "
            "of documents are not comparable, so the rate a token decides"
        )
    return said


def _between_indexes(a: Side, b: Side) -> list[str]:
    said: list[str] = []
    if _same_coder(a.index, a.coder, b.index, b.coder) is False:
        said.append(
            "two coders of one size on two models: latent i against latent i makes sense only where one was made "
            "from the other (the same start, or fine-tuned)"
        )
    if _same_text(a.index, b.index):
        said.append(
            "the same text on both sides: each document is its own pair; the test takes the sides as independent, "
            "which is cautious where a latent fires in the same documents on both"
        )
    return said


def _same_text(a: LatentIndex, b: LatentIndex) -> bool:
    """Whether tokens and document borders are the same bytes, by the hashes in the manifests."""
    files = [read_manifest(index.folder, KIND)["files"] for index in (a, b)]
    return a.context == b.context and all(files[0].get(f) == files[1].get(f) for f in (TOKENS, DOCUMENTS))


def _shared_documents(side: Side) -> bool:
    """Whether some documents have positions on several values of the side's slicing."""
    where = side.where
    if where is None or where.slicing == ROLE:
        return False
    figures = side.coder.figures
    counted = int(figures.in_slice(where.slicing).n_documents.sum())
    return counted > int(figures.n_documents)


def _hash(index: LatentIndex, coder: CoderIndex) -> Any:
    hashes = index.meta.get("coder_hash")
    return hashes.get(coder.name) if isinstance(hashes, dict) else None


def _same_coder(a: LatentIndex, one: CoderIndex, b: LatentIndex, other: CoderIndex) -> bool | None:
    """Whether it is one coder; None where the builder of either left no hash."""
    hashes = _hash(a, one), _hash(b, other)
    return None if None in hashes else hashes[0] == hashes[1]


def _models_differ(a: LatentIndex, b: LatentIndex) -> bool:
    return a.meta.get("model") != b.meta.get("model")
