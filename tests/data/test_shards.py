from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmix.core.errors import CorruptError, DataError
from unmix.core.policy import InputPolicy
from unmix.data.config import DataConfig
from unmix.data.shards import TokenShards
from unmix.data.tokenise import tokenise

TEXTS = [f"{'abcdefghij'[i % 10] * 3}{'klmnopqrst'[i // 10]} text of number {i}" for i in range(80)]


@pytest.fixture
def shards(written: Callable[..., DataConfig], letters: Any, tmp_path: Path) -> TokenShards:
    policy = InputPolicy(skip_first=2, skip_ids=(1,))
    config = written(TEXTS, tokens=800, context=8, policy=policy, shard_tokens=80)
    return tokenise(config, letters, tmp_path / "out", progress=False)


def test_any_ids_in_any_order_from_several_shards(shards: TokenShards) -> None:
    everything = shards.tokens(range(shards.n_contexts))
    assert everything.shape == (100, 8)
    ids = [99, 0, 41, 41, 12]
    assert np.array_equal(shards.tokens(ids), everything[ids])
    assert np.array_equal(shards.tokens(np.array(ids)), everything[ids])
    assert np.array_equal(shards.documents(ids), shards.documents(range(100))[ids])
    assert shards.tokens([]).shape == (0, 8)


def test_documents_rise_over_the_whole_folder(shards: TokenShards) -> None:
    flat = shards.documents(range(shards.n_contexts)).ravel()
    assert flat[0] == 0
    assert flat[-1] == shards.n_documents - 1
    assert set(np.diff(flat).tolist()) == {0, 1}
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    assert [shards.document(i)["start"] for i in range(shards.n_documents)] == starts.tolist()


def test_the_mask_leaves_out_first_positions_and_ids(shards: TokenShards) -> None:
    ids = range(20)
    tokens, mask = shards.tokens(ids), shards.mask(ids)
    assert not mask[:, :2].any()
    assert np.array_equal(mask[:, 2:], tokens[:, 2:] != 1)
    assert (tokens[:, 2:] == 1).any()


def test_opened_again_it_is_the_same(shards: TokenShards) -> None:
    again = TokenShards.open(shards.folder)
    assert again.config == shards.config
    assert again.policy == shards.policy
    assert again.policy.separator_id == 1
    assert again.hash == shards.hash
    assert again.source_report == shards.source_report
    assert (again.context, again.n_contexts, again.n_tokens) == (8, 100, 800)
    again.verify()


def test_what_is_not_there_says_what_is(shards: TokenShards, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^no context 100; this folder has 100, numbered from 0$"):
        shards.tokens([3, 100])
    with pytest.raises(DataError, match=r"^no context -1; this folder has 100"):
        shards.mask([-1])
    with pytest.raises(DataError, match=r"^no document -1; this folder has \d+, numbered from 0$"):
        shards.document(-1)
    with pytest.raises(DataError, match=r"^no role 'trian'; allowed: train, evaluate, explain, score$"):
        shards.contexts_of("trian")
    with pytest.raises(DataError, match=r"nowhere: no such folder of token shards$"):
        TokenShards.open(tmp_path / "nowhere")


def test_a_truncated_shard_is_found_at_opening(shards: TokenShards) -> None:
    path = shards.folder / "explain-00001.npy"
    path.write_bytes(path.read_bytes()[:-2])
    size = path.stat().st_size
    with pytest.raises(CorruptError) as caught:
        TokenShards.open(shards.folder)
    assert str(caught.value) == f"corrupt tokens folder: {path}: found {size} bytes, expected {size + 2} bytes"


def test_a_missing_file_is_found_at_opening(shards: TokenShards) -> None:
    (shards.folder / "train.starts.npy").unlink()
    with pytest.raises(CorruptError, match=r"train\.starts\.npy: found no file, expected \d+ bytes"):
        TokenShards.open(shards.folder)


def test_a_missing_manifest_is_found_at_opening(shards: TokenShards) -> None:
    (shards.folder / "manifest.json").unlink()
    with pytest.raises(CorruptError, match=r"manifest\.json: missing, so .* is not a whole tokens folder"):
        TokenShards.open(shards.folder)


def test_a_flipped_bit_is_found_by_verify(shards: TokenShards) -> None:
    path = shards.folder / "score-00000.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    opened = TokenShards.open(shards.folder)
    with pytest.raises(CorruptError, match=r"score-00000\.npy: found sha256 .*, expected "):
        opened.verify()


def test_a_damaged_header_is_found_at_opening(shards: TokenShards) -> None:
    path = shards.folder / "score-00000.npy"
    raw = bytearray(path.read_bytes())
    path.write_bytes(b"\0" * 6 + raw[6:])
    with pytest.raises(CorruptError, match=r"score-00000\.npy: not a readable \.npy file"):
        TokenShards.open(shards.folder)


def test_an_array_of_another_shape_is_found_at_opening(shards: TokenShards) -> None:
    path = shards.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["roles"]["train"]["shards"][0]["contexts"] = 9
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match=r"train-00000\.npy: uint16 \[10, 8\], expected uint16 \[9, 8\]"):
        TokenShards.open(shards.folder)


def test_a_damaged_document_line_names_its_file(shards: TokenShards) -> None:
    path = shards.folder / "train.documents.jsonl"
    path.write_bytes(b"#" + path.read_bytes()[1:])
    with pytest.raises(CorruptError, match=r"train\.documents\.jsonl: byte 0: not the line of document 0"):
        TokenShards.open(shards.folder).document(0)
