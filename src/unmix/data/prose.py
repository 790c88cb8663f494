"""Docstrings to prose: no doctests, code, tables or markup; each passage once.

A docstring becomes *blocks* (between blank lines) of *items* (a paragraph, a bullet, a parameter's description).
Whether to keep something is decided item by item, since generated documentation repeats its parts in any order.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import re
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager

# A third to a half of the words of English prose are among these; of code and tables hardly any.
_GRAMMAR = """
a an the this that these those it its they their there which who whose what when where while and or but nor so
if then else than as at by for from in into of on onto over to under up with without within between through
during before after is are was were be been being has have had do does did can could may might must shall should
will would not no any all each every some such other another same only also both either neither more most less
least very just because since until unless however thus hence we you your our i he she his her us them one two
first last new given using used see use about against via per
"""
_FUNCTION_WORDS = frozenset(_GRAMMAR.split())
_WORD = re.compile(r"[A-Za-z][A-Za-z'’]*")
_NOT_LETTER = re.compile(r"[^\w ]|[\d_]")
_PLAIN_WORD = re.compile(r"(?<![\w.`])[a-z]{2,}(?![\w`(])")
_BULLET = re.compile(r"(?:[-*+•]|\(?(?:\d{1,3}|[A-Za-z])[.)]|\[\d+\]|\.\. \[\w+\])\s+\S")
_FIELD = re.compile(r":(?:param|parameter|arg|type|return|returns|rtype|raise|raises|keyword|var|ivar)\b[^:]*:")
_DEFINITION = re.compile(
    r"(?P<name>[*`]*[A-Za-z_][\w.]*[*`]*(?:, ?[*`]*\w+[*`]*)*)"  # axis | x, y | *args | `mask`
    r"(?:\s*\((?:[^()]|\([^()]*\))*\)\s*:|\s*:)(?=\s|$)"  # (`int`, *optional*): | :
)
_SECTION = re.compile(
    r"(?:args|arguments|parameters?|params|other parameters|keyword arguments|kwargs|attributes|returns?|yields?"
    r"|raises?|warns|examples?|notes?|references|see also|usage|warnings?|inputs?|outputs?|shape|methods)\s*:?$",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"([-=~^*+#.\"'`_])\1{2,}$")
_DIRECTIVE = re.compile(r"\.\. ([\w-]+)::\s*(.*)")
_NOTES = frozenset({"note", "warning", "attention", "caution", "important", "seealso", "tip", "admonition"})
_INLINE = [
    (re.compile(r"^:(?:param|parameter|arg|keyword|var|ivar)\s+(?:[^:]*\s)?([*\w]+):"), r"\1:"),
    (re.compile(r"^:returns?:"), "Returns:"),
    (re.compile(r"^:raises?\s+([^:]+):"), r"Raises \1:"),
    (re.compile(r":(?:[\w+-]+:)*[\w+-]+:`[~!]?([^`<]+?)\s*(?:<[^>`]*>)?`"), r"`\1`"),
    (re.compile(r"``+([^`]+)``+"), r"`\1`"),
    (re.compile(r"\[`~?([^`\]]+)`\](?:\([^)]*\))?"), r"`\1`"),
    (re.compile(r"`([^`<]+?)\s*<[^>`]*>`__?"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\(https?://[^)]*\)"), r"\1"),
    (re.compile(r"</?[A-Za-z][^>]*>"), ""),
    (re.compile(r"::(?=\s|$)"), ":"),
    (re.compile(r"[ \t]+"), " "),
]

MIN_WORDS = 8
MIN_FUNCTION_WORDS = 0.2
MIN_LETTERS = 0.74


class Passages:
    """The passages seen so far, so that each is kept once. Names, numbers and code do not tell passages apart."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self.dropped = 0

    def new(self, item: str) -> bool:
        """Whether no passage with the same plain words was seen before; remembers this one."""
        words = _PLAIN_WORD.findall(item)
        key = hashlib.blake2b(" ".join(words).encode(), digest_size=10).digest()
        if key in self._seen:
            self.dropped += 1
            return False
        self._seen.add(key)
        return True


