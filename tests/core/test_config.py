"""Configs: counts, overrides, messages, and the hash that sees meaning only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from unmix.core.config import (
    Config,
    Count,
    apply_overrides,
    build,
    load_config,
    operational,
    parse_count,
    parse_overrides,
    read_yaml,
    semantic_dict,
    semantic_hash,
)
from unmix.core.errors import ConfigError


class Square(Config):
    kind: Literal["square"] = "square"
    side: int = 1


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Inner(Config):
    steps: Count = 10
    lr: float = 1e-3
    workers: int = operational(1)


class Outer(Config):
    name: str = "x"
    inner: Inner = Inner()
    shape: Annotated[Square | Circle, Field(discriminator="kind")] = Square()
    many: tuple[Inner, ...] = ()
    path: Path | None = operational(None)
    needed: int


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("10M", 10_000_000), ("450k", 450_000), ("1e6", 1_000_000), ("2E3", 2000), ("1.5K", 1500), ("2b", 2 * 10**9),
        ("3G", 3 * 10**9), ("1_000", 1000), ("1,024", 1024), (" 7 ", 7), (5.0, 5), (6, 6), ("0.7M", 700_000),
        ("4.1B", 4_100_000_000), ("2.3M", 2_300_000), ("1.1k", 1100), ("3.", 3),
    ],
)  # fmt: skip
def test_counts_may_be_written_short(written: object, meant: int) -> None:
    """10M, 450k, 1e6 and friends."""
    found = parse_count(written)
    assert found == meant
    assert type(found) is int


@pytest.mark.parametrize("written", ["1.5", "ten", "10T", "-1M", "", "1.00005k", "1e999", "1..5k"])
def test_a_count_that_is_no_whole_number_is_refused(written: str) -> None:
    """Half a token does not exist."""
    with pytest.raises(ConfigError, match=r"^config: steps: Input should be a valid integer"):
        build(Inner, {"steps": written})


@pytest.mark.parametrize(("letter", "scale"), [("k", 10**3), ("M", 10**6), ("B", 10**9), ("g", 10**9)])
@pytest.mark.parametrize("places", [1, 2, 3])
def test_a_count_with_a_point_is_exact(letter: str, scale: int, places: int) -> None:
    """Floating point would lose a token of 4.1B."""
    for digits in range(1, 2000):
        whole, rest = divmod(digits, 10**places)
        found = parse_count(f"{whole}.{rest:0{places}d}{letter}")
        assert found == digits * scale // 10**places
        assert type(found) is int


def test_overrides_are_parsed_in_both_spellings() -> None:
    """`--a.b 1` and `--a.b=1`; dashes inside names are underscores; values may be negative or hold equals signs."""
    words = ["--inner.steps", "64", "--inner.lr=1e-3", "--dead-after", "-5", "--name=a=b", "--empty="]
    assert parse_overrides(words) == {
        "inner.steps": "64", "inner.lr": "1e-3", "dead_after": "-5", "name": "a=b", "empty": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inner.steps", "3"], r"^unexpected argument 'inner.steps'; overrides look like --coder.k 64$"),
        (["--"], r"^unexpected argument '--'"),
        (["--inner.steps"], r"^--inner.steps needs a value$"),
        (["--inner.steps", "--name", "x"], r"^--inner.steps needs a value$"),
    ],
)
def test_broken_overrides_say_what_is_wrong(words: list[str], message: str) -> None:
    """Before anything else is looked at."""
    with pytest.raises(ConfigError, match=message):
        parse_overrides(words)


def test_overrides_set_nested_fields_and_leave_the_tree_alone() -> None:
    """Groups that are absent or null are made; the caller's tree stays as it was."""
    tree: dict[str, Any] = {"needed": 1, "inner": {"lr": 0.5}, "shape": None}
    changed = apply_overrides(tree, {"inner.steps": "10M", "shape.kind": "circle", "many": "[{steps: 1k}]"})
    config = build(Outer, changed)
    assert (config.inner.steps, config.inner.lr) == (10_000_000, 0.5)
    assert config.shape == Circle()
    assert config.many == (Inner(steps=1000),)
    assert tree == {"needed": 1, "inner": {"lr": 0.5}, "shape": None}


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("5", 5.0), ("1e3", 1e3)])
def test_numbers_without_a_dot_are_numbers(text: str, value: float) -> None:
    """YAML 1.1 reads `1e-3` as a string; the config still gets a number."""
    assert build(Inner, apply_overrides({}, {"lr": text})).lr == value


