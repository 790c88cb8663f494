"""Files made to hurt: each ends in one clear error, nothing runs, nothing is written, memory stays small.

The canary is a file that every attack would create if any of its code ran.
"""

from __future__ import annotations

import builtins
import gzip
import os
import pickle
import resource
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores import Bag, is_finite, open_store


@pytest.fixture(autouse=True)
def canary(tmp_path: Path) -> Iterator[Path]:
    """Where an attack would leave its mark; no test may find it there."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code in the file was run"


class Attack:
    """Pickles as a call of `call(*args)`."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call = (call, args)

    def __reduce__(self) -> Any:
        return self.call


def wrapped(attack: Any) -> dict[str, Any]:
    """As it would come: among honest tensors."""
    return {"W_enc": torch.ones(2), "state_dict": {"W_dec": torch.ones(2), "bias": attack}}


def _torch_zip(tree: Any, path: Path) -> None:
    torch.save(tree, path)


def _torch_old(tree: Any, path: Path) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=False)


def _gz(tree: Any, path: Path) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(tree)))


def _plain(protocol: int) -> Callable[[Any, Path], None]:
    def save(tree: Any, path: Path) -> None:
        path.write_bytes(pickle.dumps(tree, protocol))

    return save


CARRIERS = {"zip": _torch_zip, "old": _torch_old, "gz": _gz, **{f"pickle-{p}": _plain(p) for p in range(6)}}

CALLS: dict[str, tuple[Any, Callable[[Path], tuple[Any, ...]]]] = {
    f"{os.system.__module__}.system": (os.system, lambda c: (f"touch {c}",)),
    "builtins.eval": (builtins.eval, lambda c: (f"open({str(c)!r}, 'w')",)),
    "builtins.exec": (builtins.exec, lambda c: (f"open({str(c)!r}, 'w')",)),
    "builtins.getattr": (builtins.getattr, lambda c: (c, "touch")),
    "builtins.__import__": (builtins.__import__, lambda c: ("os",)),
    "subprocess.Popen": (subprocess.Popen, lambda c: (["touch", str(c)],)),
    "pathlib.Path": (Path, lambda c: (str(c),)),
    "torch.serialization.load": (torch.load, lambda c: (str(c),)),
    "torch.storage.UntypedStorage.from_file": (getattr, lambda c: (torch.UntypedStorage, "from_file")),
}


@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS.keys())
@pytest.mark.parametrize("name", CALLS)
def test_calls_in_every_kind_of_file(
    name: str, carrier: Callable[[Any, Path], None], canary: Path, tmp_path: Path
) -> None:
    """The error names what was asked for and says that nothing was run."""
    call, args = CALLS[name]
    carrier(wrapped(Attack(call, *args(canary))), tmp_path / "file")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        FormatError, match=r"this pickle is refused: it asks for '[\w.]+', which is not allowed"
    ) as found:
        open_store(tmp_path / "file", "here")
    module, _, last = name.rpartition(".")
    assert last in str(found.value) or "getattr" in str(found.value), (module, found.value)
    assert str(found.value).startswith("here")
    assert str(found.value).endswith("nothing in it was run")
    assert sorted(tmp_path.iterdir()) == before


def hand(*parts: bytes) -> bytes:
    """A pickle written by hand."""
    return b"\x80\x04" + b"".join(parts) + b"."


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word.encode())]) + word.encode()


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


