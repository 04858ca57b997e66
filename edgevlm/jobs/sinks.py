"""Sinks for the answers of `edgevlm watch`: a JSON Lines file or an SQLite database, consistent after a kill."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from filelock import FileLock, Timeout

from edgevlm.errors import OutputError
from edgevlm.jobs.jsonl import Row, append_rows, beside, read_rows, writing
from edgevlm.strict_json import write_json

_COLUMNS = {
    "time": "TEXT NOT NULL",
    "path": "TEXT NOT NULL",
    "sha256": "TEXT",
    "size": "INTEGER NOT NULL",
    "mtime_ns": "INTEGER NOT NULL",
    "job": "TEXT NOT NULL",
    "question": "TEXT NOT NULL",
    "answer": "TEXT",
    "reasoning_content": "TEXT",
    "value": "TEXT",
    "probabilities": "TEXT",
    "finish_reason": "TEXT",
    "error": "TEXT",
    "seconds": "REAL",
}

_INSERT = f"INSERT OR IGNORE INTO answers ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' for _ in _COLUMNS)})"  # noqa: S608
_FIND = "SELECT 1 FROM answers WHERE job = ? AND path = ?"


class AnswerSink(Protocol):
    """Stores rows by picture and job; raises `OutputError` where it cannot."""

    @property
    def path(self) -> Path:
        """The file; names of its companions begin with its name."""
        ...

    def __enter__(self) -> AnswerSink: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def seen_file(self, job: str, path: str, size: int, mtime_ns: int) -> bool:
        """Return whether this version of a file has been answered, by size and modification time."""
        ...

    def seen_content(self, job: str, path: str, sha256: str) -> bool:
        """Return whether these bytes have been answered under this name."""
        ...

    def add(self, row: Row) -> None:
        """Append a row and sync it to disk."""
        ...


class JsonlSink:
    """A JSON Lines file, written by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(beside(path, ".lock"))
        self._files: set[tuple[str, str, int, int]] = set()
        self._pictures: set[tuple[str, str, str]] = set()

    def __enter__(self) -> JsonlSink:
        with writing(self.path):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise OutputError(f"another process is writing {self.path}; end it first") from None
        for row, _ in read_rows(self.path):
            self._note(row)
        with writing(self.path):
            append_rows(self.path, [])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        with suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def seen_file(self, job: str, path: str, size: int, mtime_ns: int) -> bool:
        return (job, path, size, mtime_ns) in self._files

    def seen_content(self, job: str, path: str, sha256: str) -> bool:
        return (job, path, sha256) in self._pictures

    def add(self, row: Row) -> None:
        with writing(self.path):
            append_rows(self.path, [row])
        self._note(row)

    def _note(self, row: Row) -> None:
        try:
            self._files.add((row["job"], row["path"], row["size"], row["mtime_ns"]))
            hashes = row["sha256"] if isinstance(row["sha256"], list) else [row["sha256"]]  # a text in older files
            self._pictures.update((row["job"], row["path"], sha256) for sha256 in hashes)
        except KeyError:
            raise OutputError(f"{self.path} holds other rows; choose another file, or delete it") from None


class SqliteSink:
    """A table `answers` in an SQLite database, which others may read meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> SqliteSink:
        columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
        with self._cursor() as database:
            # Write-ahead logging lets others read while this process writes; FULL puts each row onto the disk.
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute(
                f"CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, {columns}, UNIQUE (job, path, sha256))"
            )
            database.execute("CREATE INDEX IF NOT EXISTS answers_file ON answers (job, path, size, mtime_ns)")
            there = {name for _, name, *_ in database.execute("PRAGMA table_info (answers)")}
            if "reasoning_content" not in there:  # a table that is older than thoughts
                database.execute("ALTER TABLE answers ADD COLUMN reasoning_content TEXT")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._database:
            self._database.close()

    def seen_file(self, job: str, path: str, size: int, mtime_ns: int) -> bool:
        return self._finds(f"{_FIND} AND size = ? AND mtime_ns = ?", job, path, size, mtime_ns)

    def seen_content(self, job: str, path: str, sha256: str) -> bool:
        return self._finds(f"{_FIND} AND sha256 = ?", job, path, sha256)

    def add(self, row: Row) -> None:
        values = [
            write_json(row[name]) if name in {"value", "probabilities"} and name in row
            else next(iter(row.get(name, ())), None) if name == "sha256"
            else row.get(name)
            for name in _COLUMNS
        ]  # fmt: skip
        with self._cursor() as database:
            database.execute(_INSERT, values)

    def _finds(self, query: str, *values: object) -> bool:
        with self._cursor() as database:
            return bool(database.execute(query, values).fetchone())

    @contextmanager
    def _cursor(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection for one transaction."""
        try:
            if self._database is None:
                self._database = sqlite3.connect(self.path, timeout=30)
            with self._database:
                yield self._database
        except sqlite3.Error as error:
            raise OutputError(f"cannot use the database {self.path}: {error}") from None
