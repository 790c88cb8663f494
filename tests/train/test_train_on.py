"""A coder on a hook of any module: what becomes a row, what is kept, what is refused, and the exact resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unmix
from unmix.core.errors import ConfigError, DataError, ModelError, NonFiniteError, ResumeError, UnmixError
from unmix.lm.load import load_model
from unmix.train.config import CoderSpec, OptimConfig
from unmix.train.module_rows import RowReader, at_rest
from unmix.train.row_store import collect
from unmix.train.trainer import GroupTrainer

from .toys import coder_config, planted

QUICK: dict[str, Any] = {"batch": 64, "epochs": 2, "init_rows": 64, "log_every": 2, "checkpoint_every": 3}
SPEC: dict[str, Any] = {"n_latents": 16, "k": 3}


class Perceptron(nn.Sequential):
    """8 → 12 → relu → 6."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))


def batches(n: int = 10, rows: int = 32, d: int = 8) -> list[Tensor]:
    return list(torch.randn(n * rows, d, generator=torch.Generator().manual_seed(2)).split(rows))


def train_one(module: nn.Module, loader: Any, **options: Any) -> unmix.SparseCoder:
    found = unmix.train_on(module, loader, **{"coder": SPEC, "train": QUICK, **options})
    assert isinstance(found, unmix.SparseCoder)
    return found


def rows_of(module: nn.Module, batch: Any, hook: str, **options: Any) -> Tensor:
    """Rows of one batch."""
    given = {"dim": None, "inputs": None, "mask": None, **options}
    return RowReader(load_model(module), (hook,), **given).rows(batch)[hook]


def test_a_coder_learns_the_dictionary_behind_a_hook() -> None:
    """Planted atoms, passed on by a layer that changes nothing, come back as decoder rows."""
    x, atoms = planted(1000, 8, 12, 2)
    module = nn.Sequential(nn.Identity(), nn.Linear(8, 3))
    coder = train_one(
        module, x.split(100), hook="0", coder={"n_latents": 24, "k": 2},
        train={"batch": 100, "epochs": 15, "lr": 2e-2, "dead_after": 500},
    )  # fmt: skip
    with torch.no_grad():
        residual = x - coder(x).reconstruction
    assert float(residual.square().sum() / (x - x.mean(0)).square().sum()) < 0.15
    nearest = (atoms @ coder.dictionary.detach().T).max(-1).values
    assert float((nearest > 0.9).float().mean()) > 0.7
    assert coder.config.reads == coder.config.writes == ("0@out",)
    assert coder.config.input_policy.skip_first == 0
    assert coder.config.model is not None
    assert coder.config.model.weights_hash is not None


def test_a_tuple_of_hooks_is_one_crosscoder(tmp_path: Path) -> None:
    """Read and written side by side, each standardised; beside other coders it has its hooks for a key."""
    module = Perceptron()
    coder = train_one(module, batches(), hook=("0", "2"))
    assert coder.config.reads == coder.config.writes == ("0@out", "2@out")
    assert (coder.config.d_in, coder.config.parts()) == (18, (12, 6))
    assert coder.config.normalise.kind == "standardise"
    x = torch.cat(batches())
    rows = torch.cat([module[0](x), module(x)], dim=-1).detach()
    torch.testing.assert_close(coder.norm_mean.detach(), rows.mean(0), rtol=0.5, atol=0.3)
    found = unmix.train_on(module, batches(), hook=["1", ("0", "2")], coder=SPEC, train=QUICK, folder=tmp_path / "f")
    assert isinstance(found, dict)
    assert list(found) == ["1", ("0", "2")]
    assert torch.equal(found["0", "2"].W_dec, coder.W_dec)
    again = unmix.train_on(module, batches(), hook=["1", ("0", "2")], coder=SPEC, train=QUICK, folder=tmp_path / "f")
    assert isinstance(again, dict)
    assert again["0", "2"].hash() == found["0", "2"].hash()


def test_several_hooks_may_be_read_for_one(tmp_path: Path) -> None:
    coder = train_one(Perceptron(), batches(), hook=("0", "1"), write="2")
    assert (coder.config.reads, coder.config.writes) == (("0@out", "1@out"), ("2@out",))
    assert (coder.config.d_in, coder.config.width_out) == (24, 6)
    with pytest.raises(ConfigError, match=r"coder\.hook is '0', but the call says \('0', '1'\)"):
        train_one(Perceptron(), batches(), hook=("0", "1"), coder={**SPEC, "hook": "0"})


