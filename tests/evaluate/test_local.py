"""Local metrics from activations that the caller has: the same as computed whole, targets where they are needed."""

from __future__ import annotations

import pytest
import torch

from unmix.coder.config import CoderConfig, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, CorruptError
from unmix.evaluate import Evaluation, evaluate_activations


def coder(writes: str = "a", d_out: int = 6) -> SparseCoder:
    config = CoderConfig(
        reads=("a",), writes=(writes,), d_in=6, d_out=d_out, n_latents=24, activation=TopK(k=3), pre_bias="none"
    )
    return SparseCoder(config, seed=1).eval()


def rows(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0)) + 1, torch.arange(n) // 8


def test_streamed_equals_whole():
    x, contexts = rows()
    it = coder()
    result = evaluate_activations(it, zip(x.split(7), contexts.split(7)))
    with torch.no_grad():
        e = (x - it(x).reconstruction).double()
    centred = x.double() - x.double().mean(0)
    assert result.value("fvu") == pytest.approx(float(e.square().sum() / centred.square().sum()))
    assert result.value("l0") == pytest.approx(float((it.encode(x).dense() != 0).sum(-1).double().mean()))
    assert result["fvu"]["low"] < result.value("fvu") < result["fvu"]["high"]
    assert result.settings["tokens_counted"] == 40
    assert result.histogram["tokens"] == 40


def test_targets_of_a_coder_that_writes_elsewhere():
    x, contexts = rows()
    it = coder("b", d_out=4)
    with pytest.raises(ConfigError) as caught:
        evaluate_activations(it, [(x, contexts)])
    assert str(caught.value) == "a writes b: give (x, target, contexts), not (x, contexts)"
    with torch.no_grad():
        target = it(x).reconstruction
    assert evaluate_activations(it, [(x, target, contexts)]).value("fvu") == 0.0


def test_files_that_are_not_evaluations(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text('{"schema": 7}')
    with pytest.raises(CorruptError, match="schema 7, this version reads 1"):
        Evaluation.load(path)
    path.write_text('{"schema": 1')
    with pytest.raises(CorruptError, match="not an evaluation"):
        Evaluation.load(path)
    with pytest.raises(CorruptError, match="not an evaluation"):
        Evaluation.load(tmp_path / "absent.json")
