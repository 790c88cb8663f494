"""Rows of conversations, as they are published, brought into one shape: role, content, tool calls, thinking."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from unmix.core.errors import DataError
from unmix.data.config import SPEAKERS, ChatConfig, Speaker
from unmix.data.sources.base import Document, missing_column

ROLES_SAID: dict[str, Speaker] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "model": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "tool": "tool",
    "function": "tool", "ipython": "tool", "observation": "tool", "environment": "tool",
}  # fmt: skip
"""What roles are called in published chats, and who speaks then."""
THINKING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold its thinking."""


def chat_document(record: Mapping[str, Any], config: ChatConfig, where: str, source: str) -> Document | None:
    """The conversation of one row as a document whose text is JSON; None where it is null or empty.

    `DataError` naming `where`: a column that is missing, or a message that is none.
    """
    spec = config.chat
    columns = (config.column, config.label_column, spec.tools_column, "speakers" if spec.stored else None)
    for column in columns:
        if column is not None and column not in record:
            raise missing_column(where, column, list(record), config)
    named = record[config.label_column] if config.label_column is not None else None
    label = None if named is None else str(named)
    value = record[config.column]
    if value is None:
        return None
    if spec.stored:
        return Document(json.dumps({"ids": value, "speakers": record["speakers"]}), source, label)
    if isinstance(value, str):
        value = _parsed(value, config.column, where)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: column {config.column!r} holds {type(value).__name__}, expected a list of messages")
    messages = [_message(item, i, where) for i, item in enumerate(cast("Sequence[Any]", value))]
    if not messages:
        return None
    tree: dict[str, Any] = {"messages": messages}
    tools = record[spec.tools_column] if spec.tools_column is not None else None
    if tools is not None:
        tree["tools"] = _parsed(tools, str(spec.tools_column), where) if isinstance(tools, str) else tools
    return Document(json.dumps(tree, ensure_ascii=False), source, label)


def _parsed(text: str, column: str, where: str) -> Any:
    """Lists are sometimes published as JSON in a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise DataError(f"{where}: column {column!r} holds text, expected a list of messages") from None


def _message(item: Any, i: int, where: str) -> dict[str, Any]:
    place = f"{where}: message {i + 1}"
    if not isinstance(item, Mapping):
        raise DataError(f"{place}: is {type(item).__name__}, expected an object with role and content")
    given = {str(key): value for key, value in cast("Mapping[Any, Any]", item).items() if value is not None}
    role, foreign = given.pop("role", None), given.pop("from", None)
    name = role if role is not None else foreign
    if not isinstance(name, str) or name.lower() not in ROLES_SAID:
        raise DataError(f"{place}: the role is {name!r}; known: {', '.join(ROLES_SAID)}")
    if role is None:
        # from/value says roles in words of its own; templates know these.
        given = {"content": given.pop("value", None), **given}
        name = ROLES_SAID[name.lower()]
    content = given.pop("content", None)
    said = any(key in given for key in ("tool_calls", "function_call", *THINKING))
    if content is None and not said:
        raise DataError(f"{place} ({name}): has no content")
    if content is not None and not isinstance(content, (str, list)):
        raise DataError(f"{place} ({name}): its content is {type(content).__name__}, expected text")
    return {"role": name, "content": content, **given}


def spoken_row(document: Document) -> tuple[list[int], list[int]]:
    """Ids and speakers of a stored row; `DataError` where they do not fit each other."""
    tree = json.loads(document.text)
    ids, speakers = tree["ids"], tree["speakers"]
    fits = isinstance(ids, list) and isinstance(speakers, list)
    if not fits or len(cast("list[Any]", ids)) != len(cast("list[Any]", speakers)):
        raise DataError(f"{document.source}: ids and speakers must be two lists of one length")
    wrong = [s for s in cast("list[Any]", speakers) if type(s) is not int or not 0 <= s < len(SPEAKERS)]
    if wrong:
        raise DataError(f"{document.source}: a speaker is {wrong[0]!r}; they are numbered 0 to {len(SPEAKERS) - 1}")
    return ids, speakers
