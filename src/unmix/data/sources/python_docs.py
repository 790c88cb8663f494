"""`builtin:python-docs`: the interpreter's manual and the docstrings of its library and of `unmix`'s dependencies.

Real English on any machine, without a download. Source files are read as text and parsed, never imported. What it
holds depends on the installed versions; the report lists them.
"""

from __future__ import annotations

import ast
import hashlib
import math
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, cast

from unmix.core.errors import DataError
from unmix.data.config import DataConfig
from unmix.data.distributions import Distribution, core_distributions
from unmix.data.prose import Passages, docstrings, prose
from unmix.data.sources.base import Document, Source

NAME = "builtin:python-docs"
RECIPE = 1
"""Raised whenever the same packages would give another text."""
PAGE_CHARACTERS = 6_000
MIN_PAGE_CHARACTERS = 200
MAX_PAGES = 4
"""Pages of one file, at most: a few files are whole manuals of one program's options. It costs 4 % of the text."""
MANUAL = "python-manual"
MANUAL_WEIGHT = 16.0
"""The manual is the best-written part, so its topics come this many times sooner than their number alone gives."""


@dataclass(frozen=True)
class Unit:
    """What is read in one go: a source file (its docstrings) or a topic of the manual (its text)."""

    distribution: str
    name: str
    path: Path | None
    text: str = ""


class PythonDocs(Source):
    """Pages of prose, in an order by hash, so that any budget is a sample of every package.

    A package of n files is drawn with weight √n: large packages of generated documentation do not crowd out the rest.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        if config.source != NAME:
            raise DataError(f"{config.source}: no such built-in corpus; allowed: {NAME}")
        self.distributions = core_distributions()
        self._pages: Counter[str] = Counter()
        self._passages = Passages()

    @classmethod
    def claims(cls, source: str) -> bool:
        return source.startswith("builtin:")

    def documents(self) -> Iterator[Document]:
        self._pages, self._passages = Counter(), Passages()
        for unit in ordered_units(self.distributions, manual_topics()):
            limit = None if unit.distribution == MANUAL else MAX_PAGES
            for page in islice(unit_pages(unit, self._passages), limit):
                self._pages[unit.distribution] += 1
                yield Document(page, f"{unit.distribution}/{unit.name}", unit.distribution)

    def report(self) -> dict[str, Any]:
        versions = {MANUAL: platform.python_version()} | {d.name: d.version for d in self.distributions}
        return {
            "kind": "builtin",
            "name": NAME,
            "recipe": RECIPE,
            "distributions": [
                {"name": name, "version": version, "pages": self._pages[name]} for name, version in versions.items()
            ],
            "repeated_passages_dropped": self._passages.dropped,
        }


def manual_topics() -> dict[str, str]:
    """The topics of the interpreter's manual, by name; empty where it came without them."""
    spec = find_spec("pydoc_data")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "topics.py"
        if path.is_file():
            for node in ast.parse(path.read_bytes()).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                    return cast("dict[str, str]", ast.literal_eval(node.value))
    return {}


def ordered_units(distributions: list[Distribution], topics: dict[str, str]) -> list[Unit]:
    """Every unit, by a weighted draw without replacement (Efraimidis & Spirakis 2006) from hashes of their names."""
    keyed: list[tuple[float, str, str, Unit]] = []

    def place(units: list[Unit], weight: float) -> None:
        keyed.extend((-math.log(_uniform(unit)) / weight, unit.distribution, unit.name, unit) for unit in units)

    place(
        [Unit(MANUAL, name, None, text) for name, text in topics.items()], MANUAL_WEIGHT / math.sqrt(len(topics) or 1)
    )
    for d in distributions:
        place([Unit(d.name, name, path) for name, path in d.files.items()], 1 / math.sqrt(len(d.files) or 1))
    return [entry[-1] for entry in sorted(keyed, key=lambda entry: entry[:3])]


def unit_pages(unit: Unit, passages: Passages) -> Iterator[str]:
    """The unit's new prose in pages of about `PAGE_CHARACTERS`; less than `MIN_PAGE_CHARACTERS` is dropped."""
    if unit.path is None:
        texts = [unit.text]
    else:
        try:
            texts = docstrings(unit.path.read_bytes())
        except OSError:  # listed by the package but not on the disk
            texts = []
    held: list[str] = []
    for text in texts:
        for block in filter(None, prose(text, passages).split("\n\n")):
            if held and sum(map(len, held)) + len(block) > PAGE_CHARACTERS:
                yield from _page(held)
                held = []
            held.append(block)
    yield from _page(held)


def _page(held: list[str]) -> Iterator[str]:
    page = "\n\n".join(held)
    if len(page) >= MIN_PAGE_CHARACTERS:
        yield page


def _uniform(unit: Unit) -> float:
    """A number in (0, 1] that depends on the unit's name alone."""
    digest = hashlib.sha256(f"{RECIPE}\x1f{unit.distribution}\x1f{unit.name}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") + 1) / 2.0**64
