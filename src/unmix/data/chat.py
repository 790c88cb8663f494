"""Conversations to tokens with speakers, through any chat template.

A template is a program, so where a message's words end up is found by experiment: the conversation is rendered once as
it is, and once for each piece of text with a mark in its place. What both renderings begin and end with is the
template's; what lies between is the piece, wherever the template put it and however it trimmed it. A piece that
changes nothing was left out by the template (thinking of earlier turns, often). Where the mark changes anything but
its own place, the template cannot be followed, and an error says so.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from unmix.core.errors import DataError
from unmix.data.chat_rows import ROLES_SAID, THINKING
from unmix.data.config import SPEAKERS, ChatSpec, Speaker
from unmix.data.sources.base import Document

NUMBER: dict[Speaker, int] = {name: i for i, name in enumerate(SPEAKERS)}
_PRIVATE = range(0xE0F0, 0xF8FF, 2)
"""Characters that no text has: marks are made of them."""


@dataclass(frozen=True)
class Spoken:
    """Token ids of a conversation, and who speaks at each: a place in `SPEAKERS`."""

    ids: list[int]
    speakers: list[int]


@dataclass(frozen=True)
class Piece:
    """A text inside a conversation: where it stands there, and who says it."""

    path: tuple[str | int, ...]
    speaker: Speaker
    text: str
    before: str = ""
    """What stands before and after it in the same string."""
    after: str = ""

    @property
    def message(self) -> int:
        """Which message it is of."""
        return int(self.path[0])

    def marked(self, messages: list[dict[str, Any]], mark: str) -> list[dict[str, Any]]:
        """The conversation with `mark` in its place."""
        changed = copy.deepcopy(messages)
        node: Any = changed
        for key in self.path[:-1]:
            node = node[key]
        node[self.path[-1]] = f"{self.before}{mark}{self.after}"
        return changed


@dataclass(frozen=True)
class Span:
    """Characters `[start, end)` of a rendered conversation."""

    start: int
    end: int
    speaker: Speaker


class ChatRenderer:
    """Renders conversations with one tokenizer and one template."""

    def __init__(self, tokenizer: Any, spec: ChatSpec) -> None:
        """`DataError` where there is no template, or the tokenizer cannot say which characters a token stands for."""
        self._tokenizer, self._spec = tokenizer, spec
        self._template = spec.template or _own_template(tokenizer)
        if not getattr(tokenizer, "is_fast", False):
            raise DataError("--chat needs a fast tokenizer: this one does not say which characters a token stands for")
        self._generates = "{% generation" in self._template or "{%- generation" in self._template

    def __call__(self, document: Document) -> Spoken:
        """Tokens and speakers of a row that `chat_document` made; `DataError` naming it."""
        tree = json.loads(document.text)
        return self.spoken(tree["messages"], tree.get("tools"), document.source)

    def spoken(
        self, messages: list[dict[str, Any]], tools: Any = None, where: str = "chat", prompt: bool = False
    ) -> Spoken:
        """Tokens and speakers of a conversation; with `prompt` the template's opening of an answer follows."""
        text = self._render(messages, tools, where, prompt)
        spans = list(self._spans(text, messages, tools, where, prompt))
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        speakers = _of_tokens(len(text), spans, encoded["offset_mapping"])
        if self._generates and not prompt:
            self._add_generated(messages, tools, ids, speakers)
        return Spoken(ids, speakers)

    def _render(self, messages: list[dict[str, Any]], tools: Any, where: str, prompt: bool = False) -> str:
        try:
            found = self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # whatever a template, which is a program, runs into
            raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error
        return str(found)

    def _spans(self, text: str, messages: list[dict[str, Any]], tools: Any, where: str, prompt: bool) -> Iterator[Span]:
        mark = _mark(text, messages)
        for piece in pieces(messages, self._spec.thinking):
            other = self._render(piece.marked(messages, mark), tools, where, prompt)
            if other == text:
                continue
            start, end = _changed(text, other)
            if other[start : len(other) - (len(text) - end)] != mark:
                raise DataError(
                    f"{where}: this chat template cannot be followed: another text of message {piece.message + 1} "
                    f"({piece.speaker}) changes more than its own place"
                )
            if piece.speaker == "thinking":
                start, end = _with_tags(text, start, end, self._spec.thinking)
            yield Span(start, end, piece.speaker)
        for i, message in enumerate(messages):
            if message.get("tool_calls") or message.get("function_call"):
                yield self._called(text, messages, i, tools, where, prompt)

    def _called(self, text: str, messages: list[dict[str, Any]], i: int, tools: Any, where: str, prompt: bool) -> Span:
        """What a message's tool calls add to the text."""
        silent = copy.deepcopy(messages)
        silent[i].pop("tool_calls", None)
        silent[i].pop("function_call", None)
        silent[i]["content"] = silent[i].get("content") or ""
        start, end = _changed(text, self._render(silent, tools, where, prompt))
        while start and text[start - 1] == text[end - 1]:
            # The same insertion, said to begin one character earlier: `<` of `<call>` before the `<` of `<end>`.
            start, end = start - 1, end - 1
        return Span(start, end, "assistant")

    def _add_generated(self, messages: list[dict[str, Any]], tools: Any, ids: list[int], speakers: list[int]) -> None:
        """What the template itself marks as generated is the assistant's, its end of turn too."""
        found: Any = self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self._template, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        if list(found["input_ids"]) != ids:
            return
        for place, generated in enumerate(found["assistant_masks"]):
            if generated and speakers[place] == NUMBER["none"]:
                speakers[place] = NUMBER["assistant"]