def test_an_override_through_a_plain_value_is_refused() -> None:
    """`--name.first` where `name` is a word."""
    with pytest.raises(ConfigError, match=r"^--name\.first: name is not a group of fields$"):
        apply_overrides({"name": "x"}, {"name.first": "y"})
    with pytest.raises(ConfigError, match=r"^--name: cannot read the value '\[1,'$"):
        apply_overrides({}, {"name": "[1,"})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"needed": 1, "nane": "y"}, r"unknown field 'nane'\. Did you mean 'name'"),
        ({"needed": 1, "inner": {"stepz": 1}}, r"unknown field 'inner\.stepz'\. Did you mean 'steps'\?"),
        ({"needed": 1, "many": [{"workes": 1}]}, r"unknown field 'many\.0\.workes'\. Did you mean 'workers'\?"),
        ({"needed": 1, "qqq": 1}, r"unknown field 'qqq'\. Allowed: name, inner, shape, many, path, needed\."),
        (
            {"needed": 1, "shape": {"kind": "circle", "radios": 2}},
            r"unknown field 'shape\.circle\.radios'\. Did you mean 'radius'\?",
        ),
        ({"needed": 1, "shape": {"kind": "circel"}}, r"shape: unknown kind 'circel'\. Did you mean 'circle'\?"),
        ({"needed": 1, "shape": {"side": 2}}, r"shape\.kind: missing"),
        ({}, r"^config: needed: missing$"),
        ({"needed": 1, "inner": {"lr": "fast"}}, r"inner\.lr: Input should be a valid number.*\(found \"fast\"\)"),
    ],
)
def test_wrong_fields_are_named_with_the_nearest_right_one(tree: dict[str, Any], message: str) -> None:
    """In nested groups, lists and tagged unions too."""
    with pytest.raises(ConfigError, match=message):
        build(Outer, tree)


def test_every_problem_is_told_at_once() -> None:
    """One run, one list of mistakes."""
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"nane": 1, "inner": {"lr": "x"}}, source="run.yaml")
    text = str(caught.value)
    assert text.startswith("run.yaml: ")
    assert all(part in text for part in ("'nane'", "inner.lr", "needed: missing"))


def test_configs_are_frozen() -> None:
    """A config that was hashed does not change afterwards."""
    with pytest.raises(Exception, match="frozen"):
        Inner().lr = 2.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2\n", r"the top must be a mapping of fields, found list$"),
        (b"just words", r"the top must be a mapping of fields, found str$"),
        (b"a: [1", r"not YAML: "),
        (b"\xff\xfe\x00", r"not YAML: "),
        (b"1: 2\nneeded: 1", r"a field's name must be a word, found 1$"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    """The path stands first in the message."""
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Outer, path)
    assert str(caught.value).startswith(str(path))


def test_a_config_file_is_read_with_overrides_on_top(tmp_path: Path) -> None:
    """File first, then the command line."""
    path = tmp_path / "run.yaml"
    path.write_text("needed: 3\ninner: {steps: 450k}\n", encoding="utf-8")
    config = load_config(Outer, path, {"inner.lr": "0.5", "needed": "4"})
    assert (config.needed, config.inner.steps, config.inner.lr) == (4, 450_000, 0.5)
    path.write_text("", encoding="utf-8")
    assert read_yaml(path) == {}
    assert load_config(Outer, None, {"needed": "1"}) == Outer(needed=1)
    with pytest.raises(ConfigError, match=r"^arguments: needed: missing$"):
        load_config(Outer, None)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file$"):
        load_config(Outer, tmp_path / "nowhere.yaml")


def test_the_hash_sees_meaning_only() -> None:
    """Operational fields, at any depth, stay out; every other field counts."""
    base = Outer(needed=1)
    same = Outer(needed=1, inner=Inner(workers=8), path=Path("elsewhere"))
    assert semantic_hash(base) == semantic_hash(same)
    assert "path" not in semantic_dict(base)
    others = [
        Outer(needed=2), Outer(needed=1, inner=Inner(lr=0.1)), Outer(needed=1, shape=Circle()),
        Outer(needed=1, many=(Inner(),)), Outer(needed=1, name="y"),
    ]  # fmt: skip
    assert len({semantic_hash(base), *map(semantic_hash, others)}) == 1 + len(others)
    assert semantic_hash(base, "upstream") != semantic_hash(base)
    assert semantic_hash("a", "b") != semantic_hash("b", "a")


def test_the_hash_stays_what_it_was() -> None:
    """Runs made by older versions are recognised: a changed hash means a raised CONFIG_SCHEMA."""
    assert semantic_hash({"b": [1, 2.5, None], "a": "é"}) == "cc5779fbb8b22ee3"


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans(), max_size=5))
def test_the_order_of_keys_does_not_matter(tree: dict[str, Any]) -> None:
    """Canonical JSON."""
    assert semantic_hash(tree) == semantic_hash(dict(reversed(tree.items())))
