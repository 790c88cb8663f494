"""torch's files and pickles, new and old: tensors and values by dotted name, classes as bags, nothing imported."""

from __future__ import annotations

import gzip
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores import Bag, Store, open_store

Save = Callable[[Any, Path], None]


def _zip(tree: Any, path: Path) -> None:
    torch.save(tree, path)


def _zip4(tree: Any, path: Path) -> None:
    torch.save(tree, path, pickle_protocol=4)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def _old(tree: Any, path: Path) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=False)


def _old4(tree: Any, path: Path) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=False, pickle_protocol=4)


def _pickle(protocol: int) -> Save:
    return lambda tree, path: path.write_bytes(pickle.dumps(tree, protocol)) and None


def _gzip(tree: Any, path: Path) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(tree)))


SAVERS: dict[str, Save] = {
    "zip": _zip, "zip-4": _zip4, "old": _old, "old-4": _old4, "gz": _gzip,
    **{f"pickle-{p}": _pickle(p) for p in range(6)},
}  # fmt: skip
every_way = pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS.keys())


def tree() -> dict[str, Any]:
    whole = torch.randn(6, 4)
    return {
        "state_dict": OrderedDict(W=whole, view=whole[1:3, ::2], turned=whole.t(), half=torch.randn(3).half()),
        "k": torch.tensor(32), "activation": "TopK", "activation_state_dict": {"k": 32, "postact_fn": "ReLU"},
        "empty": torch.zeros(0, 3), "sizes": [1, 2.5, None, True], "nothing": {}, 7: (1, 2), "raw": b"\x00\xff",
        "dtype": torch.float16, "set": {1, 2}, "slice": slice(1, None), "number": np.float64(0.5), "complex": 1 + 2j,
    }  # fmt: skip


@every_way
def test_tensors_and_values_by_dotted_name(save: Save, tmp_path: Path) -> None:
    expected = tree()
    save(expected, tmp_path / "file")
    store = open_store(tmp_path / "file")
    tensors: dict[str, Tensor] = {f"state_dict.{k}": v for k, v in expected["state_dict"].items()}
    tensors |= {key: expected[key] for key in ("k", "empty")}
    assert set(store.headers()) == set(tensors)
    for key, tensor in tensors.items():
        assert store.headers()[key].shape == tuple(tensor.shape)
        assert store.headers()[key].dtype == tensor.dtype
        assert torch.equal(store.tensor(key), tensor), key
    assert store.values == {
        "activation": "TopK", "activation_state_dict.k": 32, "activation_state_dict.postact_fn": "ReLU",
        "sizes": [1, 2.5, None, True], "nothing": {}, "7": (1, 2), "raw": b"\x00\xff", "dtype": torch.float16,
        "set": {1, 2}, "slice": slice(1, None), "number": 0.5, "complex": 1 + 2j,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@every_way
def test_a_trainers_group_is_bags(save: Save, old_group: Any, tmp_path: Path) -> None:
    """Whole pickled objects: their tensors are found by the attributes that lead to them, no class is looked for."""
    save(old_group, tmp_path / "file")
    for name in [name for name in sys.modules if name.startswith("sae_training")]:
        del sys.modules[name]
    store = open_store(tmp_path / "file")
    assert set(store.headers()) == {
        f"autoencoders.{i}._parameters.{name}" for i in (0, 1) for name in ("W_enc", "b_enc")
    }
    assert torch.equal(store.tensor("autoencoders.1._parameters.W_enc"), old_group.autoencoders[1].W_enc)
    config = store.values["cfg"]
    assert isinstance(config, Bag)
    assert config.kind == "sae_training.config.LanguageModelSAERunnerConfig"
    assert config.get("hook_point") == "blocks.3.hook_resid_pre"
    assert config.get("absent", 5) == 5
    assert config.attributes["dtype"] is torch.float32
    assert config.attributes["device"] == "cpu"
    assert config.attributes["store_batch_size"] == (32,)
    assert not [name for name in sys.modules if name.startswith("sae_training")]


@pytest.mark.parametrize("save", [_zip, _old, _gzip], ids=["zip", "old", "gz"])
def test_a_config_object_beside_a_state(save: Save, trainer_class: Callable[..., type[Any]], tmp_path: Path) -> None:
    config = trainer_class("sae_lens.training.config", "Config")()
    config.k, config.names = 3, ["a"]
    save({"cfg": config, "state_dict": nn.Linear(2, 3).state_dict()}, tmp_path / "file")
    store = open_store(tmp_path / "file")
    assert set(store.headers()) == {"state_dict.weight", "state_dict.bias"}
    assert store.values == {"cfg": Bag("sae_lens.training.config.Config", {"k": 3, "names": ["a"]})}


@pytest.mark.parametrize("save", [_zip, _old, _gzip], ids=["zip", "old", "gz"])
def test_a_bare_tensor_has_the_empty_name(save: Save, tmp_path: Path) -> None:
    """`*_log_feature_sparsity.pt` is one."""
    save(torch.arange(3.0), tmp_path / "file")
    store = open_store(tmp_path / "file")
    assert store.tensor("").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e5m2, torch.uint16]
)
@pytest.mark.parametrize("save", [_zip, _old], ids=["zip", "old"])
def test_dtypes(save: Save, dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([0, 1, 3]).to(dtype)
    save({"a": tensor, "p": nn.Parameter(torch.ones(2))}, tmp_path / "file")
    found = open_store(tmp_path / "file").tensor("a")
    assert found.dtype == dtype
    assert torch.equal(found.double(), tensor.double())


def test_tensors_of_a_zip_are_mapped(tmp_path: Path) -> None:
    _zip({"a": torch.ones(100), "b": torch.ones(4)}, tmp_path / "file")
    store = open_store(tmp_path / "file")
    assert store.tensor("a").data_ptr() == store.tensor("a").data_ptr()
    assert store.tensor("a").untyped_storage().nbytes() == 400


@pytest.mark.parametrize("save", [_zip, _old, _pickle(2), _gzip], ids=["zip", "old", "pickle", "gz"])
def test_every_cut_is_noticed(save: Save, tmp_path: Path) -> None:
    """A download that stopped, at any byte: an error, never fewer tensors or wrong numbers."""
    save({"a": torch.ones(30), "b": torch.ones(4)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(0, len(whole), 23):
        (tmp_path / "part").write_bytes(whole[:length])
        with pytest.raises((CorruptError, FormatError)):
            open_store(tmp_path / "part")


def test_recorded_checkpoints_of_peers(shared: Path) -> None:
    """The same tensors as torch's own reader gives."""
    files = sorted((shared / "parity").rglob("*.pt"))
    assert files
    for file in files:
        store: Store = open_store(file)
        expected = torch.load(file, weights_only=True, map_location="cpu")
        assert set(store.headers()) | set(store.values) == set(expected)
        assert all(torch.equal(store.tensor(key), expected[key]) for key in store.headers())