BAG = stack_global("sae_training.config", "Config")
RUN = stack_global("os", "system")
REFUSED = {
    "STACK_GLOBAL": (hand(RUN, text("touch"), b"\x85R"), "it asks for 'os.system'"),
    "dots in a name": (
        hand(stack_global("torch._utils", "_rebuild_tensor_v2.__globals__")),
        "it asks for 'torch._utils._rebuild_tensor_v2.__globals__'",
    ),
    "dots after torch": (hand(stack_global("torch", "serialization.os.system")), "'torch.serialization.os.system'"),
    "a dtype's attribute": (hand(stack_global("torch", "float32.__class__")), "'torch.float32.__class__'"),
    "torch's functions": (hand(stack_global("torch", "load"), text("x"), b"\x85R"), "'torch.load'"),
    "a module like an allowed one": (hand(stack_global("sae_lens_evil", "X")), "'sae_lens_evil.X'"),
    "below an allowed module's name": (hand(stack_global("torch.nn", "modules.os.system")), "'torch.nn.modules.os.s"),
    "name that is no text": (hand(b"K\x01", text("x"), b"\x93"), "it asks for a name that is not a text"),
    "name from the memo": (hand(text("os"), b"\x940h\x00", text("system"), b"\x93"), "'os.system'"),
    "INST": (b"(S'touch'\nios\nsystem\n.", "it asks for 'os.system'"),
    "OBJ": (hand(b"(", RUN, text("touch"), b"o"), "it asks for 'os.system'"),
    "GLOBAL": (b"cposix\nsystem\n(S'touch'\ntR.", "it asks for 'posix.system'"),
    "calling a bag": (hand(BAG, b")R", text("touch"), b"\x85R"), "it calls a Bag, which is not allowed"),
    "calling a text": (hand(text("os.system"), text("touch"), b"\x85R"), "it calls a str, which is not allowed"),
    "calling a dtype": (hand(stack_global("torch", "float32"), b")R"), "it calls a dtype, which is not allowed"),
    "calling a storage": (hand(stack_global("torch", "FloatStorage"), b"K\x01\x85R"), "it calls a storage"),
    "arguments that are none": (hand(BAG, b"]R"), "is given a list, expected arguments"),
    "keywords that are none": (hand(BAG, b")", text("a"), b"\x92"), "keywords that are not a mapping"),
    "a state for a text": (hand(text("a"), b"}b"), "a str is given a state"),
    "a state for a list": (hand(b"]}b"), "a list is given a state"),
    "an attribute that is no text": (hand(BAG, b")\x81}K\x01K\x02sb"), "an attribute's name is not a text"),
    "items for a bag": (hand(BAG, b")\x81(K\x01K\x02u"), "a Bag is filled like a dict"),
    "append to a bag": (hand(BAG, b")\x81K\x01a"), "a Bag is filled like a list"),
    "add to a list": (hand(b"](K\x01\x90"), "a list is filled like a set"),
    "a nested key": (hand(b"}" + b")" + b"\x85" * 1000 + b"K\x01s"), "a tuple is used as a key"),
    "a bag as a key": (hand(b"}", BAG, b")\x81K\x01s"), "a Bag is used as a key"),
    "a nested member": (hand(b"\x8f(" + b")" + b"\x85" * 1000 + b"\x90"), "a tuple is used as a key"),
    "a frozen nested member": (hand(b"()\x85\x91"), "a tuple is used as a key"),
    "reconstructor": (hand(stack_global("copyreg", "_reconstructor"), BAG, BAG, b"N\x87R"), "than a plain"),
    "extension codes": (hand(b"\x82\x01"), "it uses the opcode EXT1"),
    "buffers": (hand(b"\x97"), "it uses the opcode NEXT_BUFFER"),
    "a persistent id": (hand(text("x"), b"Q"), "it refers to data outside itself"),
    "codecs": (hand(stack_global("_codecs", "encode"), text("x"), text("rot13"), b"\x86R"), "with 'rot13' is not"),
    "a tensor of nothing": (
        hand(stack_global("torch._utils", "_rebuild_tensor_v2"), b"(K\x01K\x00)))tR"), "else than a storage",
    ),
    "a parameter of nothing": (
        hand(stack_global("torch._utils", "_rebuild_parameter"), b"N\x85R"), "else than a tensor",
    ),
    "a tensor's class that calls": (
        hand(stack_global("torch._tensor", "_rebuild_from_type_v2"), b"(", BAG, BAG, b")}tR"), "torch's own func",
    ),
    "an object's dtype": (hand(stack_global("numpy", "dtype"), text("O8"), b"\x85R"), "numpy dtype 'O8' is not"),
    "a storage that is a pickle": (
        hand(stack_global("torch.storage", "_load_from_bytes"), b"C\x14cos\nsystem\n(S'x'\ntR.\x85R"), "'os.system'",
    ),
    "a huge shape": (
        hand(stack_global("torch", "Size"), b"(\x8a\x0a" + bytes(8) + b"\x80\x00tR"), "a shape or stride is .?2361",
    ),
}  # fmt: skip