def pieces(messages: Sequence[Mapping[str, Any]], tags: tuple[str, str]) -> Iterator[Piece]:
    """Every text of a conversation, in order; what an assistant thinks between `tags` is a piece of its own."""
    for i, message in enumerate(messages):
        speaker = ROLES_SAID[str(message["role"]).lower()]
        for key in THINKING:
            if isinstance(message.get(key), str) and message[key].strip():
                yield Piece((i, key), "thinking", message[key])
        content = message.get("content")
        if isinstance(content, str):
            yield from _of_text((i, "content"), speaker, content, tags)
        elif isinstance(content, list):
            for j, part in enumerate(cast("list[Any]", content)):
                if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                    yield from _of_text((i, "content", j, "text"), speaker, part["text"], tags)


def _of_text(path: tuple[str | int, ...], speaker: Speaker, text: str, tags: tuple[str, str]) -> Iterator[Piece]:
    if not text.strip():
        return
    opening, closing = tags
    before, found, rest = text.partition(opening)
    thought, ended, answer = rest.partition(closing)
    if speaker != "assistant" or not found or not ended:
        yield Piece(path, speaker, text)
        return
    if before.strip():
        yield Piece(path, speaker, before, "", text[len(before) :])
    if thought.strip():
        yield Piece(path, "thinking", thought, before + opening, closing + answer)
    if answer.strip():
        yield Piece(path, speaker, answer, text[: len(text) - len(answer)], "")


def _own_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = cast("Mapping[str, Any]", template).get("default")
    if not isinstance(template, str):
        raise DataError("this model's tokenizer has no chat template; give one: --chat-template FILE")
    return template


def _mark(text: str, messages: list[dict[str, Any]]) -> str:
    """Two characters that stand nowhere in the conversation."""
    known = text + json.dumps(messages, ensure_ascii=False)
    return next(
        pair for pair in (chr(c) + chr(c + 1) for c in _PRIVATE) if pair[0] not in known and pair[1] not in known
    )


def _changed(text: str, other: str) -> tuple[int, int]:
    """The part `[start, end)` of `text` that `other` lacks: behind what both begin with, before their common end."""
    shorter = min(len(text), len(other))
    start = _common(text, other, shorter)
    back = _common(text[::-1], other[::-1], shorter - start)
    return start, len(text) - back


def _common(a: str, b: str, limit: int) -> int:
    """Length of the common beginning, at most `limit`; by halving, since comparing slices is fast."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _with_tags(text: str, start: int, end: int, tags: tuple[str, str]) -> tuple[int, int]:
    """Thinking with the tags around it, where the text has them."""
    before, after = text[:start].rstrip(), text[end:].lstrip()
    first = len(before) - len(tags[0]) if before.endswith(tags[0]) else start
    last = len(text) - len(after) + len(tags[1]) if after.startswith(tags[1]) else end
    return first, last


def _of_tokens(length: int, spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Who speaks at each token: whoever says most of its characters; of equals the one that comes later."""
    of_character = bytearray(length + 1)
    for span in spans:
        of_character[span.start : span.end] = bytes([NUMBER[span.speaker]]) * (span.end - span.start)
    found: list[int] = []
    for start, end in offsets:
        inside = of_character[start : max(end, start + 1)]
        found.append(max(reversed(inside), key=inside.count) if len(set(inside)) > 1 else inside[0])
    return found
