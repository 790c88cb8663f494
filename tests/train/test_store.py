"""Activations of contexts: live and cached stores give the same rows, a killed capture goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unmix.core.errors import CorruptError, DataError, ResumeError
from unmix.core.manifest import MANIFEST, verify_folder
from unmix.core.seeds import slug
from unmix.data.config import DataConfig
from unmix.data.shards import ROLES, TokenShards
from unmix.data.tokenise import tokenise
from unmix.lm.model import LanguageModel
from unmix.train import rows as rows_module
from unmix.train import store as store_module
from unmix.train.rows import RowSource
from unmix.train.store import CachedStore, LiveStore, permuted, write_cache

HOOKS = ("layers.0", "layers.1")
CONTEXT = 16


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 contexts, blocks of 800 rows: some nine chunks a block, as in a run with short contexts."""
    for module in (store_module, rows_module):
        monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(rows_module, "BLOCK", 800)


@pytest.fixture(scope="module")
def shards(tiny_tokenizer_folder: Path, prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """Some hundred contexts of the interpreter's manual, separators masked."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("shards")
    (folder / "text").mkdir()
    for i, text in enumerate(prose):
        (folder / "text" / f"{i}.txt").write_text(text, encoding="utf-8")
    config = DataConfig(source=str(folder / "text"), tokens=3000, context=CONTEXT)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_folder)
    return tokenise(config, tokenizer, folder / "shards", progress=False)


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """A random Llama of two layers, width 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=512, max_position_embeddings=64, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False), "tiny-llama")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """In float32."""
    return make_model()


def live(lm: LanguageModel, shards: TokenShards, hooks: tuple[str, ...] = HOOKS, seed: int = 0) -> LiveStore:
    """A store over every context but those held out."""
    held = shards.roles != ROLES.index("evaluate")
    names = tuple(lm.hook(hook).name for hook in hooks)
    return LiveStore(lm, shards, permuted(np.flatnonzero(held), seed), names, batch=3)


def batches(source: RowSource, n: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """The first n steps."""
    return [source.batch(step, size) for step in range(n)]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))


def test_contexts_are_permuted() -> None:
    """Each once, by seed; none is none."""
    ids = np.array([5, 9, 2, 7, 11, 3])
    assert sorted(permuted(ids, 0)) == sorted(ids)
    assert permuted(ids, 0).tolist() == permuted(ids, 0).tolist() != permuted(ids, 1).tolist()
    assert permuted(ids[:0], 0).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_and_cached_rows_are_the_same(shards: TokenShards, tmp_path: Path, dtype: torch.dtype) -> None:
    """For input and target, over more than an epoch, in the model's own dtype on the disk."""
    model = make_model(dtype)
    store = live(model, shards)
    cached = write_cache(store, tmp_path / "cache")
    assert verify_folder(tmp_path / "cache") == []
    assert cached.hash == store.hash
    assert cached.n_chunks == store.n_chunks
    read, write = store.hooks
    one, other = (RowSource(s, shards, read, write, seed=3) for s in (store, cached))
    steps = 2 * one.n_rows // 64 + 1
    assert same(batches(one, steps), batches(other, steps))
    assert one.hash == other.hash
    x, target = other.batch(0, 64)
    assert x.dtype == target.dtype == torch.float32
    assert not torch.equal(x, target)
    assert cached.chunk(0)[read].dtype == dtype
    size = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.bin"))
    assert size == 2 * len(store.contexts) * CONTEXT * 8 * (4 if dtype == torch.float32 else 2)


