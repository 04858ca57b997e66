"""Crash-safe JSON Lines files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from edgevlm.errors import OutputError
from edgevlm.strict_json import read_json, write_json

Row: TypeAlias = dict[str, Any]
_BLOCK = 2**20


def read_rows(path: Path, offset: int = 0) -> list[tuple[Row, int]]:
    """Return the complete rows of a file from `offset`, each with its size in bytes; none if there is no file.

    Raises `OutputError` for a file that holds anything else.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}") from None
    rows = []
    for line in data[: _whole(data)].splitlines(keepends=True):
        row = _parse(line)
        if not isinstance(row, dict):
            raise OutputError(f"{path} holds something other than answers; choose another file, or delete it")
        rows.append((row, len(line)))
    return rows


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows and sync them to disk, after truncating what a crash left of an incomplete row."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        tail = _last_rows(file, end)
        file.truncate(end - len(tail) + _whole(tail))
        file.write(b"".join(write_json(row).encode() + b"\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _last_rows(file: BinaryIO, end: int) -> bytes:
    """Return the end of a file of `end` bytes, from before its last whole row on; all of it if it has none."""
    size = 0
    while True:
        size = min(end, size * 2 or _BLOCK)
        file.seek(end - size)
        tail = file.read()
        if size == end or tail.count(b"\n", 0, _whole(tail)) > 1:
            return tail


def beside(path: Path, ending: str) -> Path:
    """Return an output's path with `ending` added to its name. Raises `OutputError` for a path without a name."""
    if path.name in {"", ".."}:
        raise OutputError(f"{path} is a folder; name a file in it for the answers")
    return path.with_name(path.name + ending)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of writing into an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; nothing is lost, run the same command again"
        ) from None


def _whole(data: bytes) -> int:
    """Return the length of `data` without an incomplete last row."""
    end = data.rfind(b"\n") + 1
    last = data[data.rfind(b"\n", 0, max(0, end - 1)) + 1 : end]
    # A power cut may leave a row's length on the disk and not what was in it.
    return end - len(last) if last and not last.strip(b"\0\n") else end


def _parse(line: bytes) -> Any:
    try:
        return read_json(line)
    except ValueError:
        return None
