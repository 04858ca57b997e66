"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from edgevlm.errors import ExportError

_PARTIAL = ".{name}.partial-{pid}"
_REPLACED = ".{name}.replaced-{pid}"
_LEFTOVER = re.compile(r"\.(?:partial|replaced)-(\d+)$")


@contextmanager
def draft_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a hidden folder beside `target` that becomes `target` by one rename when the block ends well.

    On any error or interrupt it is deleted and `target` stays what it was. What a killed export left behind is
    cleared away by the next one. Raises `ExportError` when `target` exists and `force` is off.
    """
    if target.exists() and not force:
        raise ExportError(f"{target} exists already; use --force to replace it, or -o for another folder")
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; an export is a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        draft = target.with_name(_PARTIAL.format(name=target.name, pid=os.getpid()))
        draft.mkdir()
    except OSError as error:
        raise ExportError(f"cannot write to {target.parent}: {error.strerror or error}") from None
    try:
        yield draft
        _sync(draft)
        _swap(draft, target)
    except OSError as error:
        raise ExportError(f"writing the export failed: {error.strerror or error}; {target} is as it was") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, target: Path) -> None:
    if not target.exists():
        draft.rename(target)
        return
    replaced = target.with_name(_REPLACED.format(name=target.name, pid=os.getpid()))
    target.rename(replaced)
    try:
        draft.rename(target)
    except OSError:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have every file on the disk before the rename, so that a power cut cannot leave an empty one behind."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _clear_leftovers(target: Path) -> None:
    """Delete what exports of `target` that no longer run left; put back a folder that was being replaced."""
    for path in target.parent.glob(f".{target.name}.*"):
        found = _LEFTOVER.search(path.name)
        if not found or psutil.pid_exists(int(found[1])):
            continue
        if ".replaced-" in path.name and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
