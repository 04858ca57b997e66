"""Atomic folders: an export appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

import psutil

from edgevlm.errors import ExportError
from edgevlm.model_store import MANIFEST

_PARTIAL = ".{name}.partial-{pid}"
_REPLACED = ".{name}.replaced-{pid}"
_LEFTOVER = re.compile(r"\.(?:partial|replaced)-(\d{1,9})$")


@contextmanager
def atomic_folder(target: Path, source: Path, *, force: bool) -> Iterator[Path]:
    """Yield a hidden folder beside `target` that becomes `target` by one rename when the block ends well.

    On any error or interrupt it is deleted and `target` stays what it was. What a killed export left behind is
    cleared away by the next one. Raises `ExportError`, at once where `check_target` does.
    """
    check_target(target, source, force=force)
    target = Path(os.path.realpath(target))  # a link stays, and what it leads to is replaced
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        staging = target.with_name(_PARTIAL.format(name=target.name, pid=os.getpid()))
        staging.mkdir()
    except OSError as error:
        raise ExportError(f"cannot write to {target}: {error.strerror or error}") from None
    try:
        yield staging
        _sync(staging)
        check_target(target, source, force=force)  # it may have come, or been filled, in the meantime
        _swap(staging, target)
    except OSError as error:
        raise ExportError(f"writing the export failed: {error.strerror or error}; {target} is as it was") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, source: Path, *, force: bool) -> None:
    """Raise `ExportError` where `target` is taken, unless `force` may replace it: an export, or an empty folder.

    Never replaced are the checkpoint `source`, what it lies in or what lies in it, and the current folder.
    """
    real = Path(os.path.realpath(target))
    try:
        names = {path.name: path.is_dir() for path in real.iterdir()}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ExportError(f"{target} is a file, or lies in one; an export is a folder") from None
    except OSError as error:
        raise ExportError(f"cannot use {target}: {error.strerror or error}; choose another folder with -o") from None
    elsewhere = "choose another folder with -o"
    if _is_within(source, real) or _is_within(real, source):
        raise ExportError(f"{target} is the checkpoint's folder, holds it or lies in it; {elsewhere}")
    if _is_within(Path.cwd(), real):
        raise ExportError(f"{target} is the current folder or holds it, and cannot be replaced; {elsewhere}")
    foreign = sorted(name for name, is_folder in names.items() if is_folder or MANIFEST not in names)
    if foreign:  # no export holds a folder; one kept under version control does
        raise ExportError(f"{target} holds {foreign[0]!r}, which no export wrote, so it is not replaced; {elsewhere}")
    if not force:
        raise ExportError(f"{target} exists already; use --force to replace it, or -o for another folder")


def _is_within(path: Path, folder: Path) -> bool:
    """Tell whether `path` is `folder` or lies in it, by what the file system says; neither has to be there."""
    real = Path(os.path.realpath(path))
    for each in (real, *real.parents):
        try:
            if each.samefile(folder):
                return True
        except OSError:
            continue
    return False


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    replaced = target.with_name(_REPLACED.format(name=target.name, pid=os.getpid()))
    target.rename(replaced)
    try:
        staging.rename(target)
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
    for path in target.parent.glob(f".{escape(target.name)}.*"):
        found = _LEFTOVER.search(path.name)
        if not found or psutil.pid_exists(int(found[1])):
            continue
        if ".replaced-" in path.name and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
