"""Text becomes token shards once; the same command finds them again."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from unmix.core.atomic import sweep
from unmix.core.config import semantic_dict
from unmix.core.errors import ConfigError, DataError, ResumeError
from unmix.core.lock import folder_lock
from unmix.core.manifest import MANIFEST, refuse_foreign
from unmix.core.policy import InputPolicy
from unmix.core.progress import log
from unmix.data.config import DataConfig
from unmix.data.shards import KIND, TokenShards
from unmix.data.tokenise import tokenise, tokenizer_hash

PAUSE = 0.5
"""Seconds between two looks at a folder that another process fills."""


def tokens_folder(out: Path) -> Path:
    """Where the tokens of the index at `out` lie: `RUN/tokens` of `RUN/index`, `FOLDER/x-tokens` of any other name."""
    return out.parent / ("tokens" if out.name == "index" else f"{out.name}-tokens")


def is_tokens(place: str) -> bool:
    """Whether `place` is a folder of token shards."""
    path = Path(place).expanduser()
    return (path / MANIFEST).is_file() and f'"kind": "{KIND}"' in (path / MANIFEST).read_text(encoding="utf-8")[:200]


def prepare_tokens(config: DataConfig, tokenizer: Any, folder: Path, restart: bool = False) -> TokenShards:
    """The shards of `config` at `folder`: those that lie there, else made now.

    Several processes may ask at once: one makes them, the others wait. `ResumeError` where other tokens lie there,
    naming what differs; with `restart` they are made anew. A killed call leaves nothing and begins anew.
    """
    making = folder.parent / f".{folder.name}.making"
    waited = False
    while True:
        if (folder / MANIFEST).is_file() and not restart:
            return _same(folder, config, tokenizer)
        try:
            with folder_lock(making):
                if not (folder / MANIFEST).is_file() or restart:
                    refuse_foreign(folder, KIND)
                    sweep(folder)
                    tokenise(config, tokenizer, folder)
                    restart = False
            shutil.rmtree(making, ignore_errors=True)
        except ResumeError:
            if not waited:
                log.info("tokens: another process writes them; waiting for it")
            waited, restart = True, False
            time.sleep(PAUSE)


def _same(folder: Path, config: DataConfig, tokenizer: Any) -> TokenShards:
    shards = TokenShards.open(folder)
    shards.verify()
    old, new = semantic_dict(shards.config), semantic_dict(config)
    changed = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if shards.tokenizer_hash != tokenizer_hash(tokenizer):
        changed.append("the model's tokenizer is another one")
    if changed:
        raise ResumeError(
            f"{folder}: holds tokens made otherwise: {'; '.join(changed)}. Say --restart to make them (and the index) "
            "anew, or choose another --out"
        )
    return shards


def require_place(out: Path) -> None:
    """`ConfigError` where `out` cannot be the folder of an index."""
    if out.is_file():
        raise ConfigError(f"--out {out}: is a file, expected a folder for the index")
    if out.is_dir() and any(out.iterdir()) and not (out / "index.json").is_file():
        hint = f"; say --out {out / 'index'}" if (out / "run.yaml").is_file() or (out / "coders").is_dir() else ""
        raise ConfigError(f"--out {out}: is not empty and holds no index{hint}")


def open_tokens(folder: Path, policy: InputPolicy, tokenizer: Any) -> TokenShards:
    """Shards that were made before. `DataError` where they were made with another tokenizer or policy."""
    shards = TokenShards.open(folder)
    shards.verify()
    if shards.tokenizer_hash != tokenizer_hash(tokenizer):
        raise DataError(f"--data {folder}: these tokens were made with another model's tokenizer")
    for field in InputPolicy.model_fields:
        found, wanted = getattr(shards.policy, field), getattr(policy, field)
        if found != wanted:
            raise DataError(
                f"--data {folder}: these tokens were made with {field} {found!r}, the coders were trained with "
                f"{wanted!r}"
            )
    return shards
