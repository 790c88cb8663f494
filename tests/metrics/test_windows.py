"""The notebook renderer: every token is text, whatever it holds."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from unmix.core.errors import ConfigError
from unmix.metrics.windows import shade, visible, window_html


class Reader(HTMLParser):
    """Tags, attributes and text as a browser would see them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = ["</div><script>alert(1)</script>", '<img src=x onerror="alert(1)">', "&amp;", '"', "'", "</span>"]


def test_hostile_tokens_are_text() -> None:
    found = Reader(window_html(HOSTILE, [1.0, 0.0, 2.0, 0.5, 0.0, -1.0], 2.0, marked=1))
    assert set(found.tags) == {"div", "span"}
    assert found.attributes <= {"style", "title"}
    assert found.text == "".join(HOSTILE)


def test_what_hides_is_shown() -> None:
    assert visible("a\n\tb") == "a↵⇥b"
    assert visible("\u202ex\u2028\ufeff\x00") == "‹U+202E›x‹U+2028›‹U+FEFF›‹U+0000›"
    assert visible("\ud800").encode() == "‹U+D800›".encode()
    assert visible("   indented") == "   indented"
    assert visible("é漢🙂") == "é漢🙂"


def test_colour_is_the_share_of_the_maximum() -> None:
    source = window_html(["a", "b", "c", "d"], [4.0, 2.0, 0.0, -4.0], 4.0)
    assert re.findall(r"rgba\(([\d,]+),([\d.]+)\)", source) == [
        ("245,158,11", "0.75"), ("245,158,11", "0.38"), ("59,130,246", "0.75"),
    ]  # fmt: skip
    assert re.findall(r'title="([^"]*)"', source) == ["4", "2", "-4"]


@pytest.mark.parametrize(
    ("value", "maximum", "expected"),
    [(8, 4, 0.75), (1, 0, 0.0), (1, -1, 0.0), (float("nan"), 1, 0.0), (1, float("inf"), 0.0), (-2, 4, 0.375)],
)
def test_shade_stays_in_range(value: float, maximum: float, expected: float) -> None:
    assert shade(value, maximum) == expected


def test_the_marked_token_is_underlined() -> None:
    source = window_html(["a", "b"], [0.0, 0.0], 1.0, marked=1)
    assert 'a<span style="text-decoration:underline;text-underline-offset:3px">b</span>' in source


def test_an_empty_window_is_an_empty_box() -> None:
    assert Reader(window_html([], [], 1.0)).text == ""


def test_lengths_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"^window: 2 tokens and 1 values, expected one value a token$"):
        window_html(["a", "b"], [1.0], 1.0)
    with pytest.raises(ConfigError, match=r"^window: marked token 2, allowed: 0 to 1$"):
        window_html(["a", "b"], [1.0, 1.0], 1.0, marked=2)