@pytest.mark.parametrize("hook", ["1", "1@out", "2@in"])
def test_rows_are_what_flows_through_the_hook(hook: str) -> None:
    module, batch = Perceptron(), batches(1)[0]
    assert torch.equal(rows_of(module, batch, hook), torch.relu(module[0](batch)).detach())


def test_every_leading_dimension_is_rows() -> None:
    """[batch, pos, d] and a single vector; float64 becomes float32."""
    module = nn.Sequential(nn.Identity())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(rows_of(module, x, "0"), x.reshape(10, 8).float())
    assert rows_of(module, torch.randn(8), "0").shape == (1, 8)


def test_images_say_where_their_features_are() -> None:
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    images = torch.randn(4, 3, 6, 7)
    expected = module[0](images).detach()
    assert torch.equal(rows_of(module, images, "0", dim=1), expected.permute(0, 2, 3, 1).reshape(-1, 5))
    assert torch.equal(rows_of(module, images, "1", dim={"1": -1}), expected.relu().reshape(-1, 5))
    message = r"0@out: the activation is \[4, 5, 4, 5\]; say which dimension holds the features: dim=1 for channels fi"
    with pytest.raises(ConfigError, match=message):
        rows_of(module, images, "0")
    with pytest.raises(ConfigError, match=r"1@out: .* has no dimension 4$"):
        rows_of(module, images, "1", dim=4)
    with pytest.raises(ConfigError, match=r"dim names '7', which is not one of the hooks: 0"):
        rows_of(module, images, "0", dim={"7": 1})
    coder = train_one(module, [images] * 3, hook="0", dim=1)
    assert coder.config.d_in == 5


def test_batches_are_arguments() -> None:
    """A tensor, a tuple, a dict, or what `inputs` makes of anything; what does not fit is said at once."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner(a + 2 * b)

    a, b = torch.randn(4, 8), torch.randn(4, 8)
    for batch in [(a, b), [a, b], {"b": b, "a": a}]:
        assert torch.equal(rows_of(Sum(), batch, "inner"), a + 2 * b)
    labelled = {"pair": (a, b), "label": 3}
    assert torch.equal(rows_of(Sum(), labelled, "inner", inputs=lambda batch: batch["pair"]), a + 2 * b)
    message = r"Perceptron.forward does not take a batch of \(Tensor \[4, 8\], Tensor \[4, 8\]\): .*inputs=lambda batch"
    with pytest.raises(ConfigError, match=message):
        rows_of(Perceptron(), [a, b], "0")


def test_a_mask_leaves_rows_out() -> None:
    batch = {"input": torch.randn(2, 3, 8), "seen": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    module = nn.Sequential(nn.Identity())
    found = rows_of(module, batch, "0", inputs=lambda b: b["input"], mask=lambda b: b["seen"])
    assert torch.equal(found, batch["input"][batch["seen"].bool()])
    with pytest.raises(DataError, match=r"0@out: mask= gave 3 values for 6 rows \(batch 1\)"):
        rows_of(module, batch, "0", inputs=lambda b: b["input"], mask=lambda b: b["seen"][0])


def test_the_pass_ends_at_the_last_hook() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the pass went on")

    train_one(nn.Sequential(nn.Linear(8, 6), Never()), batches(), hook="0")


def test_the_module_is_left_as_it_was() -> None:
    """Dropout is off while rows are taken, running statistics stay, and the modes come back."""
    module = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Identity())
    module[1].eval()
    before = module[0].running_mean.clone()
    train_one(module, batches(), hook="2")
    assert torch.equal(module[0].running_mean, before)
    assert [part.training for part in module] == [True, False, True]
    with at_rest(module):
        assert not any(part.training for part in module.modules())


def test_several_hooks_and_transcoders() -> None:
    found = unmix.train_on(Perceptron(), batches(), hook=["0", "2"], coder=SPEC, train=QUICK)
    assert isinstance(found, dict)
    assert {hook: coder.config.d_in for hook, coder in found.items()} == {"0": 12, "2": 6}
    alone = train_one(Perceptron(), batches(), hook="2")
    assert torch.equal(found["2"].W_dec, alone.W_dec)
    coder = train_one(Perceptron(), batches(), hook="0@in", write="2", coder={**SPEC, "skip": True})
    assert (coder.config.reads, coder.config.writes) == (("0@in",), ("2@out",))
    assert (coder.config.d_in, coder.config.d_out) == (8, 6)


def test_coders_in_every_form() -> None:
    """A mapping, a spec and a finished config train the same coder."""
    optim = OptimConfig(**QUICK)
    first = train_one(Perceptron(), batches(), hook="1")
    spec = CoderSpec(hook="1", **SPEC)
    assert train_one(Perceptron(), batches(), hook="1", coder=spec, train=optim).hash() == first.hash()
    config = coder_config("topk", d=12, n=16)
    assert torch.equal(train_one(Perceptron(), batches(), hook="1", coder=config).W_enc, first.W_enc)
    assert not torch.equal(train_one(Perceptron(), batches(), hook="1", seed=5).W_enc, first.W_enc)


@pytest.mark.parametrize("tokens", [500, "1k"])
def test_tokens_read_the_loader_again(tmp_path: Path, tokens: int | str) -> None:
    coder = train_one(Perceptron(), batches(), hook="1", tokens=tokens, folder=tmp_path)
    assert coder.training is False
    assert coder.config.training["rows"] == (500 if tokens == 500 else 1000)


def test_the_budget_ends_the_collection(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "unmix"):
        coder = train_one(Perceptron(), batches(), hook="1", budget=12 * 4 * 100, train={**QUICK, "batch": 32})
    assert coder.config.training["rows"] == 96
    assert "96 rows fill the budget" in caplog.text
    with pytest.raises(ConfigError, match=r"one batch's rows take 1,536 bytes, more than the budget of 100"):
        train_one(Perceptron(), batches(), hook="1", budget=100)


def test_rows_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    """In the module's own dtype, and the same coder comes of them."""
    module = Perceptron().to(torch.bfloat16)
    loader = [batch.to(torch.bfloat16) for batch in batches()]
    stores = [
        collect(RowReader(load_model(module), ("1",), None, None, None), loader, [("1", "1")], None, 2**30, folder, "k")
        for folder in (None, tmp_path / "rows")
    ]
    assert stores[1].rows["1"].dtype == torch.bfloat16
    assert torch.equal(stores[0].rows["1"], stores[1].rows["1"])
    plain = train_one(Perceptron(), batches(), hook="1")
    assert train_one(Perceptron(), batches(), hook="1", folder=tmp_path / "run").hash() == plain.hash()


