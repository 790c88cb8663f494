"""Token ids in a NumPy array: `.npy`, `[rows, ids]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unmix.core.errors import DataError
from unmix.data.config import DataConfig
from unmix.data.sources.base import Document, Source
from unmix.data.sources.lines import check_file, data_suffix


class IdArray(Source):
    """One row of the array after the other, read through a memory map; it has no columns."""

    holds_ids = True

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.path = Path(config.source).expanduser()
        if config.tokenised is None:
            raise DataError(f"{self.path}: an array of token ids; set data.tokenised: rows (or documents)")
        check_file(self.path)
        try:
            self._rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"{self.path}: not a readable .npy file ({error})") from error
        if self._rows.ndim != 2 or self._rows.dtype.kind not in "iu" or not self._rows.size:
            raise DataError(
                f"{self.path}: {self._rows.dtype} {list(self._rows.shape)}, expected whole numbers [rows, ids]"
            )

    @classmethod
    def claims(cls, source: str) -> bool:
        return data_suffix(source) == ".npy" and not Path(source).expanduser().is_dir()

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows, 1):
            yield Document("", f"{self.path.name}:{number}", None, tuple(row.tolist()))

    def report(self) -> dict[str, Any]:
        return {"kind": "ids", "path": self.path.name, "rows": len(self._rows), "ids": int(self._rows.shape[1])}
