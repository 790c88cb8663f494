"""The documentation cannot drift: what it names, exists; what exists and must be explained, is."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = {"sh", "bash", "console", "shell"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line it starts on, its language and text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """`docs/index.md:12`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def blocks() -> list[Block]:
    """Every fenced block of every page."""
    found: list[Block] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", text, flags=re.MULTILINE | re.DOTALL)
        found += [Block(page, text[: fence.start()].count("\n") + 2, fence[1], fence[2]) for fence in fences]
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```\s*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def inline_code() -> list[tuple[str, str]]:
    """`(page, text)` of everything in backticks outside fenced blocks."""
    return [(page.name, match) for page in PAGES for match in re.findall(r"`([^`\n]+)`", prose(page))]


@cache
def shell_lines() -> list[tuple[str, str]]:
    """`(place, line)` of every command in shell blocks (prompts and comments taken off) and in backticks."""
    lines: list[tuple[str, str]] = []
    for block in blocks():
        if block.language in SHELL:
            joined = block.text.replace("\\\n", " ")
            lines += [(block.place, line.strip().removeprefix("$ ")) for line in joined.splitlines() if line.strip()]
    return [*lines, *inline_code()]


def unmix_commands() -> list[tuple[str, list[str]]]:
    """`(place, words after unmix)` of every call of the command line."""
    calls: list[tuple[str, list[str]]] = []
    for place, line in shell_lines():
        match = re.match(r"(?:\S*/)?unmix +(.+)", line)
        if match:
            calls.append((place, shlex.split(match[1], comments=True)))
    return calls


def run_cli(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line prints for `arguments`, which must succeed."""
    from unmix.cli import main

    try:
        code: Any = main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert not code, f"unmix {' '.join(arguments)}: exit {code}: {said.err}"
    return said.out


def listed_commands(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The commands that `unmix --help` lists."""
    return re.findall(r"^ {2}(\w[\w-]*) {2,}\S", run_cli(["--help"], capsys), flags=re.MULTILINE)


def config_fields() -> dict[str, type[BaseModel]]:
    """Sections of the run file."""
    from unmix.run.config import RunConfig

    return {"": RunConfig}


def has_field(dotted: str) -> bool:
    """Whether a run file has a field at this path."""
    options: list[Any] = [config_fields()[""]]
    for part in dotted.split("."):
        fields = [model.model_fields[part].annotation for model in options if part in model.model_fields]
        if not fields:
            return False
        options = [model for field in fields for model in models_in(field)]
    return True


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The config classes in an annotation, through optionals and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def test_every_command_that_the_docs_name_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """And the pages name some, so that this test looks at something."""
    known = set(listed_commands(capsys))
    assert {"run", "view", "inspect"} <= known
    used = {(place, words[0]) for place, words in unmix_commands() if re.fullmatch(r"[a-z][\w-]*", words[0])}
    assert len(used) >= 8
    assert sorted(f"{place}: unmix {name}" for place, name in used if name not in known) == []


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """`unmix COMMAND --help` works for each command that is listed, and says how it is used."""
    for name in listed_commands(capsys):
        assert f"unmix {name}" in run_cli([name, "--help"], capsys), name


def test_every_flag_that_the_docs_name_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Dotted ones are fields of the run file, the others stand in the command's help."""
    from unmix.cli.index import SUBCOMMANDS

    general = run_cli(["--help"], capsys)
    known = set(listed_commands(capsys))
    wrong: list[str] = []
    for place, words in unmix_commands():
        flags = [word.split("=")[0] for word in words if word.startswith("--") and len(word) > 2]
        named = words[:2] if words[0] == "index" and {*words[1:2]} & {*SUBCOMMANDS} else words[:1]
        text = general + (run_cli([*named, "--help"], capsys) if words[0] in known else "")
        for flag in flags:
            fine = has_field(flag[2:]) if "." in flag else re.search(rf"{re.escape(flag)}\b", text) or flag == "--help"
            if not fine:
                wrong.append(f"{place}: unmix {' '.join(words)}: {flag}")
    assert wrong == []


def test_dotted_flags_in_prose_are_fields() -> None:
    """`--coder.k 64` in a sentence is a field of the run file."""
    found = {text.split()[0] for _, text in inline_code() if re.match(r"--[a-z_]+\.[a-z_.]+", text)}
    assert found
    assert [flag for flag in sorted(found) if not has_field(flag.split("=")[0][2:])] == []
    assert not has_field("coder.kk")


def test_run_files_in_the_docs_are_valid() -> None:
    """Every YAML block with a `model:` is a whole run file, or a part that validates as one."""
    from unmix.core.config import build

    shown = [block for block in blocks() if block.language in {"yaml", "yml"} and "model:" in block.text]
    assert shown
    for block in shown:
        build(config_fields()[""], yaml.safe_load(block.text), source=block.place)


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "python"], ids=lambda block: block.place)
def test_python_in_the_docs(block: Block) -> None:
    """It compiles, and every `unmix.name` in it is public."""
    import unmix

    tree = ast.parse(block.text, filename=block.place)
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "unmix"
    }
    assert sorted(names - set(dir(unmix))) == []


