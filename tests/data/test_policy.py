from __future__ import annotations

from typing import Any

import pytest

from unmix.core.errors import DataError
from unmix.core.policy import InputPolicy
from unmix.data.policy import end_of_text_id, resolve_policy


class Bare:
    """A tokenizer that says only what is asked of it."""

    def __init__(self, size: int | None = 10, **ids: int) -> None:
        self.__dict__.update(ids)
        if size is not None:
            self.vocab_size = size


def test_ids_come_from_the_tokenizer(tiny_tokenizer: Any) -> None:
    resolved = resolve_policy(InputPolicy(), tiny_tokenizer)
    assert (resolved.bos_id, resolved.separator_id) == (tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id)
    assert resolve_policy(InputPolicy(bos="none"), tiny_tokenizer).bos_id is None


def test_ids_that_are_given_stay(tiny_tokenizer: Any) -> None:
    resolved = resolve_policy(InputPolicy(bos="document", bos_id=7, separator_id=8), tiny_tokenizer)
    assert (resolved.bos_id, resolved.separator_id) == (7, 8)
    assert resolve_policy(resolved, tiny_tokenizer) == resolved


def test_end_of_text_wins_over_a_chat_model_s_end_of_turn(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.eos_token = "<|begin|>"
    assert tiny_tokenizer.eos_token_id == 1
    assert end_of_text_id(tiny_tokenizer) == 0
    assert end_of_text_id(Bare(eos_token_id=5)) == 5


@pytest.mark.parametrize(
    ("policy", "tokenizer", "message"),
    [
        (
            InputPolicy(),
            Bare(eos_token_id=1),
            "the tokenizer has no begin-of-sequence id, which policy.bos='context' needs; "
            "set policy.bos_id, or policy.bos to 'none'",
        ),
        (
            InputPolicy(bos="none"),
            Bare(),
            "the tokenizer has no end-of-text id to put between documents; set policy.separator_id",
        ),
        (
            InputPolicy(bos_id=10, separator_id=1),
            Bare(),
            "policy.bos_id: 10 is not in the tokenizer's vocabulary; allowed 0 to 9",
        ),
        (
            InputPolicy(bos="none", separator_id=1, skip_ids=(3, -2)),
            Bare(size=None),
            "policy.skip_ids: -2 is not in the tokenizer's vocabulary; allowed 0 or more",
        ),
    ],
)
def test_an_id_that_cannot_be_says_so(policy: InputPolicy, tokenizer: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        resolve_policy(policy, tokenizer)
    assert str(caught.value) == message
