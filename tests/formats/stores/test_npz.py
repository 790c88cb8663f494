"""numpy's archives: stored and compressed members, byte and memory order, texts, and what is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores import Header, open_store


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_tensors(compressed: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "W_enc": rng.normal(size=(4, 6)).astype(np.float32), "half": rng.normal(size=3).astype(np.float16),
        "columns": np.asfortranarray(rng.normal(size=(3, 2, 4))), "swapped": rng.normal(size=5).astype(">f4"),
        "scalar": np.array(3), "none": np.zeros((0, 2)), "mask": np.array([True, False]),
    }  # fmt: skip
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "params.npz", **arrays, note=np.array("hello"), names=np.array(["a", "b"]))
    store = open_store(tmp_path / "params.npz")
    assert store.headers()["W_enc"] == Header((4, 6), torch.float32)
    assert set(store.headers()) == set(arrays)
    for key, array in arrays.items():
        found = store.tensor(key)
        assert found.shape == array.shape
        np.testing.assert_array_equal(found.numpy(), array)
    assert store.values == {"note": "hello", "names": ["a", "b"]}


@pytest.mark.parametrize("shift", range(8))
def test_stored_members_are_mapped_where_aligned(shift: int, tmp_path: Path) -> None:
    """numpy pads inside a member, not before it: by the length of its name, an array may be read or must be copied."""
    name = "a" * (shift + 1)
    np.savez(tmp_path / "a.npz", **{name: np.arange(1000, dtype=np.float32)})
    store = open_store(tmp_path / "a.npz")
    first, second = store.tensor(name), store.tensor(name)
    assert first.tolist() == list(range(1000))
    assert first.data_ptr() % 4 == 0
    assert (first.data_ptr() == second.data_ptr()) == (shift % 4 == 1)


def test_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(2), b=np.array([{"x": 1}], dtype=object))
    with pytest.raises(FormatError, match=r"here: b.npy: holds Python objects, which only a pickle could give back"):
        open_store(tmp_path / "a.npz", "here")


def test_records_and_times_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(2, dtype="M8[s]"))
    with pytest.raises(FormatError, match=r"a.npy: dtype datetime64\[s\] is not supported; allowed: bool, uint8"):
        open_store(tmp_path / "a.npz")


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as handle:
        for name, data in members.items():
            handle.writestr(name, data)
    return path


def npy(shape: str, dtype: str = "<f4", data: bytes = b"") -> bytes:
    """An array whose header claims `shape`."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": (1,)})
    head = buffer.getvalue().replace(b"(1,)", shape.encode())
    length = (len(head) - 10).to_bytes(2, "little")
    return head[:8] + length + head[10:] + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy("(1000000000000,)"), r"float32 \[1000000000000\] takes 4,000,000,000,000 bytes, the archive says 0"),
        (npy("(4294967296, 4294967296)"), "takes 73,786,976,294,838,206,464 bytes, the archive says 0"),
        (npy("(3,)", data=bytes(8)), r"float32 \[3\] takes 12 bytes, the archive says 8"),
        (npy("(-3,)", data=bytes(8)), "shape .-3,. is not sound"),
        (npy("(1,)", "nonsense"), "not a sound .npy"),
        (npy("(" * 200), "not a sound .npy"),
        (b"\x93NUMPY\x01\x00\xff\xff", "not a sound .npy"),
        (b"text", "not a sound .npy"),
    ],
)
def test_lying_headers(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=f"here: a.npy: .*{message}"):
        open_store(archive(tmp_path / "a", {"a.npy": data}), "here")


def test_compressed_floods_are_refused_before_they_come(tmp_path: Path) -> None:
    """100 MB of zeros in 100 kB: honest headers, and still not weights."""
    path = archive(tmp_path / "a", {"a.npy": npy("(25000000,)", data=bytes(100_000_000))}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    store = open_store(path, "here")
    with pytest.raises(FormatError, match=r"here: a.npy unpacks from \d\d,\d+ to 100,000,\d+ bytes; weights do not"):
        store.tensor("a")


def test_small_constant_arrays_may_compress_as_they_like(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", b_enc=np.zeros(100_000, np.float32))
    assert open_store(tmp_path / "a.npz").tensor("b_enc").sum() == 0


def test_a_flipped_bit_in_a_compressed_member(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.random.default_rng(0).normal(size=5000))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(CorruptError, match=r"a.npy cannot be unpacked"):
        open_store(tmp_path / "a.npz").tensor("a")