def dies_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer is interrupted in this step of the process."""
    inner, seen = GroupTrainer.group_step, [0]

    def counted(self: GroupTrainer) -> Any:
        seen[0] += 1
        if seen[0] == step:
            raise KeyboardInterrupt
        return inner(self)

    monkeypatch.setattr(GroupTrainer, "group_step", counted)


@pytest.mark.parametrize("step", [1, 5, 9])
def test_interrupted_and_called_again_is_bit_identical(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are not taken again: a loader that shuffles would give others."""
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.cat(batches()))

    def call(folder: Path, loader: Any) -> dict[str, unmix.SparseCoder]:
        found = unmix.train_on(
            Perceptron(), loader, hook=["0", "1"], coder=SPEC, train=QUICK, folder=folder, inputs=lambda batch: batch[0]
        )
        assert isinstance(found, dict)
        return found

    straight = call(tmp_path / "a", torch.utils.data.DataLoader(data, 32))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(step, patch)
        call(tmp_path / "b", torch.utils.data.DataLoader(data, 32))
    again = call(tmp_path / "b", torch.utils.data.DataLoader(data, 32, shuffle=True, generator=generator))
    assert {name: coder.hash() for name, coder in again.items()} == {n: c.hash() for n, c in straight.items()}
    for name in ("0", "1"):
        log = f"training/{name}/metrics.jsonl"
        assert (tmp_path / "b" / log).read_bytes() == (tmp_path / "a" / log).read_bytes()
    assert not (tmp_path / "b" / "training" / "checkpoint").exists()


class Broken:
    """A loader that must not be read."""

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("the loader was read")


