"""The ledger: one SQLite file with a row for every explanation and every score that was asked for.

A row is pending, running, done or failed. The schema itself refuses a failed row with text or figures. Write-ahead
logging, so that several processes may work on one ledger and a killed one loses nothing that it had committed (after
a power cut the last commits may be missing, never half there).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from unmix.core.errors import ConfigError, CorruptError, MachineError, ResumeError
from unmix.explain.clients.calls import Reply
from unmix.explain.migrations import MIGRATIONS
from unmix.explain.owners import is_gone, this_process
from unmix.explain.results import Draft, Figures
from unmix.explain.rows import Explanation, ExplanationKey, Score, ScoreKey, explanation_row, score_row

Table = Literal["explanations", "scores"]
_NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"


class Ledger:
    """An open ledger; made where there is none. May be shared by threads, one call at a time.

    Raises:
        ResumeError: made by a newer version.
        CorruptError: not a ledger.
        ConfigError: `read_only` and there is no such file.
    """

    def __init__(self, path: str | Path, read_only: bool = False) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._owner = this_process()
        if read_only and not self.path.is_file():
            raise ConfigError(f"{self.path}: no such ledger")
        if not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._faults():
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            if read_only:
                self._db.execute("PRAGMA query_only = ON")
            else:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._migrate(read_only)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # -- asking for work

    def ask_explanations(self, keys: Iterable[ExplanationKey], config: Mapping[str, Any]) -> list[int]:
        """Ids of the rows of `keys`, in order; rows that do not exist yet are made, pending."""
        columns = ("coder", "coder_hash", "index_hash", "latent", "method", "config_hash", "sample")
        identity = columns[1:]
        return self._ask(
            "explanations", columns, identity, [tuple(getattr(k, c) for c in columns) for k in keys], config
        )

    def ask_scores(self, keys: Iterable[ScoreKey], config: Mapping[str, Any]) -> list[int]:
        """The same for scores."""
        columns = ("explanation_id", "index_hash", "method", "config_hash", "sample")
        return self._ask("scores", columns, columns, [tuple(getattr(k, c) for c in columns) for k in keys], config)

    def _ask(
        self, table: Table, columns: Sequence[str], identity: Sequence[str], keys: list[tuple[Any, ...]],
        config: Mapping[str, Any],
    ) -> list[int]:  # fmt: skip
        text = json.dumps(config, sort_keys=True, allow_nan=False)
        marks = ", ".join("?" * (len(columns) + 1))
        insert = f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}, config, status) VALUES ({marks}, 'pending')"
        find = f"SELECT id FROM {table} WHERE {' AND '.join(f'{c} = ?' for c in identity)}"
        skipped = len(columns) - len(identity)
        with self._write():
            self._db.executemany(insert, [(*key, text) for key in keys])
            return [int(self._db.execute(find, key[skipped:]).fetchone()[0]) for key in keys]

    def adopt(self, table: Table) -> int:
        """Give the running rows of dead processes back to be done; how many there were."""
        with self._write():
            rows = self._db.execute(f"SELECT DISTINCT owner FROM {table} WHERE status = 'running'").fetchall()
            back = f"UPDATE {table} SET status = 'pending', owner = NULL WHERE status = 'running' AND owner = ?"
            return sum(self._db.execute(back, (row[0],)).rowcount for row in rows if is_gone(row[0]))

    def retry_failed(self, table: Table, ids: Sequence[int]) -> int:
        """Make the failed rows among `ids` pending again; how many there were."""
        with self._write():
            changed = 0
            for id in ids:
                changed += self._db.execute(
                    f"UPDATE {table} SET status = 'pending', error = NULL, message = NULL, raw = NULL "
                    "WHERE id = ? AND status = 'failed'",
                    (id,),
                ).rowcount
            return changed

    def claim(self, table: Table, id: int) -> bool:
        """Take a pending row; False where it is not pending (done, failed, or another process was first)."""
        with self._faults(), self._lock:
            taken = self._db.execute(
                f"UPDATE {table} SET status = 'running', owner = ?, attempts = attempts + 1, updated = {_NOW} "
                "WHERE id = ? AND status = 'pending'",
                (self._owner, id),
            )
            return taken.rowcount == 1

    # -- ending work

    def finish(self, table: Table, id: int, result: Draft | Figures, replies: Sequence[Reply] = ()) -> None:
        """A running row of this process is done. `ValueError` for a blank text or a figure that is not finite."""
        if isinstance(result, Draft):
            if not result.text.strip():
                raise ValueError("a blank text is a failure, not an explanation")
            values = {"text": result.text, "data": _json(result.data)}
        else:
            values = {"figures": _json(result.values), "counted": _json(result.counted)}
        self._end(table, id, "done", values, replies)

    def fail(self, table: Table, id: int, kind: str, message: str, replies: Sequence[Reply] = ()) -> None:
        """A running row of this process failed: its class, what was wrong, and the raw replies. No text, no figures."""
        self._end(table, id, "failed", {"error": kind, "message": message[:2000]}, replies)

    def release(self, table: Table, id: int) -> None:
        """Give a running row of this process back undone; the attempt does not count."""
        with self._faults(), self._lock:
            self._db.execute(
                f"UPDATE {table} SET status = 'pending', owner = NULL, attempts = attempts - 1 "
                "WHERE id = ? AND status = 'running' AND owner = ?",
                (id, self._owner),
            )

    def _end(self, table: Table, id: int, status: str, values: dict[str, str], replies: Sequence[Reply]) -> None:
        costs = [reply.cost for reply in replies if reply.cost is not None]
        fields: dict[str, Any] = {
            "status": status,
            "owner": None,
            "raw": _json([reply.text for reply in replies]) if replies else None,
            "cost": sum(costs) if costs else None,
            **values,
        }
        changes = ", ".join(f"{name} = ?" for name in fields)
        spent = (sum(r.prompt_tokens for r in replies), sum(r.completion_tokens for r in replies))
        with self._faults(), self._lock:
            done = self._db.execute(
                f"UPDATE {table} SET {changes}, prompt_tokens = prompt_tokens + ?, "
                f"completion_tokens = completion_tokens + ?, updated = {_NOW} "
                "WHERE id = ? AND status = 'running' AND owner = ?",
                (*fields.values(), *spent, id, self._owner),
            )
            if done.rowcount != 1:
                raise ResumeError(f"{self.path}: row {id} of {table} is not held by this process, so it cannot end it")

    # -- reading

    def explanations(self, **where: Any) -> list[Explanation]:
        """Rows whose columns have the given values (`latent=3, method="ngram", status="done"`), by latent and id."""
        rows = self._select("explanations", where, "latent, id")
        return [explanation_row(row) for row in rows]

    def scores(self, **where: Any) -> list[Score]:
        """Rows whose columns have the given values, by explanation and id."""
        return [score_row(row) for row in self._select("scores", where, "explanation_id, id")]

    def states(self, table: Table, ids: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        """`{id: (status, error class)}` of some rows."""
        with self._faults(), self._lock:
            rows = self._db.execute(f"SELECT id, status, error FROM {table}").fetchall()
        wanted = set(ids)
        return {row["id"]: (row["status"], row["error"]) for row in rows if row["id"] in wanted}

    def _select(self, table: Table, where: Mapping[str, Any], order: str) -> list[sqlite3.Row]:
        with self._faults(), self._lock:
            known = {row["name"] for row in self._db.execute(f"PRAGMA table_info({table})")}
            for name in where:
                if name not in known:
                    raise ConfigError(f"{table} have no column {name!r}; they have {', '.join(sorted(known))}")
            clause = " AND ".join(f"{name} = ?" for name in where) or "1"
            query = f"SELECT * FROM {table} WHERE {clause} ORDER BY {order}"
            return self._db.execute(query, tuple(where.values())).fetchall()

    # -- inside

    def _migrate(self, read_only: bool) -> None:
        with self._lock:
            if not read_only:
                self._db.execute("CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied TEXT NOT NULL)")
            names = {row[0] for row in self._db.execute("SELECT name FROM migrations")}
        known = [name for name, _ in MIGRATIONS]
        if unknown := sorted(names.difference(known)):
            raise ResumeError(
                f"{self.path}: made by a newer version of unmix (step {unknown[0]}); update unmix to read it"
            )
        missing = [step for step in MIGRATIONS if step[0] not in names]
        if read_only and missing:
            raise ResumeError(
                f"{self.path}: made by an older version of unmix; open it once for writing to bring it up"
            )
        for name, script in missing:
            with self._write():
                if self._db.execute("SELECT 1 FROM migrations WHERE name = ?", (name,)).fetchone():
                    continue
                for statement in script.split(";"):
                    if statement.strip():
                        self._db.execute(statement)
                self._db.execute(f"INSERT INTO migrations VALUES (?, {_NOW})", (name,))

    @contextmanager
    def _write(self) -> Generator[None]:
        """One transaction; other processes wait."""
        with self._faults(), self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _faults(self) -> Generator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.OperationalError as error:
            raise MachineError(f"{self.path}: the ledger cannot be used ({error})") from error
        except sqlite3.DatabaseError as error:
            raise CorruptError(f"{self.path}: not a ledger, or a broken one ({error})") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
