"""safetensors and indexes of shards: what is there, what is claimed, and where the two differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores import Header, open_store


def some() -> dict[str, Tensor]:
    return {
        "W": torch.randn(5, 3), "b": torch.randn(3).bfloat16(), "n": torch.tensor(7), "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]), "small": torch.randn(4).to(torch.float8_e4m3fn),
    }  # fmt: skip


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, which may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_what_is_there(tmp_path: Path) -> None:
    """Every tensor, its header, and the metadata; the suffix plays no part."""
    tensors = some()
    save_file(tensors, tmp_path / "weights.bin", metadata={"made": "here"})
    store = open_store(tmp_path / "weights.bin")
    assert set(store.headers()) == set(tensors)
    assert store.headers()["W"] == Header((5, 3), torch.float32)
    assert store.values == {"made": "here"}
    for key, tensor in tensors.items():
        found = store.tensor(key)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found.float(), tensor.float())


def test_tensors_are_mapped_and_writes_stay_private(tmp_path: Path) -> None:
    """Two readers share the file's pages; changing one's tensor changes neither the file nor the other's."""
    path = tmp_path / "w.safetensors"
    save_file({"W": torch.ones(4, 4), "V": torch.ones(4)}, path)
    first, second = open_store(path), open_store(path)
    tensor = first.tensor("W")
    assert tensor.untyped_storage().nbytes() == 64  # its own bytes, not those of the whole file
    assert tensor.data_ptr() == first.tensor("W").data_ptr()
    before = path.read_bytes()
    tensor.zero_()
    assert path.read_bytes() == before
    assert bool((second.tensor("W") == 1).all())


