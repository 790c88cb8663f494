"""Plots: what is drawn for points of several kinds, and which numbers stand at the axes."""

from __future__ import annotations

import math
from xml.etree import ElementTree

from unmix.core.plot import Panel, Series, _Axis, draw

SVG = "{http://www.w3.org/2000/svg}"


def test_marks_lines_and_a_note() -> None:
    """Discs, rings and crosses by point, the mark of a point that is no number left out with it; one line behind."""
    points = [(1.0, 2.0), (math.nan, 1.0), (2.0, 3.0), (3.0, 1.0)]
    series = Series("a & b", points, labels=list("wxyz"), marks=(0, 1, 1, 2), through=[(1, 2), (3, 1)])
    root = ElementTree.fromstring(draw([Panel("t", "L0", "FVU", [series])], "title", "disc: seed 0, ring: seed 1"))
    marks = [mark for kind in ("circle", "path") for mark in root.iter(f"{SVG}{kind}")]
    marked = {title: mark for mark in marks if (title := mark.findtext(f"{SVG}title"))}
    assert sorted(marked) == ["w", "y", "z"]
    assert marked["w"].get("fill") == "#0072b2"
    assert (marked["y"].get("fill"), marked["y"].get("stroke")) == ("none", "#0072b2")
    assert marked["z"].tag == f"{SVG}path"
    assert len(list(root.iter(f"{SVG}polyline"))) == 1
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"L0", "FVU", "a & b", "disc: seed 0, ring: seed 1"} <= set(texts)


def test_an_axis_has_several_numbers() -> None:
    """A logarithmic one of less than a decade takes more than 1, 2 and 5."""
    assert _Axis([15, 70], 0, 100, True).ticks() == [20, 30, 50, 70]
    assert _Axis([2, 900], 0, 100, True).ticks() == [2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert _Axis([0.0, 1.0], 0, 100, False).ticks() == [0.0, 0.5, 1.0]


def test_no_points_are_said() -> None:
    assert "no figures" in draw([Panel("t", "x", "y", [Series("a", [])])], "title")
