"""An lm-train file is validated whole before anything is made."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmix.core.config import build
from unmix.core.errors import ConfigError
from unmix.train.language.config import LanguageConfig, ShapeConfig, load_language_config
from unmix.train.language.trainer import lr_share, total_steps


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"width": 30, "heads": 4}}, r"model: width = 30 cannot be cut into 4 heads"),
        ({"model": {"family": "llama", "width": 36, "heads": 12}}, r"llama's heads need an even width, found 36 / 12"),
        ({"model": {"kv_heads": 2}}, r"kv_heads belongs to llama; family is 'gpt2'"),
        ({"model": {"family": "llama", "heads": 4, "kv_heads": 3}}, r"heads = 4 cannot share kv_heads = 3"),
        ({"model": {"context": 64}}, r"data.context = 128 is longer than model.context = 64"),
        ({"model": {"family": "gpt3"}}, r"model.family: Input should be 'gpt2' or 'llama'"),
        ({"model": {"layer": 2}}, r"unknown field 'model.layer'. Did you mean 'layers'"),
        ({"train": {"batch": 100}}, r"train.batch = 100 tokens hold no context of 128"),
        ({"train": {"accumulate": 3}}, r"a step's 32 contexts cannot be cut into accumulate = 3 parts"),
        ({"train": {"steps": 3, "tokens": "1M"}}, r"steps and tokens say how long to train; give one of them"),
        ({"data": {"roles": {"train": 1.0}}}, r"data: roles needs a share for 'evaluate', found {'train': 1.0}"),
        ({"tokenizer": {"vocab_size": 256}}, r"tokenizer.vocab_size: Input should be greater than 256"),
    ],
)
def test_mistakes_are_named(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(LanguageConfig, tree, source="x")


def test_where_a_config_comes_from(tmp_path: Path) -> None:
    """A file, with overrides and a folder named after it; a folder that lm-train made goes on in itself."""
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"model": {"layers": 3}}), encoding="utf-8")
    config = load_language_config(str(path), {"model.width": "64", "data.tokens": "1M"})
    assert (config.model.layers, config.model.width, config.data.tokens) == (3, 64, 1_000_000)
    assert config.out == Path("runs") / "own"
    with pytest.raises(ConfigError, match=r"is a folder without lm-train.yaml, so lm-train did not make it"):
        load_language_config(str(tmp_path))
    (tmp_path / "lm-train.yaml").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    assert load_language_config(str(tmp_path)).out == tmp_path


def test_the_length_of_a_training() -> None:
    """Steps, tokens or epochs; one pass where nothing is said."""

    def steps(**train: Any) -> int:
        return total_steps(build(LanguageConfig, {"train": {"batch": 1024, **train}}, source="x"), contexts=800)

    assert steps() == 100
    assert steps(epochs=2.5) == 250
    assert steps(tokens="1k") == 1
    assert steps(tokens=10_240) == 10
    assert steps(steps=7) == 7


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [lr_share(step, 100, 0.1, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert shares[10] == 1.0
    assert shares[55] == pytest.approx(0.55)
    assert 0.1 < shares[99] < 0.102
    assert all(one >= other for one, other in pairwise(shares[10:]))
    assert lr_share(0, 1, 0.0, 0.1) == 1.0


def test_the_width_inside() -> None:
    assert ShapeConfig(width=192, heads=6).inner == 768
    assert ShapeConfig(family="llama", width=192, heads=6).inner == 512
    assert ShapeConfig(family="llama", width=64, heads=2).inner == 192
    assert ShapeConfig(width=64, mlp=100).inner == 100