def test_what_is_done_is_given_back(tmp_path: Path) -> None:
    class Sized(Broken):
        def __len__(self) -> int:
            return 10

    first = train_one(Perceptron(), batches(), hook="1", folder=tmp_path)
    again = train_one(Perceptron(), Sized(), hook="1", folder=tmp_path)
    assert again.hash() == first.hash() == unmix.load(tmp_path / "coders" / "1").hash()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"coder": {**SPEC, "k": 4}}, "coder.1.k: 3 → 4"),
        ({"train": {**QUICK, "lr": 1e-3}}, "train.lr: 0.0008 → 0.001"),
        ({"loader": batches(9)}, "batches: 10 → 9"),
        ({"hook": "0"}, "hooks.0: None → "),
        ({"module": nn.Sequential(nn.Linear(8, 12), nn.Identity())}, "module.family: 'Perceptron' → 'Sequential'"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    train_one(Perceptron(), batches(), hook="1", folder=tmp_path)
    with pytest.raises(ResumeError, match="was made with other settings") as error:
        train_one(**{"module": Perceptron(), "loader": batches(), "hook": "1", "folder": tmp_path, **changes})
    assert said in str(error.value)
    # What only decides how often something is written may change.
    train_one(Perceptron(), batches(), hook="1", folder=tmp_path, train={**QUICK, "log_every": 7})


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ResumeError, match=r"holds 'thesis.tex' and no train_on.json, so it is not ours"):
        train_one(Perceptron(), batches(), hook="1", folder=tmp_path)


def changing() -> list[Tensor]:
    """Batches that a module without weights takes, of two widths."""
    return [torch.randn(64, 8), torch.randn(64, 6)]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"hook": "3"}, ModelError, r"unknown hook '3'. Hooks look like .*2@out"),
        ({"hook": "o"}, ModelError, r"unknown hook 'o'"),
        ({"loader": []}, DataError, r"^the loader gave no batch$"),
        ({"loader": iter([])}, DataError, r"gave no batch; it is an iterator, which gives its batches once: give a li"),
        ({"loader": iter(batches()), "tokens": 400}, DataError, r"ended after 320 of the 400 rows asked for and is an"),
        ({"loader": torch.randn(9, 8)}, ConfigError, r"the loader is one tensor; give batches of it, e.g. inputs.spli"),
        ({"module": nn.Sequential(nn.Identity()), "loader": changing(), "hook": "0"}, DataError,
         r"0@out: 6 wide in batch 2, 8 before \(activation \[64, 6\], features in dimension -1\)"),
        ({"loader": [torch.full((64, 8), float("nan"))]}, NonFiniteError, r"1@out: NaN or infinity in batch 1"),
        ({"module": nn.Sequential(nn.Identity()), "loader": [torch.ones(4, 8, dtype=torch.int64)], "hook": "0"},
         DataError, r"0@out: holds torch.int64, and a coder needs floating-point activations"),
        ({"loader": batches(1)}, ConfigError, r"gave 32 rows, fewer than one batch of 64: give more inputs"),
        ({"coder": {"n_latents": 16, "kk": 3}}, ConfigError, r"coder: unknown field 'kk'. Did you mean 'k'"),
        ({"coder": {"hook": "2", **SPEC}}, ConfigError, r"coder.hook is '2', but the call says '1'"),
        ({"coder": coder_config("topk", d=8)}, ConfigError, r"coder: d_in 8 and d_out 8, but 1 is 12 wide and 1 12"),
        ({"train": {"batchs": 3}}, ConfigError, r"train: unknown field 'batchs'. Did you mean 'batch'"),
        ({"hook": ["0", "0"]}, ConfigError, r"each hook once; found 2 \(0, 0\)"),
        ({"hook": []}, ConfigError, r"hook and write must name as many places"),
        ({"hook": ["0", "1"], "write": ["2"]}, ConfigError, r"found 2 \(0, 1\) and 1"),
        ({"tokens": "many"}, ConfigError, r"tokens is 'many'; expected a number of rows such as 10_000 or '1M'"),
        ({"device": "cuda:77x"}, ModelError, r"device 'cuda:77x'"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(options: dict[str, Any], kind: type[UnmixError], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        train_one(**{"module": Perceptron(), "loader": batches(), "hook": "1", "folder": tmp_path / "f", **options})
    assert not (tmp_path / "f" / "coders").exists()


def test_rows_of_one_coder_must_go_together() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.part = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.whole(x)[::2])

    with pytest.raises(DataError, match=r"whole gives 32 rows a batch and part 16: a coder needs as many of one"):
        train_one(Halves(), batches(), hook="whole", write="part")


def test_a_language_model_is_a_module_too(tmp_path: Path) -> None:
    """Canonical hook names and keyword inputs work there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)).eval()
    ids = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    coder = train_one(model, [{"input_ids": ids}] * 3, hook="layers.0", folder=tmp_path)
    assert coder.config.reads == ("blocks.0.resid_post",)
    with unmix.load_model(model).bind(coder) as bound:
        assert bound(ids).logits.shape == (4, 16, 50)
    note = json.loads((tmp_path / "train_on.json").read_text(encoding="utf-8"))
    assert note["module"]["family"] == "gpt2"
