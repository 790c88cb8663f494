"""Metrics in their order, with their words, whatever evaluation gives."""

from __future__ import annotations

from unmix.viewer.glossary import TERMS, metrics_of
from viewer.makebelieve import EVALUATION


def test_every_metric_of_an_evaluation_is_shown_with_its_words() -> None:
    found = metrics_of(EVALUATION)
    assert [metric["key"] for metric in found] == [term.key for term in TERMS]
    assert all(metric["help"].endswith(".") and len(metric["help"]) > 30 for metric in found)
    fvu = found[0]
    assert (fvu["value"], fvu["low"], fvu["high"]) == (0.1873, 0.1831, 0.1921)


def test_numbers_mappings_and_nothing() -> None:
    found = {
        m["key"]: m for m in metrics_of({"fvu": 0.25, "ce_recovered": None, "tokens": 1234567, "l0": {"value": 3.0}})
    }
    assert found["fvu"]["value"] == 0.25
    assert found["fvu"]["low"] is None
    assert found["ce_recovered"]["value"] is None
    assert found["tokens"]["value"] == 1234567
    assert found["l0"]["high"] is None
    assert set(found) == {"fvu", "ce_recovered", "tokens", "l0"}


def test_other_names_of_the_ablation_are_known() -> None:
    for key in ("ce_ablated", "ce_ablated_zero", "ce_zero_ablated"):
        assert [(m["key"], m["value"]) for m in metrics_of({key: 9.0})] == [("ce_ablated", 9.0)]


def test_an_empty_evaluation_shows_nothing() -> None:
    assert metrics_of({"mask": "skip_first 1", "unknown": 3}) == []
