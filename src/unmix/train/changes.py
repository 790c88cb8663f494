"""What a folder of work was made from, and how a second call differs from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from unmix.core.atomic import write_json
from unmix.core.errors import CorruptError, ResumeError

NOTE = ".coder.training."


def claim(folder: Path, file: str, fields: Mapping[str, Any]) -> None:
    """Note in `folder/file` what the work there is made from; `ResumeError` names what an older note says otherwise.

    Also refuses a folder that holds other things and no note. `fields` are plain JSON values.
    """
    path = folder / file
    now = cast("dict[str, Any]", json.loads(json.dumps(fields)))
    if not path.is_file():
        foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        if foreign:
            raise ResumeError(f"{folder}: holds {foreign[0]!r} and no {file}, so it is not ours; choose another folder")
        write_json(path, now)
        return
    try:
        before = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptError(f"{path}: not JSON ({error})") from error
    changed = changed_fields(before, now)
    if changed:
        raise ResumeError(
            f"{folder}: was made with other settings ({changed}); choose another folder or remove this one"
        )


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any], shown: int = 6) -> str:
    """`model.layers: 4 → 6; seed: 0 → 1`: the fields in which two trees differ; empty where they are equal."""
    found = _differences(before, now, "")
    facts = [(name.rpartition(".")[2], _short(old), _short(new)) for name, old, new in found]
    # A coder's config notes the settings of its training beside them: one change, told once.
    told = {fact for (name, *_), fact in zip(found, facts, strict=True) if NOTE not in name}
    parts = [
        f"{name}: {fact[1]} → {fact[2]}"
        for (name, *_), fact in zip(found, facts, strict=True)
        if NOTE not in name or fact not in told
    ]
    return "; ".join(parts[:shown] + ([f"and {len(parts) - shown} more"] if len(parts) > shown else []))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    """`(dotted name, old, new)` of every difference; a branch that one side lacks is one."""
    found: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            branches = cast("tuple[Mapping[str, Any], Mapping[str, Any]]", (old, new))
            found += _differences(*branches, f"{prefix}{name}.")
        elif old != new:
            found.append((prefix + name, old, new))
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
