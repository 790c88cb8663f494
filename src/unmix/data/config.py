"""Which text is taken, how much of it, and who may see which part."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from unmix.core.config import Config, Count, operational
from unmix.core.policy import InputPolicy

Role = Literal["train", "evaluate", "explain", "score"]

ROLES: tuple[Role, ...] = ("train", "evaluate", "explain", "score")
"""Every role, in the order of their numbers in `TokenShards.roles` (decision 14)."""


IDS_COLUMN = "input_ids"
"""What most tokenised data sets call their column; TransformerLens' is `tokens`."""


Speaker = Literal["none", "system", "user", "assistant", "thinking", "tool"]

SPEAKERS: tuple[Speaker, ...] = ("none", "system", "user", "assistant", "thinking", "tool")
"""Who speaks at a position of a chat, by number; none: what the template puts around the words."""


def _default_roles() -> dict[Role, float]:
    return {"train": 0.6, "evaluate": 0.1, "explain": 0.15, "score": 0.15}


class DataConfig(Config):
    """Text, token budget, context length and roles of one run."""

    source: str = "builtin:python-docs"
    """A text file (.txt .md .rst .jsonl .parquet; text and JSONL also .gz), a folder of them, `hf:NAME[/CONFIG]`, or
    `builtin:python-docs`. Of token ids: .jsonl, .parquet, .npy, a folder of them, or `hf:NAME`."""
    tokenised: Literal["rows", "documents"] | None = None
    """The source holds token ids of the model's own tokenizer instead of text.

    rows: each row is text that was packed already, and is cut into contexts; one of `context` ids is one as it is
    stored. With `policy.bos: context` a context that does not begin with BOS gets one, and one id less.
    documents: each row is one document, packed as text is.
    """
    column: str = "text"
    """The column (key) that holds the text, where the source has columns; of token ids by default `input_ids`."""
    label_column: str | None = None
    """A column whose value is kept beside each document, for example its title."""
    split: str = "train"
    """The split of a Hugging Face data set."""
    tokens: Count = Field(default=700_000, gt=0)
    """Tokens to take, all roles together; rounded down to whole contexts."""
    context: int = Field(default=128, ge=2)
    """Tokens in each context."""
    roles: dict[Role, float] = Field(default_factory=_default_roles)
    """The share of `tokens` that each role takes; the shares add up to 1."""
    seed: int = 0
    """Decides which document has which role."""
    policy: InputPolicy = InputPolicy()
    shard_tokens: Count = operational(2**25, gt=0)
    """Tokens in one shard file, at most."""

    @model_validator(mode="before")
    @classmethod
    def _ids_have_a_column(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("tokenised") is not None:
            return {"column": IDS_COLUMN, **fields}
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(share < 0 for share in self.roles.values()):
            raise ValueError(f"roles must not be negative, found {self.roles}")
        if not math.isclose(total := sum(self.roles.values()), 1.0, abs_tol=1e-6):
            raise ValueError(f"roles must add up to 1, found {total:g} from {self.roles}")
        for role, contexts in self.budgets().items():
            if contexts == 0:
                raise ValueError(
                    f"tokens={self.tokens} leaves the role {role!r} (share {self.roles[role]:g}) "
                    f"without one whole context of {self.context} tokens"
                )
        if self.policy.skip_first >= self.context:
            raise ValueError(
                f"policy.skip_first={self.policy.skip_first} masks every position of a context of {self.context}"
            )
        return self

    def budgets(self) -> dict[Role, int]:
        """Whole contexts of each role with a share, by largest remainder; their sum is `tokens // context`."""
        total = self.tokens // self.context
        exact: dict[Role, float] = {role: total * self.roles[role] for role in ROLES if self.roles.get(role, 0.0) > 0}
        result: dict[Role, int] = {role: math.floor(share + 1e-9) for role, share in exact.items()}
        by_remainder = sorted(exact, key=lambda role: result[role] - exact[role])
        for role in by_remainder[: total - sum(result.values())]:
            result[role] += 1
        return result


class ChatSpec(Config):
    """How conversations become tokens with speakers."""

    template: str | None = None
    """A chat template (Jinja); default: the tokenizer's own."""
    thinking: tuple[str, str] = ("<think>", "</think>")
    """What an assistant's thinking stands between."""
    tools_column: str | None = None
    """The column with the tools that the template is told about."""
    stored: bool = False
    """Rows hold ids and speakers that were made before (roll-outs), and no messages."""


class ChatConfig(DataConfig):
    """As `DataConfig`, of conversations."""

    column: str = "messages"
    """The column with the list of messages: role and content, or from and value."""
    chat: ChatSpec = ChatSpec()

    @model_validator(mode="after")
    def _no_ids(self) -> Self:
        if self.tokenised is not None:
            raise ValueError("tokenised: conversations are rendered here, so they cannot be token ids already")
        return self