def docstrings(source: bytes) -> list[str]:
    """The docstrings in Python source, in their order, read by `ast` (nothing is run). Broken source has none."""
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with _without_gc(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_documented(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


@contextmanager
def _without_gc() -> Generator[None]:
    """Pause the cycle collector: a syntax tree has no cycles, yet building it makes the collector walk every object of
    the process again and again (2.4 times the time, with transformers loaded)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _documented(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, (ast.stmt, ast.excepthandler)):
                yield from _documented(child)


def prose(docstring: str, passages: Passages) -> str:
    """The prose of a docstring that `passages` has not seen, one line per item, a blank line between blocks."""
    blocks: list[str] = []
    for block in _blocks(_strip_code(inspect.cleandoc(docstring).splitlines())):
        items = [item for item in map(_inline, _items(block)) if is_prose(item) and passages.new(item)]
        if items:
            blocks.append("\n".join(items))
    return "\n\n".join(blocks)


def is_prose(item: str) -> bool:
    """Whether enough of `item` is words, and enough of the words are such as hold sentences together."""
    words = _WORD.findall(item)
    if len(words) < MIN_WORDS:
        return False
    letters = len(item) - len(_NOT_LETTER.findall(item))
    function_words = sum(word in _FUNCTION_WORDS for word in item.lower().split())
    return letters >= MIN_LETTERS * len(item) and function_words >= MIN_FUNCTION_WORDS * len(words)


def _strip_code(lines: list[str]) -> list[str]:
    """Without doctests and their output, fenced code, and what is indented below `::` or a directive of code."""
    kept: list[str] = []
    doctest = fenced = False
    literal: int | None = None
    for line in lines:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text.startswith("```"):
            fenced = not fenced
            continue
        if literal is not None and text and indent <= literal:
            literal = None
        doctest = bool(text) and (doctest or text.startswith((">>>", "In [")))
        if fenced or doctest or literal is not None:
            continue
        match = _DIRECTIVE.match(text)
        if match and match[1] not in _NOTES:
            literal = indent
            continue
        if match:
            kept += ["", " " * (indent + 4) + match[2]]
            continue
        if text.endswith("::"):
            literal = indent
        kept.append(line)
    return kept


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines between blank lines and headings; headings (underlined, or `Args:` and its like) are dropped."""
    block: list[str] = []
    for line in [*lines, ""]:
        text = line.strip()
        if _UNDERLINE.match(text):
            block = block[:-1]
            text = ""
        if text and not _SECTION.match(text):
            block.append(line)
        elif block:
            yield block
            block = []


def _items(block: list[str]) -> Iterator[str]:
    """The items of a block, each on one line: hard-wrapped lines are joined.

    An item starts at a bullet, a field, a parameter's definition, or where the indentation falls back.
    """
    held: list[str] = []
    margin = last = 0
    for line in block:
        indent = len(line) - len(line.lstrip())
        text = line.strip()
        starts = bool(_BULLET.match(text) or _FIELD.match(text)) or indent < last
        starts = starts or (indent <= margin and _DEFINITION.match(text) is not None)
        if held and starts:
            yield _joined(held)
            held = []
        if not held:
            margin = indent
        held.append(text)
        last = indent
    if held:
        yield _joined(held)


def _joined(lines: list[str]) -> str:
    """One line. Of a parameter's definition the name stays and the type goes, so that it reads as a sentence."""
    match = _DEFINITION.match(lines[0])
    if match is None:
        return " ".join(lines)
    typed = match[0].endswith(" :") and len(lines) > 1  # numpydoc: `axis : int, optional` over its description
    rest = "" if typed else lines[0][match.end() :].strip()
    return " ".join([match["name"] + ":", *filter(None, [rest]), *lines[1:]])


def _inline(item: str) -> str:
    for pattern, replacement in _INLINE:
        item = pattern.sub(replacement, item)
    return item.strip()
