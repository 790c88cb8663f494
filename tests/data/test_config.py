from __future__ import annotations

import pytest

from unmix.core.config import build, semantic_hash
from unmix.core.errors import ConfigError
from unmix.data.config import ROLES, DataConfig


def test_defaults_are_whole_and_in_role_order() -> None:
    config = DataConfig()
    assert config.source == "builtin:python-docs"
    budgets = config.budgets()
    assert tuple(budgets) == ROLES
    assert sum(budgets.values()) == config.tokens // config.context
    assert budgets == {"train": 3281, "evaluate": 547, "explain": 820, "score": 820}


def test_tokens_may_be_written_short() -> None:
    assert DataConfig.model_validate({"tokens": "450k"}).tokens == 450_000


def test_roles_without_a_share_get_no_budget() -> None:
    config = DataConfig(tokens=1280, context=128, roles={"train": 0.75, "evaluate": 0.25})
    assert config.budgets() == {"train": 8, "evaluate": 2}


def test_shard_size_does_not_change_the_hash_but_the_seed_does() -> None:
    assert semantic_hash(DataConfig()) == semantic_hash(DataConfig(shard_tokens=1000))
    assert semantic_hash(DataConfig()) != semantic_hash(DataConfig(seed=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"roles": {"train": 0.8}}, "roles must add up to 1, found 0.8 from {'train': 0.8}"),
        ({"roles": {"train": 1.5, "score": -0.5}}, "roles must not be negative, found {'train': 1.5, 'score': -0.5}"),
        (
            {"tokens": 400},
            "tokens=400 leaves the role 'evaluate' (share 0.1) without one whole context of 128 tokens",
        ),
        (
            {"policy": {"skip_first": 128}},
            "policy.skip_first=128 masks every position of a context of 128",
        ),
    ],
)
def test_a_config_that_cannot_work_says_why(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(DataConfig, fields)
    assert message in str(caught.value)


def test_a_wrong_role_names_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match="'train', 'evaluate', 'explain' or 'score'"):
        build(DataConfig, {"roles": {"trian": 1.0}})
