"""What the writer asks of its input, checked before any of it is used; the one place that meets torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer

from unmix.core.errors import ConfigError, NonFiniteError
from unmix.core.manifest import MANIFEST
from unmix.core.seeds import slug
from unmix.index.layout import RESERVED, SEGMENT_TOKENS, TOKENS, slice_file


@runtime_checkable
class CodesLike(Protocol):
    """What the writer reads of `unmix.coder.codes.Codes`: CSR tensors or arrays, rows = contexts × positions."""

    @property
    def indices(self) -> Any: ...
    @property
    def values(self) -> Any: ...
    @property
    def offsets(self) -> Any: ...
    @property
    def n_latents(self) -> int: ...


@dataclass(frozen=True)
class Postings:
    """The entries of a batch that count: non-zero, at unmasked positions, in order of row."""

    rows: Int64[np.ndarray, " n"]
    latents: Integer[np.ndarray, " n"]
    values: Float32[np.ndarray, " n"]


def check_batch(
    tokens: np.ndarray,
    roles: np.ndarray,
    documents: np.ndarray,
    mask: np.ndarray,
    context: int,
    vocab_size: int | None,
    role_names: Sequence[str],
) -> None:
    """`ConfigError` where a batch's arrays do not have the shapes, kinds and ranges of `IndexWriter.add`."""
    shape = (len(tokens), context)
    given = {
        "tokens": (tokens, shape, "iu"),
        "documents": (documents, shape, "iu"),
        "mask": (mask, shape, "b"),
        "roles": (roles, shape[:1], "iu"),
    }
    for what, (array, expected, kinds) in given.items():
        if array.shape != expected:
            raise ConfigError(f"{what} is {list(array.shape)}, expected {list(expected)}")
        if array.dtype.kind not in kinds:
            raise ConfigError(f"{what} is {array.dtype}, expected {'bool' if kinds == 'b' else 'integers'}")
    _check_range("token id", tokens, 2**32 if vocab_size is None else vocab_size, "the vocabulary's size")
    _check_range("role", roles, len(role_names), f"the number of roles ({', '.join(role_names)})")
    _check_range("document id", documents, 2**31, "2^31")


def check_slicings(slices: Mapping[str, Sequence[str]]) -> None:
    """`ConfigError` for a slicing whose name is no plain word, or with other than 1 to 256 different values."""
    for name, values in slices.items():
        if not name.isidentifier():
            raise ConfigError(f"slicing {name!r}: its name must be letters, digits and underscores")
        if name == "role":
            raise ConfigError("a slicing cannot be called 'role': every index has its roles; choose another name")
        if not values or len(set(values)) != len(values) or len(values) > 256:
            raise ConfigError(f"slicing {name!r} has {len(values)} values, expected 1 to 256 different names")


def check_slices(slices: Mapping[str, np.ndarray], known: Mapping[str, Sequence[str]], shape: tuple[int, ...]) -> None:
    """`ConfigError` where a batch's slices are not those that the writer was made for."""
    if set(slices) != set(known):
        raise ConfigError(f"slices were given for {sorted(slices)}, expected {sorted(known)}")
    for name, numbers in slices.items():
        if numbers.shape != shape or numbers.dtype.kind not in "iu":
            wanted = f"integers {list(shape)}"
            raise ConfigError(f"slice {name!r} is {numbers.dtype} {list(numbers.shape)}, expected {wanted}")
        _check_range(f"slice {name!r}", numbers, len(known[name]), f"the number of values ({', '.join(known[name])})")


def check_coders(codes: Mapping[str, CodesLike], latents: Mapping[str, int]) -> None:
    """`ConfigError` where the codes are not those of the coders that the writer was made for."""
    if set(codes) != set(latents):
        raise ConfigError(f"codes were given for the coders {sorted(codes)}, expected {sorted(latents)}")
    for name, n_latents in latents.items():
        if codes[name].n_latents != n_latents:
            raise ConfigError(f"codes of {name!r} have {codes[name].n_latents} latents, expected {n_latents}")


def take_postings(
    name: str, codes: CodesLike, n_latents: int, mask: Bool[np.ndarray, "batch context"], base: int
) -> Postings:
    """The entries that count. `base` is the batch's first global position, for messages.

    Raises:
        ConfigError: offsets or latent ids that cannot be, or one latent twice at a position.
        NonFiniteError: a value that is NaN or infinite in float32.
    """
    latents, values, offsets = (as_array(x) for x in (codes.indices, codes.values, codes.offsets))
    if len(offsets) != mask.size + 1 or offsets[-1] != len(latents) or len(values) != len(latents):
        raise ConfigError(
            f"codes of {name!r} have {len(offsets) - 1} rows, {len(latents)} indices and {len(values)} values, "
            f"expected {mask.size} rows and as many entries as offsets[-1]"
        )
    if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
        raise ConfigError(f"codes of {name!r}: offsets must start at 0 and never fall")
    _check_range(f"latent id of {name!r}", latents, n_latents, "the number of latents")
    lengths = np.diff(offsets)
    rows = np.repeat(np.arange(mask.size), lengths)
    with np.errstate(over="ignore", under="ignore"):
        values = values.astype(np.float32, copy=False)
    ascending = _ascends(latents, offsets)
    keep = values != 0
    if not mask.all():
        keep &= np.repeat(mask.reshape(-1), lengths)
    if not keep.all():
        rows, latents, values = rows[keep], latents[keep], values[keep]
    _check_values(name, rows, latents, values, base)
    if not ascending:
        _check_once(name, rows, latents, n_latents, base)
    return Postings(rows, latents, values)


