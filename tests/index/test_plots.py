"""Plots of indexes that are hard to draw: every file must be XML."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from index.oracle import make_stream, write
from unmix.index.plots import write_plots


@pytest.mark.parametrize("name", ["a<b>&\"'", "e\x1b[31m\x00", "x\u202ey"])
def test_hostile_names_leave_a_plot_whole(tmp_path: Path, name: str) -> None:
    index = write(tmp_path / "i", make_stream(1, names=(name,)))
    shown = name if "<" in name else "".join(c if c.isprintable() else "\ufffd" for c in name)
    for path in write_plots(index, tmp_path / "plots"):
        tree = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert shown in [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_single_position_is_drawn(tmp_path: Path, density: float) -> None:
    stream = make_stream(7, n_contexts=1, context=1, n_latents=1, density=density)
    stream.mask[:] = True
    for path in write_plots(write(tmp_path / "i", stream), tmp_path / "plots"):
        assert ElementTree.fromstring(path.read_text(encoding="utf-8")) is not None