def test_an_epoch_holds_every_unmasked_training_position_once(lm: LanguageModel, shards: TokenShards) -> None:
    """No other role, no masked position, no row twice; each row is what the model says there."""
    store = live(lm, shards)
    source = RowSource(store, shards, store.hooks[1], store.hooks[1], seed=0)
    ids = shards.contexts_of("train")
    expected = _activations(lm, shards, ids, store.hooks[1])[torch.from_numpy(shards.mask(ids))]
    assert source.n_rows == len(expected) == int(shards.mask(ids).sum())
    x = torch.cat([source.batch(step, source.n_rows // 4)[0] for step in range(4)])
    missing = source.n_rows - len(x)
    x = torch.cat([x, source.batch(0, source.n_rows)[0][len(x) :]]) if missing else x
    assert x.shape == expected.shape
    torch.testing.assert_close(_sorted(x), _sorted(expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(x, expected)


def _activations(lm: LanguageModel, shards: TokenShards, ids: np.ndarray, hook: str) -> Tensor:
    tokens = torch.from_numpy(shards.tokens(ids).astype(np.int64))
    return lm.capture(tokens, [hook], shards.policy)[hook].float()


def _sorted(x: Tensor) -> Tensor:
    return x[x[:, 0].sort().indices]


def test_input_and_target_are_of_one_position(lm: LanguageModel, shards: TokenShards) -> None:
    """Row i of both comes from the same token."""
    store = live(lm, shards)
    read, write = store.hooks
    ids = shards.contexts_of("train")
    mask = torch.from_numpy(shards.mask(ids))
    inputs, targets = (_activations(lm, shards, ids, hook)[mask] for hook in (read, write))
    x, target = RowSource(store, shards, read, write, seed=0).batch(1, 200)
    distance = torch.cdist(x, inputs)
    assert float(distance.min(1).values.max()) < 1e-4
    torch.testing.assert_close(target, targets[distance.argmin(1)], rtol=1e-3, atol=1e-4)


def test_a_batch_is_a_function_of_its_step(lm: LanguageModel, shards: TokenShards) -> None:
    """No history: steps may be asked for in any order, by another process."""
    store = live(lm, shards)
    forward = RowSource(store, shards, store.hooks[0], store.hooks[0], seed=1)
    straight = batches(forward, 6)
    later = RowSource(store, shards, store.hooks[0], store.hooks[0], seed=1)
    assert same([later.batch(5, 64), later.batch(2, 64)], [straight[5], straight[2]])
    other = RowSource(store, shards, store.hooks[0], store.hooks[0], seed=2)
    assert not same(batches(other, 6), straight)
    x, target = forward.batch(0, 64)
    assert x is target


def test_no_chunk_is_made_more_often_than_its_blocks_need(
    lm: LanguageModel, shards: TokenShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of many small chunks must not throw out the chunks that it will ask for again: each costs a pass."""
    store = live(lm, shards)
    made: list[int] = []
    chunk = store.chunk
    monkeypatch.setattr(store, "chunk", lambda i: made.append(i) or chunk(i))
    source = RowSource(store, shards, store.hooks[0], store.hooks[0], seed=0)
    batches(source, source.n_rows // 16, size=16)
    assert set(made) == set(range(store.n_chunks))
    assert len(made) <= 2 * store.n_chunks


def test_a_role_without_a_position_is_an_error(lm: LanguageModel, shards: TokenShards) -> None:
    """Told before training."""
    store = live(lm, shards)
    with pytest.raises(DataError, match=r"^no unmasked position has the role 'evaluate': take more text"):
        RowSource(store, shards, store.hooks[0], store.hooks[0], seed=0, role="evaluate")


class _KilledError(BaseException):
    """Stands for SIGKILL: no `except Exception` sees it."""


def test_a_killed_capture_goes_on(
    lm: LanguageModel, shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole chunks are kept, the one being written is made again, what was half written is gone."""
    straight = write_cache(live(lm, shards), tmp_path / "straight")
    store = live(lm, shards)
    chunk, made = store.chunk, []

    def dying(i: int) -> dict[str, Tensor]:
        made.append(i)
        if len(made) == 4:
            raise _KilledError
        return chunk(i)

    monkeypatch.setattr(store, "chunk", dying)
    folder = tmp_path / "cache"
    with pytest.raises(_KilledError):
        write_cache(store, folder)
    assert not (folder / MANIFEST).exists()
    (folder / slug(store.hooks[1]) / ".00003.bin.abc123.tmp").write_bytes(b"half")
    cached = write_cache(store, folder)
    assert made == [0, 1, 2, 3, *range(3, store.n_chunks)]
    assert list(folder.rglob(".*")) == []
    for i in range(cached.n_chunks):
        assert all(torch.equal(cached.chunk(i)[hook], straight.chunk(i)[hook]) for hook in cached.hooks)
    listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    assert len(listed) == 2 * cached.n_chunks + 2


def test_a_whole_cache_is_not_made_again(
    lm: LanguageModel, shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the model asked."""
    write_cache(live(lm, shards), tmp_path / "cache")
    store = live(lm, shards)
    monkeypatch.setattr(store, "chunk", lambda i: pytest.fail("the model ran"))
    assert write_cache(store, tmp_path / "cache").hash == store.hash


@pytest.mark.parametrize("whole", [True, False])
def test_activations_of_something_else_are_refused(
    lm: LanguageModel, shards: TokenShards, tmp_path: Path, whole: bool
) -> None:
    """Another hook, order or model; whether or not the capture was finished."""
    folder = tmp_path / "cache"
    write_cache(live(lm, shards), folder)
    if not whole:
        (folder / MANIFEST).unlink()
    others = [live(lm, shards, HOOKS[:1]), live(lm, shards, seed=1), live(make_model(seed=1), shards)]
    for other in [*others, live(make_model(torch.bfloat16), shards)]:
        with pytest.raises(ResumeError, match=r"cache: holds activations of another model, text or hook \(key \w+,"):
            write_cache(other, folder)
    assert write_cache(live(lm, shards), folder).n_chunks > 1


def test_a_truncated_chunk_is_named(lm: LanguageModel, shards: TokenShards, tmp_path: Path) -> None:
    """When the cache is opened, before anything is trained on it."""
    folder = tmp_path / "cache"
    write_cache(live(lm, shards), folder)
    victim = sorted(folder.rglob("*.bin"))[2]
    victim.write_bytes(victim.read_bytes()[:-2])
    with pytest.raises(CorruptError, match=rf"corrupt activations folder: {victim}: found \d+ bytes, expected"):
        CachedStore(folder)
    victim.unlink()
    with pytest.raises(CorruptError, match="found no file"):
        CachedStore(folder)


def test_writing_into_a_chunk_does_not_touch_the_disk(lm: LanguageModel, shards: TokenShards, tmp_path: Path) -> None:
    """The map is copy-on-write, also on files that may not be written."""
    folder = tmp_path / "cache"
    cached = write_cache(live(lm, shards), folder)
    for file in folder.rglob("*.bin"):
        file.chmod(0o444)
    before = cached.chunk(0)[cached.hooks[0]].clone()
    cached.chunk(0)[cached.hooks[0]].zero_()
    assert torch.equal(CachedStore(folder).chunk(0)[cached.hooks[0]], before)
    assert verify_folder(folder) == []


def test_a_cache_trains_as_the_model_does(lm: LanguageModel, shards: TokenShards, tmp_path: Path) -> None:
    """The same weights from both stores."""
    from unmix.train.config import OptimConfig
    from unmix.train.trainer import Trainer

    from .toys import coder_config

    store = live(lm, shards)
    optim = OptimConfig(batch=64, tokens=640, init_rows=128)
    found: list[Any] = []
    for name, source in (("live", store), ("cached", write_cache(store, tmp_path / "cache"))):
        rows = RowSource(source, shards, store.hooks[1], store.hooks[1], seed=0)
        found.append(Trainer(coder_config(), rows, optim, tmp_path / name, "key").run().hash())
    assert found[0] == found[1]


def test_the_count_of_a_capture_ends_at_its_total(
    lm: LanguageModel, shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last chunk is seldom full."""
    from contextlib import contextmanager

    from unmix.core.progress import Task

    counts: list[Task] = []

    @contextmanager
    def task(name: str, total: float, unit: str = "tokens", done: float = 0) -> Any:
        counts.append(Task(name, total, unit, done))
        yield counts[-1]

    monkeypatch.setattr(store_module, "task", task)
    live = LiveStore(lm, shards, np.arange(20), HOOKS[:1], batch=3)
    write_cache(live, tmp_path / "cache")
    assert counts[0].done == counts[0].total == len(live.contexts) * CONTEXT
