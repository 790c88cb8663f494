"""Seeds by name, and names fit for a folder."""

from __future__ import annotations

import pytest

from unmix.core.seeds import derive, slug


def test_every_label_counts() -> None:
    """Order and number of the labels too, and no two spellings run together."""
    seeds = [
        derive(0), derive(1), derive(0, "a"), derive(0, "b"), derive(0, "a", "b"), derive(0, "b", "a"), derive(0, "ab"),
        derive(0, 1), derive(0, 1, 1), derive(0, 11),
    ]  # fmt: skip
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_on_every_machine() -> None:
    """Runs resume elsewhere: this value never changes."""
    assert derive(7, "coder", "layers.3") == 1671631963865241237


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("layers.10", "layers.10"), ("blocks.6/hook@in#3", "blocks.6-hook-in-3"), ("a b", "a-b"), ("..", "coder"),
        ("", "coder"), ("../../etc/passwd", "etc-passwd"), (".hidden", "hidden"), ("é_1", "é_1"),
    ],
)  # fmt: skip
def test_slugs_are_safe_names(text: str, name: str) -> None:
    """No separators, nothing hidden, never empty."""
    assert slug(text) == name
