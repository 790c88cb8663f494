"""Run a percent-format notebook and save it with its output as a page: `python examples/saved_output.py NOTEBOOK PAGE`.

Cells begin with `# %%`, cells of prose with `# %% [markdown]`. Jupyter, VS Code and others open the same files. The
page shows each cell of code and what it printed, with the value of its last line where that is an expression.
"""

from __future__ import annotations

import ast
import contextlib
import io
import sys
from pathlib import Path
from typing import Any


def cells(text: str) -> list[tuple[str, str]]:
    """(kind, body) of every cell; kinds are "markdown" and "code"."""
    found: list[tuple[str, str]] = []
    for part in text.split("# %%")[1:]:
        first, _, body = part.partition("\n")
        if "[markdown]" in first:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip()))
    return found


def output(code: str, names: dict[str, Any]) -> str:
    """What a cell prints, and the value of its last line."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            if value is not None:
                sys.stdout.write(f"{value!r}\n")
    return printed.getvalue()


def page(notebook: Path) -> str:
    """The notebook run from top to bottom, as Markdown."""
    names: dict[str, Any] = {"__name__": "__main__"}
    parts: list[str] = []
    for kind, body in cells(notebook.read_text(encoding="utf-8")):
        if kind == "markdown":
            parts.append(body)
            continue
        parts.append(f"```python\n{body}\n```")
        if said := output(body, names).rstrip():
            parts.append(f"```text\n{said}\n```")
    parts.append(f"*Run from `examples/{notebook.name}`.*")
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> None:
    """Write the page."""
    if len(arguments) != 2:
        sys.exit("usage: python examples/saved_output.py NOTEBOOK.py PAGE.md")
    Path(arguments[1]).write_text(page(Path(arguments[0])), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
