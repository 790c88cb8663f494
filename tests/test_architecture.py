"""The house stays as it was drawn: imports point down, files stay small, `--help` stays light."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "unmix"

# From the top of the house to its cellar. A room may use itself and the rooms after it.
ROOMS = (
    "cli", "run", "viewer", "explain", "evaluate", "index", "train", "lm", "data", "formats", "metrics", "coder",
    "core",
)  # fmt: skip
# Tighter than the order alone: these know coders, and nothing else that stands between.
ONLY = {"formats": {"formats", "coder", "core"}, "metrics": {"metrics", "coder", "core"}}
# The public face of the package looks at every room (lazily); no room looks back at it, except for the version.
FACE = {"", "_version", "__main__"}
# Arrows that point up on purpose: (file, room) → why. Each must be in use.
UPWARD: dict[tuple[str, str], str] = {
    ("coder/sparse_coder.py", "formats"): "coder.convert and coder.push_to_hub, facades imported on call (decision 6)",
}

MAX_LINES = 400
HEAVY = {
    "torch", "transformers", "numpy", "datasets", "pyarrow", "gguf", "safetensors", "interp_engine", "accelerate",
    "huggingface_hub", "starlette", "uvicorn", "httpx",
}  # fmt: skip


def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    """`coder` for src/unmix/coder/codes.py; the empty string or the module's name for files beside the rooms."""
    parts = file.relative_to(PACKAGE).parts
    if len(parts) > 1:
        return parts[0]
    return "" if parts[0] == "__init__.py" else parts[0].removesuffix(".py")


def references(file: Path) -> Iterator[tuple[int, str]]:
    """`(line, room)` of everything in `file` that names a module of unmix.

    Imports count wherever they stand, inside functions too; so do strings such as "unmix.lm.load:load_model", which
    lazy exports and plug-ins resolve later.
    """
    package = ["unmix", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names] if start == "unmix" else [start]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = re.fullmatch(r"unmix\.(\w+)(\.\w+)*(:\w+)?", node.value)
            names = [match[0]] if match and match[1] in ROOMS else []  # entry point groups look alike: unmix.formats
        for name in names:
            parts = name.split(":")[0].split(".")
            if parts[0] == "unmix":
                yield getattr(node, "lineno", 0), parts[1] if len(parts) > 1 else ""


def allowed(room: str) -> set[str]:
    """The rooms that `room` may use."""
    return ONLY.get(room, set(ROOMS[ROOMS.index(room) :])) | {"_version"}


def test_every_folder_is_a_room_of_the_plan() -> None:
    """A new room is drawn into the order above, and into docs/architecture.md, before it is built."""
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert found == set(ROOMS)
    drawn = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [room for room in ROOMS if f"`{room}`" not in drawn] == []


def test_imports_point_down_only() -> None:
    """Folders are the architecture: a lower room never learns of a higher one."""
    wrong: list[str] = []
    used: set[tuple[str, str]] = set()
    for file in sources():
        room = room_of(file)
        if room in FACE:
            continue
        name = file.relative_to(PACKAGE).as_posix()
        for line, target in references(file):
            if target in allowed(room):
                continue
            if (name, target) in UPWARD:
                used.add((name, target))
            else:
                wrong.append(f"{name}:{line} ({room}) uses unmix.{target}")
    assert wrong == []
    assert used == set(UPWARD), "an exception that nobody needs any more"


@pytest.mark.parametrize(
    ("line", "room"),
    [
        ("import unmix.lm.hooks", "lm"),
        ("from unmix.train import trainer", "train"),
        ("from unmix import index", "index"),
        ("from ..viewer import app", "viewer"),
        ("from .. import cli", "cli"),
        ("def late():\n    from unmix.explain.ledger import Ledger", "explain"),
        ("EXPORTS = {'load': 'unmix.formats.loading'}", "formats"),
        ("ENTRY = 'unmix.run.walk:walk'", "run"),
    ],
)
def test_an_arrow_up_is_seen(line: str, room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of imports above finds each way of writing one."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    file = tmp_path / "core" / "low.py"
    file.parent.mkdir()
    file.write_text(line, encoding="utf-8")
    assert [target for _, target in references(file)] == [room]
    assert room not in allowed("core")


def test_files_stay_short() -> None:
    """One file, one idea."""
    files = [*sources(), *(p for p in (ROOT / "web" / "src").rglob("*") if p.suffix in {".svelte", ".ts"})]
    long = {
        file.relative_to(ROOT).as_posix(): lines
        for file in files
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}


def test_the_library_prints_nothing() -> None:
    """Results go to stdout through the command line's own writer, everything else through `logging`."""
    calls = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after `code` ran."""
    probe = f"import sys, json\n{code}\nsys.stderr.write('\\n@' + json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stderr.rsplit("\n@", 1)[1])}


@pytest.mark.parametrize(
    "code",
    [
        "import unmix",
        "import unmix; unmix.__version__; dir(unmix)",
        "from unmix.core import errors, config, policy",
        "from unmix.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code",
    ],
    ids=["import", "dir", "core", "help"],
)
def test_heavy_packages_wait_for_their_first_use(code: str) -> None:
    """`import unmix` and `unmix --help` answer at once: torch alone would take longer than a second."""
    assert modules_after(code) & HEAVY == set()


def tracked() -> list[Path]:
    """The files that git keeps; outside a checkout (a source archive), every file that is not generated."""
    done = subprocess.run(["git", "ls-files", "-z"], check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    generated = {".venv", "site", "runs", "build", "dist", "node_modules", ".cache", ".git", "__pycache__"}
    found = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in found if not generated & set(path.relative_to(ROOT).parts)]


# Put together here, so that this file does not hold what it looks for.
LOCAL = re.compile(
    "|".join(
        [
            "/(?:" + "|".join(["wor" + "k", "far" + "m", "roo" + "t"]) + ")/",
            "pyp" + r"i\.or" + "g",
            "python" + "hosted",
            "registry" + r"\.npm",
            "far" + "m-(?:studio|bench)",
        ]
    )
)


def test_no_tracked_file_names_a_machine_or_a_registry() -> None:
    """The project works anywhere: no absolute path of somebody's machine, no package host written down."""
    found: list[str] = []
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if match := LOCAL.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []


def test_the_pattern_of_local_names_bites() -> None:
    """Each alternative of the pattern above finds what it is for."""
    for word in ("/wor" + "k/main", "https://pyp" + "i.org/simple", "https://registry" + ".npmjs", "/roo" + "t/.cache"):
        assert LOCAL.search(word)
    assert LOCAL.search("the work/life of a farm") is None


def test_no_tracked_file_is_large() -> None:
    """Weights, corpora and recordings are fetched or made, never committed."""
    large = {str(f.relative_to(ROOT)): f.stat().st_size for f in tracked() if f.stat().st_size > 1_000_000}
    assert large == {}


def test_shapes_are_checked_while_tests_run() -> None:
    """The annotations of `unmix` are true because this suite calls it with a checker on every function."""
    import torch

    from unmix.coder.codes import Codes

    indices = torch.zeros(3, 2, dtype=torch.long)
    Codes.from_topk(indices, torch.ones(3, 2), 10)
    with pytest.raises(TypeCheckError, match="values"):
        Codes.from_topk(indices, torch.ones(3, 3), 10)
