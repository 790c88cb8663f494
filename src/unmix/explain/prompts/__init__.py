"""Prompts as files: `NAME.vN.md`, the system part, a line `===`, the user part. A released prompt never changes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from unmix.core.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Prompt:
    """A prompt template; `fill` puts values at `{{name}}`."""

    name: str
    system: str
    user: str

    @property
    def digest(self) -> str:
        """Hash of the text, which enters the hash of the config."""
        return hashlib.sha256(f"{self.system}\x1f{self.user}".encode()).hexdigest()[:12]

    def fill(self, **values: str) -> str:
        """The user part; every `{{name}}` must be given, and values are not looked into."""
        pieces = self.user.split("{{")
        filled = [pieces[0]]
        for piece in pieces[1:]:
            name, _, rest = piece.partition("}}")
            filled += [values[name], rest]
        return "".join(filled)


def load_prompt(name: str) -> Prompt:
    """A prompt by file name without its ending; `ConfigError` where there is none."""
    folder = resources.files(__name__)
    known = sorted(item.name.removesuffix(".md") for item in folder.iterdir() if item.name.endswith(".md"))
    if name not in known:
        raise ConfigError(f"no prompt {name!r}. {did_you_mean(name, known)}")
    system, mark, user = (folder / f"{name}.md").read_text(encoding="utf-8").partition("\n===\n")
    if not mark:
        raise ConfigError(f"prompt {name!r} has no line === between its two parts")
    return Prompt(name, system.strip(), user.strip())
