"""A cross-layer transcoder from a run file: trained as one, resumed, measured as one, saved as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import unmix
from unmix.cli import main
from unmix.coder.coder_set import CoderSet
from unmix.core.errors import ConfigError
from unmix.run.config import load_run
from unmix.run.context import RunContext
from unmix.train.trainer import GroupTrainer

EXAMPLE = Path(__file__).parents[2] / "examples" / "cross-layer-transcoder.yaml"
OUT = [f"blocks.{i}.mlp_out" for i in range(3)]


def shrunk(model: Path, text: Path) -> dict[str, Any]:
    """The example on three layers of a tiny model."""
    tree = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    tree["model"] = {"name": str(model), "dtype": "float32"}
    tree["data"] |= {"source": str(text), "tokens": 12_000, "context": 32}
    for i, coder in enumerate(tree["coders"].values()):
        coder |= {"hook": f"blocks.{i}.mlp_in", "write": OUT[i:], "expansion": 1.5}
    tree["train"] |= {"tokens": 5000, "batch": 250, "init_rows": 500, "log_every": 1, "checkpoint_every": 5}
    tree["train"] |= {"epochs": 3, "lr": 5e-3, "held_out": 250, "held_out_every": 10}
    tree["evaluate"] = {"tokens": 256}
    return tree


@pytest.fixture(scope="module")
def place(tiny_model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clt") / "clt.yaml"
    path.write_text(yaml.safe_dump(shrunk(tiny_model_folder, text_folder), sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The run folder, evaluated."""
    out = place.parent / "run"
    assert main(["evaluate", str(place), "--out", str(out), "--quiet"]) == 0
    return out


def test_it_is_saved_as_one_set(trained: Path) -> None:
    """`load_all` gives a CoderSet; figures of the sums fall while it is trained."""
    coders = unmix.load_all(trained / "coders" / "clt")
    assert isinstance(coders, CoderSet)
    assert list(coders) == ["layer-8", "layer-9", "layer-10"]
    assert coders.reads == tuple(f"blocks.{i}.mlp_in" for i in range(3))
    assert list(coders.widths) == OUT
    assert [path.name for path in (trained / "coders").iterdir()] == ["clt"]
    lines = (trained / "training" / "layer-9" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 20
    assert "held_out/fvu" in records[-1]
    assert records[-1]["fvu"] < records[0]["fvu"]


def test_it_is_measured_as_one(trained: Path, tiny_model_folder: Path) -> None:
    """Local figures of the sums, and a splice in which each coder reads what those before it left: by plain hooks."""
    found = json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))
    assert [c["name"] for c in found["settings"]["coder"]["coders"]] == ["layer-8", "layer-9", "layer-10"]
    lm, coders = unmix.load_model(str(tiny_model_folder), dtype="float32"), unmix.load_all(trained / "coders" / "clt")
    shards = RunContext(load_run(str(trained)), trained, {}).shards
    ids = shards.contexts_of("evaluate")[:8]
    tokens, mask = torch.from_numpy(shards.tokens(ids)).long(), torch.from_numpy(shards.mask(ids))
    hooks = [*coders.reads, *OUT]
    bare = {name: x[mask].float() for name, x in lm.capture(tokens, hooks).items()}
    with torch.no_grad():
        codes = coders.encode(bare)
        sums = coders.decode(codes)
    wanted, got = torch.cat([bare[h] for h in OUT], -1).double(), torch.cat([sums[h] for h in OUT], -1).double()
    fvu = (wanted - got).square().sum() / (wanted - wanted.mean(0)).square().sum()
    metrics = {name: entry["value"] for name, entry in found["metrics"].items()}
    assert metrics["fvu"] == pytest.approx(float(fvu), rel=1e-5)
    assert metrics["l0"] == pytest.approx(sum(float(own.l0().double().mean()) for own in codes.values()), rel=1e-6)
    layers, read, handles = lm.model.model.layers, {}, []
    total = {hook: torch.zeros(()) for hook in OUT}

    def answer(i: int, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        coder = list(coders.values())[i]
        for hook, part in zip(OUT[i:], coder(read[i][mask]).reconstruction.split(32, -1), strict=True):
            total[hook] = total[hook] + part
        new = output.clone()
        new[mask] = total[OUT[i]]
        return new

    for i, layer in enumerate(layers):
        handles += [
            layer.mlp.register_forward_pre_hook(lambda m, args, i=i: read.__setitem__(i, args[0])),
            layer.mlp.register_forward_hook(lambda m, args, out, i=i: answer(i, m, args, out)),
        ]
    with torch.no_grad():
        logits = lm.model(input_ids=tokens).logits
    for handle in handles:
        handle.remove()
    ok = mask[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1][ok], tokens[:, 1:][ok])
    assert metrics["ce_spliced"] == pytest.approx(float(losses), rel=1e-5)
    assert metrics["ce_spliced"] != pytest.approx(metrics["ce_orig"], rel=1e-5)
    again = unmix.evaluate(coders, lm, shards, tokens=256)
    assert {name: again.value(name) for name in metrics} == metrics
    with pytest.raises(ConfigError, match="activations are of one coder's hook"):
        unmix.evaluate(coders, lm, shards, activations=())


def test_it_is_indexed_coder_by_coder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the capture's seconds stay in the table though its cache is gone."""
    assert main(["index", str(trained), "--quiet"]) == 0
    assert unmix.open_index(trained / "index")["layer-9"].n_latents == 48
    assert not (trained / "activations").exists()
    capsys.readouterr()
    assert main(["index", str(trained), "--quiet"]) == 0
    assert "activations  done before, " in capsys.readouterr().out


def test_a_sweep_of_a_set_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("over: {train.lr: [0.1]}", encoding="utf-8")
    assert main(["train", str(place), "--sweep", str(sweep)]) == 2
    assert "coder_set: members of a sweep are trained apart" in capsys.readouterr().err


def test_a_stopped_training_goes_on_to_the_same_bits(
    place: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind its second checkpoint."""
    inner, out = GroupTrainer.checkpoint, place.parent / "stopped"

    def stop(self: GroupTrainer) -> None:
        inner(self)
        if self.at == 10:
            raise KeyboardInterrupt

    words = ["train", str(place), "--out", str(out), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "checkpoint", stop)
        assert main(words) == 130
    assert not (out / "coders").exists()
    assert main(words) == 0
    straight, resumed = (unmix.load_all(run / "coders" / "clt") for run in (trained, out))
    assert [c.hash() for c in resumed.values()] == [c.hash() for c in straight.values()]


def test_the_example_fits_the_real_model() -> None:
    config = load_run(str(EXAMPLE))
    assert config.coder_set == "clt"
    assert [len(m.spec.writes) for m in config.members().values()] == [3, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coder_set": "a/b"}, r"coder_set: names the folder .* found 'a/b'"),
        ({"coder_set": "layer-9"}, "coder_set: 'layer-9' is the name of one of its coders too"),
        ({"coders": {"x": {"hook": "layers.1"}}}, r"coders\.x: reads what it writes; coders of a set write to other"),
        (
            {"train": {"objective": [{"term": "mse"}, {"term": "kl"}]}},
            r"coders\.layer-8: the term kl looks at the language model, and coders of a set are trained on rows",
        ),
    ],
)
def test_what_a_set_cannot_be(place: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tree = {**yaml.safe_load(place.read_text(encoding="utf-8")), **change}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_run(str(path))