def _ascends(latents: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether the ids ascend in each row, as codes have them; then none comes twice."""
    if len(latents) < 2:
        return True
    rises = latents[1:] > latents[:-1]
    starts = offsets[1:-1]
    rises[starts[(starts > 0) & (starts < len(latents))] - 1] = True
    return bool(rises.all())


def _check_values(name: str, rows: np.ndarray, latents: np.ndarray, values: np.ndarray, base: int) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        bad = int(np.argmin(finite))
        where = f"latent {latents[bad]} of {name!r} at position {base + rows[bad]}"
        raise NonFiniteError(f"{where}: the value is {values[bad]}; nothing of this batch was indexed")


def _check_once(name: str, rows: np.ndarray, latents: np.ndarray, n_latents: int, base: int) -> None:
    keys = rows * n_latents + latents
    if (np.diff(keys) <= 0).any():
        keys = np.sort(keys)
        twice = np.flatnonzero(np.diff(keys) == 0)
        if len(twice):
            row, latent = divmod(int(keys[twice[0]]), n_latents)
            raise ConfigError(f"latent {latent} of {name!r} comes twice at position {base + row}")


def is_codes(x: Any) -> bool:
    """Whether these are one coder's codes and not several coders' by name."""
    return not isinstance(x, Mapping) and isinstance(x, CodesLike)


def as_array(x: Any) -> np.ndarray:
    """A tensor or array as a NumPy array; bfloat16 becomes float32. The only place that meets torch."""
    if isinstance(x, np.ndarray):
        return x
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x).numpy()


def _check_range(what: str, array: np.ndarray, limit: int, meaning: str) -> None:
    if array.size and (int(array.min()) < 0 or int(array.max()) >= limit):
        worst = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise ConfigError(f"{what} {worst} is out of range: it must be 0 or more and below {limit}, {meaning}")


def check_roles(context: int, roles: Sequence[str]) -> None:
    """`ConfigError` for a context without positions, and for no roles, equal ones or more than a byte can number."""
    if context < 1:
        raise ConfigError(f"context is {context}, expected at least 1")
    if not roles or len(set(roles)) != len(roles) or len(roles) > 256:
        raise ConfigError(f"roles are {list(roles)}, expected 1 to 256 different names")


def check_sizes(context: int, budget_bytes: int, segment_tokens: int | None) -> None:
    """`ConfigError` for a budget or a length of segments that cannot be."""
    if budget_bytes < 1:
        raise ConfigError(f"budget_bytes is {budget_bytes}, expected at least 1")
    if segment_tokens is not None and not context <= segment_tokens <= SEGMENT_TOKENS:
        raise ConfigError(f"segment_tokens is {segment_tokens}, expected {context} (one context) to 2^32")


def check_place(folder: Path, replaced: bool = True) -> None:
    """`ConfigError` for a folder that holds something else than an index or, to be `replaced`, beside one."""
    if folder.is_file():
        raise ConfigError(f"{folder}: is a file, expected a folder for the index")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    whole = (folder / "index.json").is_file() and ((folder / MANIFEST).is_file() or (folder / TOKENS).is_file())
    if not whole:
        raise ConfigError(f"{folder}: is not empty and holds no index; choose another folder")
    if replaced and (foreign := sorted(place.name for place in folder.iterdir() if not _is_ours(place))):
        raise ConfigError(
            f"{folder}: holds {foreign[0]!r}, which is no part of the index there and would go with it; move it, or "
            "choose another folder"
        )


def _is_ours(place: Path) -> bool:
    """Whether an entry of a folder is one that indexes have, whole or broken."""
    name = place.name
    if place.is_dir():
        return (place / "statistics").is_dir() or any(place.glob("segment-*"))
    return name in {*RESERVED, MANIFEST, ".lock"} or fnmatch(name, "slice-*.bin") or fnmatch(name, ".*.tmp")


def coder_folders(latents: Mapping[str, int], slices: Iterable[str] = ()) -> dict[str, str]:
    """Coder → its folder. `ConfigError` where two would share one, or one would be a file of the index."""
    taken = {*RESERVED, MANIFEST, *map(slice_file, slices)}
    if not latents:
        raise ConfigError("an index needs at least one coder")
    folders: dict[str, str] = {}
    for name, n in latents.items():
        folder = slug(name)
        if n < 1:
            raise ConfigError(f"coder {name!r} has {n} latents, expected at least 1")
        if folder.lower() in taken:
            raise ConfigError(f"coder name {name!r} is taken by a file of the index")
        if folder.lower() in {other.lower() for other in folders.values()}:
            other = next(o for o, f in folders.items() if f.lower() == folder.lower())
            raise ConfigError(f"coders {other!r} and {name!r} would share the folder {folder!r}; rename one")
        folders[name] = folder
    return folders
