"""Every Python block of docs/intervening.md runs, on small stand-ins for what it names; its tables name real things."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import unmix
from test_coming_from import internet, models
from unmix.lm import Intervention

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "intervening.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)

__all__ = ["internet", "models"]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_run(block: str, internet: list[str], models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[tuple[Any, ...]] = []
    names: dict[str, Any] = {"print": lambda *values: printed.append(values)}
    exec(compile(block, "docs/intervening.md", "exec"), names)
    assert set(models) <= {"gpt2"}
    if "raw" in names:
        assert torch.equal(names["raw"], names["out"].logits), "a kept error leaves logits alone"
        assert isinstance(names["text"], str)
    if "codes" in names:
        assert list(names["codes"]) == ["stream", "mlp"]
    if printed:
        assert names["found"].kl == pytest.approx(0.01, rel=0.01)


def test_what_the_table_of_interventions_says_can_be_made() -> None:
    rows = re.findall(r"^\| `((?:Set|Add|Multiply|Ablate|Clamp|Steer)\(.*?\))` \|", TEXT, flags=re.MULTILINE)
    assert len(rows) == 8
    known = {"vector": [1.0], "scale": 2.0, **{name: getattr(unmix, name) for name in unmix.__all__}}
    made = [eval(row, known) for row in rows]
    assert all(isinstance(act, Intervention) for act in made)
    assert {type(act).__name__ for act in made} == {"Set", "Add", "Multiply", "Ablate", "Clamp", "Steer"}


def test_options_that_the_page_names_exist() -> None:
    from inspect import signature

    from unmix.lm import LanguageModel
    from unmix.lm.generate import generate

    for name in re.findall(r"`(\w+)`", TEXT.split("Options:")[1].split("##")[0].split("The model's cache")[0]):
        assert name in signature(generate).parameters, name
    bind = signature(LanguageModel.bind).parameters
    for call in re.findall(r"lm\.bind\(([^)]*)\)?", TEXT):
        assert set(re.findall(r"(\w+)=", re.sub(r"\([^)]*", "", call))) <= set(bind), call
