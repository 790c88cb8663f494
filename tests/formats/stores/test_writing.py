"""Writers: what other libraries read back, in the memory of one tensor, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from unmix.core.errors import FormatError, NonFiniteError
from unmix.core.progress import Task
from unmix.formats.lazy import Lazy
from unmix.formats.stores import open_store, write_safetensors, write_sharded, write_torch, writing


def some() -> dict[str, Tensor]:
    return {
        "W": torch.randn(30, 7), "turned": torch.randn(40, 11).t(), "b": torch.randn(5).bfloat16(),
        "n": torch.arange(6), "scalar": torch.tensor(2.5, dtype=torch.float64), "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]), "deep": torch.randn(3, 4, 5).permute(2, 0, 1).half(),
        "every_other": torch.randn(21)[::2], "row": torch.randn(9, 2).half().t()[:1],
    }  # fmt: skip


def lazies(tensors: dict[str, Tensor]) -> dict[str, Lazy]:
    return {name: Lazy.of(tensor) for name, tensor in tensors.items()}


@pytest.fixture(params=[None, 64], ids=["whole", "chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, once with chunks so small that every tensor takes several."""
    if request.param:
        monkeypatch.setattr(writing, "_LEAST", request.param)


@pytest.mark.usefixtures("chunks")
def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = some()
    path = tmp_path / "w.safetensors"
    write_safetensors(path, lazies(tensors), {"made": "hé"})
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors.items())
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"made": "hé"}
    assert all(torch.equal(open_store(path).tensor(k), t) for k, t in tensors.items())


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written(mmap: bool, tmp_path: Path) -> None:
    tensors = some()
    path = tmp_path / "w.pt"
    state = OrderedDict(lazies(tensors))
    write_torch(
        path, {"sd": state, "k": 32, "list": [1, 2.5, None, True, ("a",)], "plain": tensors["W"], "twice": state["b"]}
    )
    found: dict[str, Any] = torch.load(path, weights_only=True, mmap=mmap)
    assert all(torch.equal(found["sd"][k], t) and found["sd"][k].dtype == t.dtype for k, t in tensors.items())
    assert found["list"] == [1, 2.5, None, True, ("a",)]
    assert torch.equal(found["plain"], tensors["W"])
    assert found["twice"] is found["sd"]["b"]
    assert all(torch.equal(open_store(path).tensor(f"sd.{k}"), t) for k, t in tensors.items())


def test_a_torch_file_is_a_sound_zip_of_aligned_members(tmp_path: Path) -> None:
    """Checksums hold, storages can be mapped, and the bytes depend on nothing but the tree."""
    write_torch(tmp_path / "a.pt", lazies(some()))
    write_torch(tmp_path / "b.pt", lazies(some() | {}))
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        infos = archive.infolist()
    data = (tmp_path / "a.pt").read_bytes()
    for info in infos:
        head = data[info.header_offset : info.header_offset + 30]
        start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        assert start % 64 == 0, info.filename
    torch.manual_seed(1)
    write_torch(tmp_path / "c.pt", first := lazies(some()))
    write_torch(tmp_path / "d.pt", first)
    assert (tmp_path / "c.pt").read_bytes() == (tmp_path / "d.pt").read_bytes()


def test_shards(tmp_path: Path) -> None:
    tensors = some()
    names = write_sharded(tmp_path, "model", lazies(tensors), shard_bytes=1000)
    assert names[-1] == "model.safetensors.index.json"
    assert names[0] == f"model-00001-of-{len(names) - 1:05d}.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    store = open_store(tmp_path / names[-1])
    assert all(torch.equal(store.tensor(k), t) for k, t in tensors.items())
    assert store.values == {"total_size": sum(t.nbytes for t in tensors.values())}
    for name in names[:-1]:
        held = load_file(tmp_path / name)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 1000


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    assert write_sharded(tmp_path, "model", lazies(some()), shard_bytes=10**9) == ("model.safetensors",)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_not_written(bad: float, tmp_path: Path) -> None:
    """The file that was there stays as it was, and nothing is left beside it."""
    tensors = lazies({"fine": torch.ones(3), "W_dec": torch.tensor([1.0, bad])})
    (tmp_path / "w").write_text("before")
    for write in (lambda: write_safetensors(tmp_path / "w", tensors), lambda: write_torch(tmp_path / "w", tensors)):
        with pytest.raises(NonFiniteError, match=r"w.* holds NaN or infinity; nothing was written"):
            write()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("w", "before")]


def test_a_lazy_that_makes_something_else(tmp_path: Path) -> None:
    liar = Lazy(lambda: torch.ones(3), torch.empty(2, device="meta"))
    with pytest.raises(FormatError, match=r"a: is torch.float32 \[3\], expected torch.float32 \[2\]"):
        write_safetensors(tmp_path / "w", {"a": liar})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [object(), Path(), print, torch.float32, {1}])
def test_only_plain_values_go_into_torch_files(value: object, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be written, allowed are plain values"):
        write_torch(tmp_path / "w", {"a": value})


def test_dtypes_that_a_file_has_no_word_for(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a: safetensors has no dtype torch.complex128"):
        write_safetensors(tmp_path / "w", lazies({"a": torch.zeros(1, dtype=torch.complex128)}))
    with pytest.raises(FormatError, match=r"torch's files have no storage of dtype torch.uint16"):
        write_torch(tmp_path / "w", lazies({"a": torch.zeros(1, dtype=torch.uint16)}))


def test_progress_counts_bytes(tmp_path: Path) -> None:
    tensors = some()
    total = sum(t.nbytes for t in tensors.values())
    task = Task("writing", total, "bytes")
    write_safetensors(tmp_path / "w", lazies(tensors), progress=task)
    assert task.done == total


_PROBE = """
import json, sys, threading, time
from pathlib import Path
import torch
from unmix.formats.lazy import Lazy, apply
from unmix.formats.stores import open_store, write_safetensors, write_torch

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(next(l for l in text.splitlines() if l.startswith("RssAnon")).split()[1]) * 1024

peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

folder, largest = Path(sys.argv[1]), 64 << 20
torch.ones(1000, 1000).t().contiguous().sum().isfinite()
like = torch.empty(16 << 10, 1 << 10, device="meta")
made = [Lazy(lambda: torch.full((1 << 10, 16 << 10), 2.0).t(), like) for _ in range(3)]
write_safetensors(folder / "warm", {"a": Lazy.of(torch.ones(3))})
before = anonymous()
thread = threading.Thread(target=watch, daemon=True)
thread.start()
for write, name in ((write_safetensors, "w.safetensors"), (write_torch, "w.pt")):
    write(folder / name, dict(zip("abc", made)))
    store = open_store(folder / name)
    # From a file to a file, turned on the way: mapped, so not even one tensor is in memory.
    turned = {k: apply(lambda t: t.t(), Lazy(lambda k=k: store.tensor(k), like)) for k in "a"}
    write(folder / "turned", turned)
stop.set()
thread.join()
print(json.dumps({"extra": (peak - before) / largest}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_peak_memory_is_one_tensor(tmp_path: Path) -> None:
    """Three tensors of 64 MB that are computed, and turned in memory: 1.2 times one of them is enough."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, str(tmp_path)], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    extra = json.loads(done.stdout)["extra"]
    assert 0.9 < extra < 1.2
