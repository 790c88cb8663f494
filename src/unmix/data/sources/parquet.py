"""Parquet files, read in batches of rows (extra `parquet`)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unmix.core.errors import DataError, missing_extra
from unmix.data.config import ChatConfig, DataConfig
from unmix.data.sources.base import Document, Source, missing_column, record_document
from unmix.data.sources.lines import check_file, data_suffix

_ROWS = 1024


class Parquet(Source):
    """One document a row, from `config.column`; null or blank texts are passed over."""

    holds_ids = True

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.path = Path(config.source).expanduser()
        check_file(self.path)
        if find_spec("pyarrow") is None:
            raise missing_extra("pyarrow", "parquet", f"reading {self.path}")
        with self._open() as file:
            columns = list(file.schema_arrow.names)
            self.rows = int(file.metadata.num_rows)
        for column in self._columns():
            if column not in columns:
                raise missing_column(str(self.path), column, columns, config)
        if self.rows == 0:
            raise DataError(f"{self.path}: the file has no rows")

    @classmethod
    def claims(cls, source: str) -> bool:
        return data_suffix(source) == ".parquet" and not Path(source).expanduser().is_dir()

    def documents(self) -> Iterator[Document]:
        row = 0
        with self._open() as file:
            for batch in self._batches(file):
                for record in batch:
                    row += 1
                    source = f"{self.path.name}:{row}"
                    document = record_document(record, self.config, f"{self.path}: row {row}", source)
                    if document is not None:
                        yield document

    def report(self) -> dict[str, Any]:
        return {"kind": "parquet", "path": self.path.name, "column": self.config.column, "rows": self.rows}

    def _columns(self) -> list[str]:
        tools = self.config.chat.tools_column if isinstance(self.config, ChatConfig) else None
        wanted = [self.config.column, self.config.label_column, tools]
        return list(dict.fromkeys(column for column in wanted if column is not None))

    def _open(self) -> Any:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(self.path)
        except (ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not a Parquet file ({error})") from error

    def _batches(self, file: Any) -> Iterator[list[dict[str, Any]]]:
        from pyarrow import ArrowException

        try:
            for batch in file.iter_batches(batch_size=_ROWS, columns=self._columns()):
                yield batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise DataError(f"{self.path}: a damaged Parquet file ({error})") from error
