from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from unmix.data.distributions import CORE, core_distributions, normalise, requirement_tree, standard_library


def make(folder: Path, name: str, requires: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", "Version: 1.0", "Metadata-Version: 2.1", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make(tmp_path, "demo_top", ("demo-a>=1", 'demo-b; extra == "more"', "demo-missing", "demo-c; python_version < '3'"))
    make(tmp_path, "demo_a", ("Demo.Top", "demo.d[x]"), ("demo_a/x.py", "demo_a/tests/t.py", "demo_a/data.txt"))
    for name in ("demo_b", "demo_c", "demo_d"):
        make(tmp_path, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_tree_follows_requirements_without_extras(packages: Path) -> None:
    assert sorted(requirement_tree(["demo_top"])) == ["demo-a", "demo-d", "demo-top"]


def test_without_metadata_the_list_in_the_code_is_walked(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    monkeypatch.setattr("unmix.data.distributions.CORE", ("demo-top",))
    found = {d.name: d for d in core_distributions()}
    assert list(found) == ["python", "demo-a", "demo-d", "demo-top"]
    assert found["demo-a"].version == "1.0"
    assert {name: path.name for name, path in found["demo-a"].files.items()} == {"demo_a/x.py": "x.py"}


def test_with_metadata_unmix_s_own_requirements_are_walked(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: {"unmix": ["demo-b", 'demo-d; extra == "dev"']}[name])
    assert [d.name for d in core_distributions()] == ["python", "demo-b"]


def test_the_list_in_the_code_is_the_project_s(root: Path) -> None:
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {normalise(line.partition(">")[0].partition("=")[0].partition("<")[0].strip()) for line in declared}
    assert {normalise(name) for name in CORE} == names


def test_the_standard_library_has_no_tests_and_no_packages() -> None:
    files = standard_library().files
    assert "argparse.py" in files
    assert "json/decoder.py" in files
    assert not [name for name in files if name.startswith(("test/", "idlelib/", "site-packages/"))]
    assert not [name for name in files if "/tests/" in name or "/test/" in name]
