"""The model's activations, encoded: by every architecture, and the same bytes whatever range is asked for."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unmix.coder.config import CoderConfig
from unmix.core.errors import ConfigError, DataError, ModelError
from unmix.core.policy import InputPolicy, ModelFingerprint
from unmix.data.config import SPEAKERS
from unmix.data.shards import TokenShards
from unmix.index.sources.base import Source
from unmix.index.sources.fitting import fit_coders, fit_packing, shared_policy
from unmix.index.sources.live import LiveSource
from unmix.lm import LanguageModel

from .tiny import KINDS, POLICY, coder, joined, packed, same


def test_every_architecture_fires_where_its_own_encoder_says(lm: LanguageModel, shards: TokenShards) -> None:
    coders = {kind: coder(kind) for kind in KINDS}
    source = LiveSource(lm, shards, coders, batch=8)
    assert isinstance(source, Source)
    (batch,) = source.batches(8, 16)
    ids = np.arange(8, 16)
    np.testing.assert_array_equal(batch.tokens, shards.tokens(ids))
    np.testing.assert_array_equal(batch.mask, shards.mask(ids))
    assert not batch.mask[:, 0].any()
    tokens = torch.from_numpy(shards.tokens(ids).astype(np.int64))
    for kind, one in coders.items():
        reads = list(one.config.reads)
        captured = lm.capture(tokens, reads, POLICY)
        with torch.no_grad():
            codes = one.encode(torch.cat([captured[hook] for hook in reads], dim=-1))
        found: Any = batch.codes[kind]
        assert found.n_latents == 48
        np.testing.assert_array_equal(found.indices, codes.indices.numpy(), err_msg=kind)
        np.testing.assert_array_equal(found.values, codes.values.numpy(), err_msg=kind)
        np.testing.assert_array_equal(found.offsets, codes.offsets.numpy(), err_msg=kind)


def test_the_pass_ends_at_the_last_hook_that_is_read(
    lm: LanguageModel, shards: TokenShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = LiveSource(lm, shards, {"early": coder("batchtopk")}, batch=8)
    ran: list[int] = []
    for i, block in enumerate(lm.model.model.layers):
        forward = block.forward
        monkeypatch.setattr(block, "forward", lambda *a, i=i, f=forward, **k: (ran.append(i), f(*a, **k))[1])
    list(source.batches(0, 8))
    assert ran == [0]


@pytest.mark.parametrize("cuts", [(0, 100), (0, 16, 32, 100), (0, 5, 7, 40, 41, 99, 100), (0, 1, 100)])
def test_one_range_gives_the_same_bytes_however_it_is_cut(
    lm: LanguageModel, shards: TokenShards, cuts: tuple[int, ...]
) -> None:
    source = LiveSource(lm, shards, {kind: coder(kind) for kind in ("topk", "relu", "temporal")}, batch=8)
    assert shards.n_contexts == 100
    whole = joined(source.batches(0, 100))
    parts = [batch for first, last in pairwise(cuts) for batch in source.batches(first, last)]
    assert same(whole, joined(parts))
    assert len(whole["tokens"]) == 100


def test_what_the_model_computes_is_an_input(lm: LanguageModel, shards: TokenShards) -> None:
    """Equal weights under another config are another model; a folder that was moved is the same one."""
    before = LiveSource(lm, shards, {"a": coder("topk")}).inputs
    config: Any = lm.model.config
    name, lm.name = lm.name, "elsewhere"
    try:
        assert LiveSource(lm, shards, {"a": coder("topk")}).inputs == before
        config.initializer_range = 0.5
        assert LiveSource(lm, shards, {"a": coder("topk")}).inputs["model"] != before["model"]
    finally:
        lm.name, config.initializer_range = name, 0.02


def test_another_batch_is_another_input(lm: LanguageModel, shards: TokenShards) -> None:
    one, other = (LiveSource(lm, shards, {"a": coder("topk")}, batch=n) for n in (8, 16))
    assert {k for k in one.inputs if one.inputs[k] != other.inputs[k]} == {"batch"}
    third = LiveSource(lm, shards, {"a": coder("topk", seed=1)}, batch=8)
    assert {k for k in one.inputs if one.inputs[k] != third.inputs[k]} == {"coders"}


def test_threads_and_processes_give_the_same_bytes(
    tiny_model_folder: Path, lm: LanguageModel, shards: TokenShards, tmp_path: Path
) -> None:
    """What workers need: another process, with another number of threads, opens the source and finds the same."""
    coder("relu").save(tmp_path / "relu")
    script = (
        "import hashlib, sys, torch\n"
        "from unmix.index.sources.opening import open_source\n"
        "source = open_source({'kind': 'live', 'model': {'name': sys.argv[1], 'dtype': 'float32'}, 'batch': 8,\n"
        "    'tokens': sys.argv[2], 'coders': {'relu': {'place': sys.argv[3], 'name': 'relu'}}, 'speakers': None})\n"
        "for threads in (1, 3):\n"
        "    torch.set_num_threads(threads)\n"
        "    found = hashlib.sha256()\n"
        "    for batch in source.batches(0, 40):\n"
        "        found.update(batch.codes['relu'].values.tobytes())\n"
        "    print(found.hexdigest())\n"
    )
    words = [sys.executable, "-c", script, str(tiny_model_folder), str(shards.folder), str(tmp_path / "relu")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    here = hashlib.sha256()
    for batch in LiveSource(lm, shards, {"relu": coder("relu")}, batch=8).batches(0, 40):
        here.update(np.asarray(batch.codes["relu"].values).tobytes())
    assert said == [here.hexdigest()] * 2


def test_labels_become_a_slicing(lm: LanguageModel, shards: TokenShards) -> None:
    source = LiveSource(lm, shards, {"a": coder("topk")}, batch=8)
    assert source.slices == {"label": ("a", "b", "c")}
    found = joined(source.batches(0, 100))
    labels = shards.labels()
    for place in (0, 17, 99):
        document = found["documents"][place, 3]
        assert source.slices["label"][found["slice label"][place, 3]] == labels[document]


def test_too_many_labels_are_left_out(lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(f'{{"text": "number {i} of many lines", "title": "t{i}"}}' for i in range(400)))
    shards = packed(lm, path, tmp_path / "tokens", tokens=6000, label_column="title")
    assert len(set(shards.labels())) > 255
    with caplog.at_level("WARNING", "unmix"):
        caplog.handler.setLevel("WARNING")
        assert LiveSource(lm, shards, {"a": coder("topk")}).slices == {}


def test_only_positions_of_the_speakers_asked_for_count(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "stored.jsonl"
    path.write_text("\n".join(f'{{"ids": [{20 + i}, 21, 22, 23], "speakers": [2, 3, 3, 4]}}' for i in range(100)))
    shards = packed(lm, path, tmp_path / "tokens", tokens=400, chat={"stored": True}, column="ids")
    every = joined(LiveSource(lm, shards, {"a": coder("topk")}).batches(0, shards.n_contexts))
    some = LiveSource(lm, shards, {"a": coder("topk")}, speakers=("assistant",))
    only = joined(some.batches(0, shards.n_contexts))
    said = every["slice speaker"] == SPEAKERS.index("assistant")
    np.testing.assert_array_equal(only["mask"], every["mask"] & said)
    assert some.inputs["speakers"] == [SPEAKERS.index("assistant")]
    with pytest.raises(DataError, match=r"no speaker 'asistant'\. Did you mean 'assistant'"):
        LiveSource(lm, shards, {"a": coder("topk")}, speakers=("asistant",))


def test_text_without_speakers_cannot_be_limited_to_one(lm: LanguageModel, shards: TokenShards) -> None:
    with pytest.raises(DataError, match="holds no chats; say --chat"):
        LiveSource(lm, shards, {"a": coder("topk")}, speakers=("user",))


def test_a_coder_that_does_not_fit_is_refused_before_anything_runs(lm: LanguageModel) -> None:
    foreign = ModelFingerprint(name="other", family="gpt2", n_layers=3)
    with pytest.raises(ModelError, match="'a' was trained on other"):
        fit_coders(lm, {"a": coder("topk", model=foreign.model_dump())})
    with pytest.raises(ModelError, match=r"unknown hook 'blocks\.1\.rsid_post'"):
        fit_coders(lm, {"a": coder("topk", reads=("blocks.1.rsid_post",))})
    with pytest.raises(ModelError, match="layers 0 to 2"):
        fit_coders(lm, {"a": coder("topk", reads=("blocks.7.resid_post",))})
    with pytest.raises(ModelError, match=r"coder 'a' reads 40 values at blocks.1.resid_post, which is 32 wide"):
        fit_coders(lm, {"a": coder("topk", d_in=40)})
    assert fit_coders(lm, {"a": coder("topk", reads=("layers.1",))}) == {"a": ("blocks.1.resid_post",)}


def test_coders_must_agree_on_how_text_is_fed(lm: LanguageModel) -> None:
    other = POLICY.model_copy(update={"skip_first": 2})
    coders = {"a": coder("topk"), "b": coder("relu", input_policy=other.model_dump())}
    with pytest.raises(ConfigError, match=r"skip_first is 1 for 'a' and 2 for 'b'.*--policy-of a"):
        shared_policy(coders, lm.tokenizer)
    assert shared_policy(coders, lm.tokenizer, "b").skip_first == 2
    with pytest.raises(ConfigError, match="--policy-of c: there is no such coder"):
        shared_policy(coders, lm.tokenizer, "c")
    unsaid = coder("relu", input_policy=InputPolicy().model_dump())
    assert shared_policy({"a": coder("topk"), "b": unsaid}, lm.tokenizer) == POLICY  # the same ids, found by itself


def test_documents_that_cannot_be_kept_apart_are_said(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = POLICY.model_copy(update={"attend_across": False})
    fit_packing(lm, apart)
    monkeypatch.setitem(lm.__dict__, "packing", "none")
    with pytest.raises(ModelError, match="cannot keep documents of one context apart"):
        fit_packing(lm, apart)


def test_documents_are_kept_apart_where_the_policy_says_so(lm: LanguageModel, text: Path, tmp_path: Path) -> None:
    apart = POLICY.model_copy(update={"attend_across": False})
    shards = packed(lm, text, tmp_path / "tokens", policy=apart.model_dump())
    made = coder("topk", input_policy=apart.model_dump())
    together = packed(lm, text, tmp_path / "together")
    one = joined(LiveSource(lm, shards, {"a": made}).batches(0, 100))
    other = joined(LiveSource(lm, together, {"a": made}).batches(0, 100))
    assert one["tokens"].tobytes() == other["tokens"].tobytes()
    assert one["a values"].tobytes() != other["a values"].tobytes()


def test_kinds_are_all_that_read_a_model() -> None:
    """A new architecture is added to `tiny.KINDS`, or its evidence is never indexed in a test."""
    known = {field["activation"]["kind"] for field in KINDS.values()}
    tags = str(CoderConfig.model_json_schema()["properties"]["activation"]["discriminator"]["mapping"].keys())
    left = {kind for kind in ("groupmax", "identity") if kind in tags}
    assert known | left == set(CoderConfig.model_json_schema()["properties"]["activation"]["discriminator"]["mapping"])