@pytest.mark.parametrize("data", [v[0] for v in REFUSED.values()], ids=REFUSED.keys())
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_pickles_by_hand(data: bytes, zipped: bool, tmp_path: Path) -> None:
    message = next(m for d, m in REFUSED.values() if d == data)
    (tmp_path / "file").write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(FormatError, match=message) as found:
        open_store(tmp_path / "file", "here")
    assert "nothing in it was run" in str(found.value)


def test_a_bag_only_keeps_what_it_is_given(tmp_path: Path, canary: Path) -> None:
    """A class of an allowed module with a command as its argument: words in a bag, however it is built."""
    evil = stack_global("sae_training.config", "os.system")
    for make in (b"R", b"\x81"):
        (tmp_path / "file").write_bytes(hand(evil, text(f"touch {canary.name}"), b"\x85", make))
        found = open_store(tmp_path / "file").values
        assert found == {"": Bag("sae_training.config.os.system", {}, (f"touch {canary.name}",))}
    assert not callable(found[""])


@pytest.mark.parametrize(
    "data",
    [
        hand(b"0"), hand(b"\x85"), hand(b"R"), hand(b"s"), hand(b"e"), hand(b"h\x07"), hand(b"(K\x01u"), hand(b"b"),
        hand(b"("), hand(b"2"), hand(b"\x93"), b"\x80\x04K", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
 b"\x80\x04\xff.", b"\x80\x04N", hand(b"N") + b"more",
        b"(I" + b"9" * 10_000 + b"\n.", hand(stack_global("collections", "OrderedDict"), b"K\x01K\x02\x86R"),
        hand(stack_global("builtins", "slice"), b")R"),
    ],
)  # fmt: skip
def test_broken_pickles(data: bytes, tmp_path: Path) -> None:
    """Opcodes on an empty stack, lengths beyond the end, an end too early or too late."""
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(
        CorruptError, match=r"^here: (not a sound pickle|.* follow the end of its pickle|a pickle without)"
    ):
        open_store(tmp_path / "file", "here")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two more GB of addresses than now: what asks for more fails here, and would drown a real machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if not pages:
        pytest.skip("reads the process's size from /proc")
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


