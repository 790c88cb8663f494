"""Documents from whatever `DataConfig.source` names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unmix.core.errors import DataError
from unmix.data.config import ChatConfig, DataConfig
from unmix.data.sources import SOURCES
from unmix.data.sources.base import Document, Source
from unmix.data.sources.id_array import IdArray
from unmix.data.sources.lines import data_suffix

ALLOWED = "a .txt, .md, .rst, .jsonl (each also .gz) or .parquet file, a folder of them, hf:NAME or builtin:python-docs"
OF_CHATS = "rows with messages: a .jsonl or .parquet file, a folder of them, or hf:NAME"
OF_IDS = "a .jsonl, .parquet or .npy file, a folder of them, or hf:NAME"


def find_source(config: DataConfig) -> Source:
    """The source that `config.source` names, checked. `DataError` where it is missing, empty, binary or unknown."""
    for name in SOURCES.names():
        kind: type[Source] = SOURCES.get(name)
        if kind.claims(config.source):
            if config.tokenised is not None and not kind.holds_ids:
                raise DataError(f"{config.source}: holds text, and data.tokenised needs token ids: {OF_IDS}")
            if isinstance(config, ChatConfig) and (not kind.holds_ids or kind is IdArray):
                raise DataError(f"{config.source}: holds no conversations; expected {OF_CHATS}")
            source = kind(config)
            _check_first(source, config)
            return source
    path = Path(config.source).expanduser()
    if not path.exists():
        raise DataError(f"{config.source}: no such file or folder; expected {ALLOWED}")
    raise DataError(f"{config.source}: unknown suffix {data_suffix(path)!r}; expected {ALLOWED}")


def open_corpus(config: DataConfig) -> Iterator[Document]:
    """The documents of `config.source`; the source is checked at this call, before the first document is asked for."""
    return find_source(config).documents()


def _check_first(source: Source, config: DataConfig) -> None:
    """`DataError` where contexts are to be cut from rows and the first row is shorter than one."""
    first = next(source.documents(), None) if config.tokenised == "rows" else None
    lead = 1 if config.policy.bos == "context" else 0
    if first is not None and len(first.ids or ()) < config.context - lead:
        raise DataError(
            f"{first.source}: {len(first.ids or ())} ids, too few for one context of {config.context}; "
            "give a shorter data.context, or set data.tokenised: documents to pack rows together"
        )