def test_unaligned_data_are_read(tmp_path: Path) -> None:
    """Old writers did not pad the header; such tensors are copied to where floats may lie."""
    header = json.dumps({"a": entry([2], 0, 8)}).encode()
    header += b" " * ((3 - len(header)) % 4)
    path = raw(tmp_path / "w", header, torch.tensor([1.5, -2.0]).numpy().tobytes())
    found = open_store(path).tensor("a")
    assert found.tolist() == [1.5, -2.0]
    assert found.data_ptr() % 4 == 0


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_file({"W_enc": torch.ones(1)}, tmp_path / "w")
    with pytest.raises(FormatError, match=r"here: no tensor 'W_encc'. Did you mean 'W_enc'\?"):
        open_store(tmp_path / "w", "here").tensor("W_encc")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry([2], 0, 8)}, bytes(4), "cut short: its tensors take 8 bytes of data, the file has 4"),
        ({"a": entry([2], 0, 12)}, bytes(12), r"a: F32 \[2\] takes 8 bytes, its data_offsets span 12"),
        ({"a": entry([2], 8, 0)}, bytes(8), r"a: F32 \[2\] takes 8 bytes, its data_offsets span -8"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "the data of a and b overlap"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8), "the data of a and b overlap"),
        ({"a": entry([-2], 0, 8)}, bytes(8), "must be whole numbers ≥ 0"),
        ({"a": entry([2.0], 0, 8)}, bytes(8), "must be whole numbers ≥ 0"),
        ({"a": entry([True, 2], 0, 8)}, bytes(8), "must be whole numbers ≥ 0"),
        ({"a": entry([1 << 63], 0, 8)}, bytes(8), "must be whole numbers ≥ 0"),
        ({"a": entry([1 << 40, 1 << 40], 0, 0)}, b"", r"a: F32 .* takes 4,835,703,278,458,516,698,824,704 bytes"),
        ({"a": entry([1] * 65, 0, 4)}, bytes(4), "must be whole numbers ≥ 0"),
        ({"a": {"dtype": "F32"}}, b"", "a: its header entry must hold dtype, shape and data_offsets"),
        ({"a": [1]}, b"", "a: its header entry must hold dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ of its safetensors header must map texts to texts"),
        (b'{"a":' + json.dumps(entry([], 0, 4)).encode() + b',"a":1}', bytes(4), "not sound JSON .'a' is there twice"),
        (b"{" + b'"a":[' * 100_000, b"", "its safetensors header is not sound JSON"),
        (b'{"\xff": 1}', b"", "its safetensors header is not sound JSON"),
        (b"{nonsense", b"", "its safetensors header is not sound JSON"),
    ],
)
def test_lying_headers(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    """Each claim is checked before anything is made from it."""
    with pytest.raises(CorruptError, match=f"^here: .*{message}"):
        open_store(raw(tmp_path / "w", header, data), "here")


@pytest.mark.parametrize(
    ("length", "message"),
    [(1000, "cut short: its header claims 1,000 bytes, the file has 10 in all"),
     (1 << 62, "its header claims 4,611,686,018,427,387,904 bytes, allowed are 100,000,000")],
)  # fmt: skip
def test_a_header_longer_than_the_file(length: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=message):
        open_store(raw(tmp_path / "w", {}, length=length))


def test_unknown_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"w: a: dtype 'F4' is not supported; allowed: F64, F32, F16, BF16, F8_E4M3"):
        open_store(raw(tmp_path / "w", {"a": entry([2], 0, 1, "F4")}, bytes(1)), "w")


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """A download that stopped, at any byte."""
    save_file(some(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "part").write_bytes(whole[:length])
        with pytest.raises((CorruptError, FormatError)):
            open_store(tmp_path / "part")


def index(folder: Path, weight_map: Any, **shards: dict[str, Tensor]) -> Path:
    """An index of shards `one.safetensors`, `two.safetensors` …"""
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    return path


def test_shards_are_one_store(tmp_path: Path) -> None:
    path = index(
        tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one={"a": torch.ones(2)}, two={"b": torch.zeros(3)}
    )
    store = open_store(path)
    assert {key: h.shape for key, h in store.headers().items()} == {"a": (2,), "b": (3,)}
    assert store.tensor("b").tolist() == [0, 0, 0]
    assert store.values == {"total_size": 8}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "the shard three.safetensors is missing"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "two.safetensors lacks the tensor c"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "a is in one.safetensors, the index says two.safetensors"),
        ({"a": "one.safetensors"}, None),
        ({"b": "two.safetensors", "a": "one.safetensors", "twice": "twice.safetensors"}, "a is in two shards, one"),
        ({"a": "more.safetensors"}, "more.safetensors holds z, which the index does not list"),
        ({"a": 3}, "its weight_map must map names of tensors to names of files"),
        ([], "its weight_map must map names of tensors to names of files"),
    ],
)
def test_shards_and_index_agree(weight_map: Any, message: str | None, tmp_path: Path) -> None:
    path = index(
        tmp_path, weight_map, one={"a": torch.ones(2)}, two={"b": torch.ones(2)},
        twice={"twice": torch.ones(1), "a": torch.ones(2)}, more={"a": torch.ones(2), "z": torch.ones(1)},
    )  # fmt: skip
    if message is None:
        open_store(path)
        return
    with pytest.raises(CorruptError, match=f"^here: {message}"):
        open_store(path, "here")


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    path = index(tmp_path, {"a": "one.safetensors"}, one={"a": torch.ones(100)})
    shard = tmp_path / "one.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CorruptError, match=r"here: one.safetensors: cut short: its tensors take 400 bytes .* has 300"):
        open_store(path, "here")


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "", "C:one", "a\\b", "~/one", "a\0b"]
)
def test_an_index_names_only_its_neighbours(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    path = index(tmp_path / "in", {"a": name})
    with pytest.raises(FormatError, match=r"it names the file .* allowed are plain names in the same folder"):
        open_store(path)


def test_links_lead_nowhere_but_into_the_hubs_own_blobs(tmp_path: Path) -> None:
    """The hub's cache: `snapshots/REV/name` is a link to `blobs/HASH` of the same repository."""
    repo, other = tmp_path / "models--a--b", tmp_path / "elsewhere"
    for folder in (repo / "blobs", repo / "snapshots" / "rev" / "layer", other):
        folder.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, repo / "blobs" / "123")
    save_file({"a": torch.ones(1)}, other / "secret")
    snapshot = repo / "snapshots" / "rev" / "layer"
    (snapshot / "one.safetensors").symlink_to(Path("../../../blobs/123"))
    index(repo / "blobs", {"a": "one.safetensors"}).rename(repo / "blobs" / "456")
    path = snapshot / "model.safetensors.index.json"
    path.symlink_to(Path("../../../blobs/456"))
    assert open_store(path).tensor("a").tolist() == [1]

    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to(other / "secret")
    with pytest.raises(FormatError, match=r"here: one.safetensors is a link out of its folder .*secret.*: refused"):
        open_store(path, "here")
