"""How contexts are cut into shards and groups: from their number and length alone."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.builds import changed_codes, make_source
from unmix.core.errors import ConfigError, CorruptError, DataError
from unmix.index.plan import LEAST_TOKENS, MOST_SEGMENTS, MOST_TOKENS, SHARD_TOKENS, Plan, cut, differences, plan_of
from unmix.index.sources.arrays import ArraySource


@given(n=st.integers(1, 10**7), context=st.sampled_from([1, 7, 128, 1024, 4096, 2**19]))
def test_shards_and_segments_cover_every_context_once(n: int, context: int) -> None:
    division = cut(n, context)
    assert division.shard == max(SHARD_TOKENS // context, 1)
    ends = [division.contexts(i) for i in (0, division.n_shards - 1)]
    assert ends[0][0] == 0 and ends[1][1] == n and all(first < last for first, last in ends)
    if division.n_groups < 1000:
        assert [s for g in range(division.n_groups) for s in division.shards(g)] == list(range(division.n_shards))
        segments = division.segments
        assert segments[0].base == 0 and sum(s.tokens for s in segments) == n * context
        assert all(a.base + a.tokens == b.base for a, b in itertools.pairwise(segments))
        assert all(s.tokens >= min(LEAST_TOKENS, n * context) * 0.99 for s in segments[:-1])
        assert max(s.tokens for s in segments) <= max(MOST_TOKENS, context)
        assert len(segments) <= MOST_SEGMENTS or n * context > MOST_TOKENS * (MOST_SEGMENTS - 1)


def test_a_hundred_million_tokens() -> None:
    division = cut(100_000_000 // 128, 128)
    assert (division.shard, division.n_shards, division.group, division.n_groups) == (2048, 382, 24, 16)


def test_asked_for_segments() -> None:
    assert [(s.base, s.tokens) for s in cut(10, 3, 7).segments] == [(0, 6), (6, 6), (12, 6), (18, 6), (24, 6)]
    assert len(cut(10, 3, 3).segments) == 10


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    plan = plan_of(make_source())
    plan.write(tmp_path)
    again = Plan.read(tmp_path)
    assert again.key == plan.key and again.shard_key(2) == plan.shard_key(2) != plan.shard_key(1)
    assert again.cut == plan.cut and again.frame.token_files == plan.frame.token_files
    assert differences(again.decides, plan.decides) == []
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(CorruptError, match=r"plan\.json: not the plan of a build"):
        Plan.read(tmp_path)


def test_the_key_follows_what_decides_the_bytes_and_nothing_else() -> None:
    source = make_source()
    plan = plan_of(source)
    assert plan_of(dataclasses.replace(source, meta={"model": "other"}, batch=1)).key == plan.key
    other = plan_of(changed_codes(source, "a"))
    assert other.key != plan.key
    old, new = plan.inputs["coders"]["a"], other.inputs["coders"]["a"]
    assert differences(plan.decides, other.decides) == [f"coder 'a' changed: {old} → {new}"]


def test_differences_in_words() -> None:
    before = {"model": "a" * 64, "coders": {"x": "1", "y": "2"}, "batch": 8}
    now = {"model": "b" * 64, "coders": {"x": "1", "z": "2"}, "batch": 8, "policy": {"bos": True}}
    assert differences(before, now) == [
        "coder 'y' is gone (it was 2)", "coder 'z' is new: 2", f"model changed: {'a' * 12}… → {'b' * 12}…",
        "policy 'bos' is new: true",
    ]  # fmt: skip


def test_what_cannot_be_planned() -> None:
    source = make_source()
    with pytest.raises(DataError, match="the source has no contexts"):
        plan_of(dataclasses.replace(source, tokens=source.tokens[:0], codes={}))
    with pytest.raises(ConfigError, match="an index needs at least one coder"):
        plan_of(dataclasses.replace(source, codes={}))


class Counted(ArraySource):
    """Sizes as NumPy gives them: no JSON."""

    @property
    def latents(self):
        return {name: np.int64(n) for name, n in super().latents.items()}

    @property
    def n_contexts(self):
        return np.int64(super().n_contexts)


def test_sizes_may_come_from_numpy() -> None:
    plain = make_source()
    counted = Counted(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
    assert plan_of(counted).key == plan_of(plain).key