def test_public_names_load() -> None:
    """Whatever `dir(unmix)` promises is there."""
    import unmix

    assert [name for name in dir(unmix) if getattr(unmix, name, None) is None] == []


def test_make_targets_that_the_docs_name_exist() -> None:
    """`make demo` and friends."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    used = {(place, name) for place, line in shell_lines() for name in re.findall(r"^make ([a-z]+)", line)}
    assert {"demo", "test"} <= {name for _, name in used}
    assert sorted(f"{place}: make {name}" for place, name in used if name not in targets) == []


def test_modules_that_the_docs_run_exist() -> None:
    """`python -m benchmarks.x` is a file here."""
    used = {match for _, line in shell_lines() for match in re.findall(r"python -m (benchmarks[\w.]*)", line)}
    assert [name for name in sorted(used) if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


def test_paths_that_the_docs_name_exist() -> None:
    """Inline code that looks like a file of the project is one."""
    pattern = re.compile(r"(?:src|tests|docs|benchmarks|web|\.ci)/[\w./-]+")
    used = {text for _, text in inline_code() if pattern.fullmatch(text)}
    assert used
    assert [path for path in sorted(used) if not (ROOT / path).exists()] == []


def test_dotted_names_that_the_docs_name_import() -> None:
    """Inline code such as `unmix.core.plugins.Registry` resolves."""
    import importlib

    for name in {text for _, text in inline_code() if re.fullmatch(r"unmix(\.\w+){2,}", text)}:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name), name


def test_internal_links_resolve() -> None:
    """Files exist, and so do the headings that fragments point to."""
    broken: list[str] = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, fragment = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                broken.append(f"{page.name}: {target}")
            elif fragment and fragment not in headings(file):
                broken.append(f"{page.name}: {target} (no such heading)")
    assert broken == []


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation() -> None:
    """And the navigation has no page that is not there."""
    tree = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = {page for entry in tree["nav"] for page in entry.values()}
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


@cache
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def distribution(requirement: str) -> str:
    """`uvicorn>=0.34` → `uvicorn`, with the spelling that package names compare by."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]).lower()


def declared() -> set[str]:
    """Every distribution that pyproject.toml asks for."""
    table = project()["project"]
    groups = [table["dependencies"], *table["optional-dependencies"].values(), project()["build-system"]["requires"]]
    return {distribution(entry) for group in groups for entry in group} - {"unmix"}


def test_every_dependency_is_explained_and_nothing_else_is() -> None:
    """docs/dependencies.md, pyproject.toml and web/package.json list the same packages."""
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    explained = re.findall(r"^- \*\*([^*]+)\*\* —", text, flags=re.MULTILINE)
    front = json.loads((ROOT / "web" / "package.json").read_text(encoding="utf-8"))
    wanted = declared() | {*front.get("dependencies", {}), *front.get("devDependencies", {})}
    assert len(explained) == len(set(explained))
    assert {name if name.startswith("@") else distribution(name) for name in explained} == wanted


def test_constraints_pin_every_dependency() -> None:
    """Exact versions without local suffixes, sorted, each once."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in pins), pins
    names = [distribution(line) for line in pins]
    assert len(names) == len(set(names))
    assert [line.lower() for line in pins] == sorted(line.lower() for line in pins)
    assert sorted(declared() - set(names) - {"hatchling"}) == []


# Where the name to import is not the one to install; transformers' tokenizers are made of the package tokenizers.
IMPORTS = {"yaml": "pyyaml", "tokenizers": "transformers"}


def test_every_import_is_declared() -> None:
    """No module stands on a package that happens to be installed."""
    own = {"unmix", "benchmarks", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    own |= {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    core = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    # Run by hand with the interpreter of another project's own environment: they record its numbers.
    peers = {path for kind in ("make", "check") for path in (ROOT / "tests").rglob(f"{kind}_*.py")}
    wrong: set[str] = set()
    for file in set(core) - peers:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - own:
                if distribution(IMPORTS.get(name, name)) not in declared():
                    wrong.add(f"{file.relative_to(ROOT)}: {name}")
    assert sorted(wrong) == []


def test_every_format_has_its_row() -> None:
    """docs/formats.md: each format once, ⇄ where it is written and → where it is only read."""
    from unmix.formats.registry import FORMATS, format_of

    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (⇄|→) \|", text, flags=re.MULTILINE))
    assert rows == {name: "⇄" if format_of(name).writable else "→" for name in FORMATS.names()}


def test_saved_notebooks_show_today_s_code() -> None:
    """The pages of docs/examples hold every cell of the notebook that they were made from."""
    pages = sorted((ROOT / "docs" / "examples").glob("*.md"))
    assert [page.stem for page in pages] == ["evaluate_your_sae", "logit_lens", "steer_a_model"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        notebook = (ROOT / "examples" / f"{page.stem}.py").read_text(encoding="utf-8")
        cells = [part.partition("\n") for part in notebook.split("# %%")[1:]]
        for kind, _, body in cells:
            shown = body.strip()
            if "[markdown]" in kind:
                shown = "\n".join(line.removeprefix("#").removeprefix(" ") for line in shown.splitlines())
            assert shown in text, f"{page.name} is of older code; run examples/saved_output.py on the notebook"
