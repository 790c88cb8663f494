"""What all latents of an open index share beyond its files: made on first use, kept while the index is open."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from unmix.index.cache import Keys
from unmix.index.documents import DocumentTable, find_documents
from unmix.index.layout import IndexMeta
from unmix.index.similar import Texts, open_texts
from unmix.index.store import TokenStore


class SharedStore(TokenStore):
    """The token store of an open index, with the tables that are derived from it."""

    def __init__(self, folder: Path, meta: IndexMeta) -> None:
        super().__init__(folder, meta)
        self.keys = Keys.of(folder, meta.context)

    @cached_property
    def document_table(self) -> DocumentTable:
        """Where each document lies. One pass over the document ids: about 1 s for 100 M positions."""
        return find_documents(self)

    @cached_property
    def texts(self) -> Texts:
        """The text index behind negatives of the kind "similar"; made once and kept in a cache beside the index."""
        return open_texts(self, self.keys.text())