def _laughs() -> bytes:
    """Each list holds the one before ten times: 10^20 parts in a hundred bytes."""
    levels = b"".join(b"](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"e\x94" for i in range(20))
    return hand(b"]\x94", levels)


def _copies() -> bytes:
    """One long list, and a request for another copy of it, over and over."""
    ask = b"h\x01h\x00\x85R"
    return hand(b"](" + b"N" * 5_000 + b"e\x940", stack_global("builtins", "set"), b"\x940](" + ask * 5_000 + b"e")


BOMBS = {
    "deep lists": (hand(b"]" * 20_000 + b"a" * 19_999), "nested deeper than 48 levels"),
    "deep tuples": (hand(b")" + b"\x85" * 20_000), "nested deeper than 48 levels"),
    "deep mappings": (hand(b"}" + b"K\x01}" * 5_000 + b"s" * 5_000), "nested deeper than 48 levels"),
    "itself": (hand(b"]\x94h\x00a"), "nested deeper than 48 levels"),
    "a bag in itself": (hand(BAG, b")\x81\x94}", text("me"), b"h\x00sb"), "nested deeper than 48 levels"),
    "laughs": (_laughs(), "nested into more than 500,000 parts"),
    "copies": (_copies(), "it unfolds to far more than its own length"),
    "long names": (hand(b"}X" + (10_000).to_bytes(4, "little") + b"a" * 10_000 + b"Ns"), "a key that cannot be a name"),
    "huge keys": (
        hand(b"}\x8b" + (5000).to_bytes(4, "little") + b"\x7f" * 5000 + b"Ns"),
        "a key that cannot be a name",
    ),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("data", [v[0] for v in BOMBS.values()], ids=BOMBS.keys())
def test_pickle_bombs(data: bytes, tmp_path: Path) -> None:
    message = next(m for d, m in BOMBS.values() if d == data)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        open_store(tmp_path / "file", "here")


@pytest.mark.usefixtures("little_memory")
def test_a_memo_far_out_takes_no_room(tmp_path: Path) -> None:
    """Python's own reader would make a table of four thousand million entries."""
    (tmp_path / "file").write_bytes(hand(b"Nr\xff\xff\xff\xff"))
    assert open_store(tmp_path / "file").values == {"": None}


@pytest.mark.usefixtures("little_memory")
def test_a_gzip_flood(tmp_path: Path) -> None:
    tail = b"C" + b"\x00"
    flood = gzip.compress(b"\x80\x04" + bytes(100_000_000) + tail, 1)
    (tmp_path / "file").write_bytes(flood)
    with pytest.raises(
        FormatError, match=r"here: its [\d,]+ bytes unpack to more than [\d,]+; weights do not compress"
    ):
        open_store(tmp_path / "file", "here")


@pytest.mark.parametrize("cut", [10, 200, -4])
def test_a_gzip_cut_short(cut: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(gzip.compress(pickle.dumps({"a": torch.randn(500)}))[:cut])
    with pytest.raises(CorruptError, match=r"here: its gzip data are (cut short|broken)"):
        open_store(tmp_path / "file", "here")


def test_a_gzip_in_a_gzip(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(gzip.compress(gzip.compress(b"x")))
    with pytest.raises(FormatError, match="is none of"):
        open_store(tmp_path / "file")


def rewritten(path: Path, change: Callable[[str, bytes], tuple[str, bytes]], compression: int = 0) -> Path:
    """A torch file with members changed."""
    torch.save({"W": torch.ones(8)}, path)
    with zipfile.ZipFile(path) as archive:
        members = [change(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["../../canary", "/canary", "a/../../canary", "..\\canary", "C:/canary"])
def test_names_that_lead_out_of_a_zip(name: str, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "file", lambda n, d: (name if n.endswith("/version") else n, d))
    with pytest.raises(FormatError, match="a name that leads out of it: refused"):
        open_store(path)


def test_compressed_torch_files_are_no_torch_files(tmp_path: Path) -> None:
    """So a zip of zeros cannot unfold at all."""
    path = rewritten(tmp_path / "file", lambda n, d: (n, d), zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match=r"data.pkl is compressed; torch never does that: refused"):
        open_store(path)


def test_a_storage_shorter_than_its_tensor(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "file", lambda n, d: (n, d[:20] if n.endswith("data/0") else d))
    store = open_store(path, "here")
    with pytest.raises(CorruptError, match="here: W: its storage has 20 bytes, expected 32"):
        store.tensor("W")


def test_a_storage_that_is_missing(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "file", lambda n, d: (n.replace("data/0", "data/9"), d))
    with pytest.raises(CorruptError, match="here: the archive lacks data/0"):
        open_store(path, "here").tensor("W")


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "file", lambda n, d: (n, b"big" if n.endswith("byteorder") else d))
    with pytest.raises(FormatError, match="byte order b'big', expected b'little'"):
        open_store(path)


@pytest.mark.parametrize(
    ("old", "new"), [(b"K\x08\x85", b"K\x09\x85"), (b"K\x01\x85", b"K\x02\x85"), (b"K\x00K\x08\x85", b"K\x01K\x08\x85")]
)
def test_a_tensor_beyond_its_storage(old: bytes, new: bytes, tmp_path: Path) -> None:
    """More elements, a wider stride, a later start than the storage has room for."""

    def change(name: str, data: bytes) -> tuple[str, bytes]:
        assert not name.endswith("data.pkl") or old in data
        return name, data.replace(old, new) if name.endswith("data.pkl") else data

    with pytest.raises(CorruptError, match=r"here: W: shape .* do not fit its storage of 8 elements"):
        open_store(rewritten(tmp_path / "file", change), "here")


@pytest.mark.parametrize("save", [_torch_zip, _torch_old])
def test_a_stride_of_zero_claims_no_terabytes(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    save({"W": torch.ones(1).expand(1 << 40)}, tmp_path / "file")
    with pytest.raises(CorruptError, match=r"W: shape \[1099511627776\], stride \[0\] .* its storage of 1 elements"):
        open_store(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", CorruptError, r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", FormatError, "this is a git-lfs pointer, not"),
        (b"<!DOCTYPE html><html>404</html>", FormatError, "this is a web page, not the weights"),
        (b"\n <html>", FormatError, "this is a web page, not the weights"),
        (b'{"error": "not found"}', FormatError, "is JSON without a weight_map"),
        (b"[1, 2]", FormatError, "is JSON without a weight_map"),
        (b'{"weight_map": ', CorruptError, "looks like JSON and is not"),
        (b"[" * 100_000, CorruptError, "looks like JSON and is not"),
        (b"Entry not found", FormatError, "begins with b'Entry not fo', which is none of safetensors, a safet"),
        (b"PK\x03\x04 and no more", CorruptError, "its zip directory cannot be read"),
        (b"PK\x05\x06" + bytes(18), FormatError, "a zip archive of neither torch nor numpy; it holds nothing"),
        (b"\x1f\x8bxxxx", CorruptError, "its gzip data are broken"),
        (b"a", FormatError, "begins with b'a', which is none of"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_tensors(content: bytes, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(error, match=f"^here: {message}"):
        open_store(tmp_path / "file", "here")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(FormatError, match="here: is a folder, expected a file of tensors"):
        open_store(tmp_path, "here")
    for name in ("pipe", "zero"):
        with pytest.raises(FormatError, match="here: is a device, pipe or socket, expected a file of tensors"):
            open_store(tmp_path / name, "here")
    for name in ("gone", "absent"):
        with pytest.raises(FormatError, match=r"here: cannot be opened \(No such file or directory\)"):
            open_store(tmp_path / name, "here")


def test_nan_weights_open(tmp_path: Path) -> None:
    """Looking at a broken coder must work; only making one of it is refused, elsewhere."""
    torch.save({"W": torch.tensor([1.0, float("nan")])}, tmp_path / "file")
    assert not is_finite(open_store(tmp_path / "file").tensor("W"))


def test_random_damage_never_escapes_the_errors(tmp_path: Path) -> None:
    """Flipped bytes anywhere: either it still opens or it is one of our errors, for every kind of file."""
    import random

    torch.save({"a": torch.ones(4), "n": {"k": 1}}, tmp_path / "zip")
    _torch_old({"a": torch.ones(4), "p": nn.Parameter(torch.ones(2))}, tmp_path / "old")
    (tmp_path / "pkl").write_bytes(pickle.dumps({"a": torch.ones(4), "b": [1, "x", {2}]}))
    for name in ("zip", "old", "pkl"):
        whole = (tmp_path / name).read_bytes()
        for seed in range(50):
            rng = random.Random(seed)
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            (tmp_path / "bad").write_bytes(data)
            try:
                store = open_store(tmp_path / "bad")
                for key in store.headers():
                    store.tensor(key)
            except (CorruptError, FormatError):
                pass
