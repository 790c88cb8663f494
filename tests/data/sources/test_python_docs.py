from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest

from unmix.core.errors import DataError
from unmix.data.config import DataConfig
from unmix.data.corpora import find_source, open_corpus
from unmix.data.distributions import Distribution
from unmix.data.prose import Passages
from unmix.data.sources.python_docs import (
    MANUAL,
    MAX_PAGES,
    PAGE_CHARACTERS,
    PythonDocs,
    Unit,
    manual_topics,
    ordered_units,
    unit_pages,
)


def sentence(i: int) -> str:
    words = ["apple", "bridge", "cloud", "desert", "engine", "forest", "garden", "harbour", "island", "jungle"]
    a, b, c, d = (words[i // 10**k % 10] for k in range(4))
    return f"The {a} is not far from the {b}, and there is a way from it to the {c} and to the {d} of the town."


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Distribution]:
    found: list[Distribution] = []
    number = 0
    for name, count in {"big": 60, "small": 4}.items():
        files: dict[str, Path] = {}
        for i in range(count):
            path = tmp_path / name / f"m{i}.py"
            path.parent.mkdir(exist_ok=True)
            body = "\n\n".join(sentence(number + k) for k in range(5))
            path.write_text(f'"""{body}"""\nraise SystemExit("was imported")\n')
            files[f"{name}/m{i}.py"] = path
            number += 5
        found.append(Distribution(name, "1.2", files))
    found[0].files["big/gone.py"] = tmp_path / "gone.py"
    monkeypatch.setattr("unmix.data.sources.python_docs.core_distributions", lambda: found)
    monkeypatch.setattr("unmix.data.sources.python_docs.manual_topics", lambda: {"topic": sentence(9999) * 3})
    return found


def test_every_file_once_and_the_same_again(packages: list[Distribution]) -> None:
    source = find_source(DataConfig())
    first = list(source.documents())
    assert len(first) == 65
    assert len({document.source for document in first}) == 65
    assert {document.label for document in first} == {"big", "small", MANUAL}
    assert list(source.documents()) == first
    report = source.report()
    assert (report["kind"], report["recipe"]) == ("builtin", 1)
    assert [(d["name"], d["version"], d["pages"]) for d in report["distributions"][1:]] == [
        ("big", "1.2", 60),
        ("small", "1.2", 4),
    ]


def test_what_is_taken_first_does_not_depend_on_how_much_is_taken(packages: list[Distribution]) -> None:
    everything = list(open_corpus(DataConfig()))
    assert list(islice(open_corpus(DataConfig(tokens=10_000)), 9)) == everything[:9]


def test_a_start_of_the_order_is_a_sample_of_every_package(packages: list[Distribution]) -> None:
    units = ordered_units(packages, {})
    firsts = [unit.distribution for unit in units[:20]]
    assert {"big", "small"} == set(firsts)
    assert [unit.name for unit in units] != sorted(unit.name for unit in units)
    assert ordered_units(list(reversed(packages)), {}) == units


def test_small_packages_come_sooner_than_their_number_gives() -> None:
    """By number alone the mean place would be the middle of the order."""
    packages = [
        Distribution("big", "1", {f"b{i}": Path(f"b{i}") for i in range(1600)}),
        Distribution("small", "1", {f"s{i}": Path(f"s{i}") for i in range(16)}),
    ]
    units = ordered_units(packages, {})
    places = [place for place, unit in enumerate(units) if unit.distribution == "small"]
    assert sum(places) / len(places) < 0.25 * len(units)


def test_long_files_become_several_pages_and_short_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text('"""' + "\n\n".join(sentence(i) for i in range(400)) + '"""')
    pages = list(unit_pages(Unit("d", "long.py", path), Passages()))
    assert len(pages) >= 6
    assert all(len(page) <= 1.1 * PAGE_CHARACTERS for page in pages)
    assert sum(page.count("town") for page in pages) == 400
    path.write_text(f'"""{sentence(0)}"""')
    assert list(unit_pages(Unit("d", "long.py", path), Passages())) == []


def test_one_file_gives_a_few_pages_at_most_but_a_topic_all(
    packages: list[Distribution], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "\n\n".join(sentence(i) for i in range(2000, 2500))
    path = tmp_path / "long.py"
    path.write_text(f'"""{long}"""')
    packages[:] = [Distribution("one", "1", {"long.py": path})]
    monkeypatch.setattr("unmix.data.sources.python_docs.manual_topics", dict)
    assert len(list(open_corpus(DataConfig()))) == MAX_PAGES
    packages[:] = []
    monkeypatch.setattr("unmix.data.sources.python_docs.manual_topics", lambda: {"topic": long})
    assert len(list(open_corpus(DataConfig()))) > MAX_PAGES


def test_the_manual_is_read_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pydoc_data.topics", raising=False)
    topics = manual_topics()
    assert "pydoc_data.topics" not in sys.modules
    assert len(topics) > 50
    assert "sequence" in topics["typesseq"]


def test_the_real_corpus_starts_with_text_of_many_packages() -> None:
    source = PythonDocs(DataConfig())
    documents = list(islice(source.documents(), 40))
    assert len({document.label for document in documents}) > 5
    assert all(">>>" not in document.text for document in documents)
    names = [entry["name"] for entry in source.report()["distributions"]]
    assert names[:2] == [MANUAL, "python"]
    assert {"torch", "numpy", "transformers", "sympy"} <= set(names)
    assert "pytest" not in names


def test_another_builtin_name_says_what_is_allowed() -> None:
    with pytest.raises(DataError, match=r"^builtin:books: no such built-in corpus; allowed: builtin:python-docs$"):
        open_corpus(DataConfig(source="builtin:books"))
