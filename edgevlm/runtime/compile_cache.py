"""Compiled models on disk: bounded, and never trusted when damaged.

OpenVINO writes a blob into the folder it is given. It notices a truncated one by itself, but not one whose pages a
power cut left as zeros; so each blob's size and CRC-32 are kept beside it and checked before OpenVINO may read it.
A lock keeps processes that start at once from reading what another of them is still writing.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from filelock import FileLock

from edgevlm.errors import DeviceError
from edgevlm.runtime.core import core, first_line

if TYPE_CHECKING:
    import openvino as ov

SUMS = "sums.json"
_Checked: TypeAlias = tuple[int, list[int]]
"""When a blob was written, in ns, and its sum."""
logger = logging.getLogger(__name__)


def compile_cached(
    model: ov.Model, device: str, properties: dict[str, Any], entry: Path | None, limit_bytes: int
) -> ov.CompiledModel:
    """Compile `model` with `entry` as its cache folder; None, or a folder that cannot be written, means no cache.

    Raises `DeviceError`.
    """
    if entry is not None:
        try:
            return _compile_through(entry, model, device, properties, limit_bytes)
        except OSError as error:
            logger.warning("compiled models are not cached: %s", error)
        except RuntimeError as error:
            logger.info("compiling without the cache after: %s", first_line(error))
    try:
        return core().compile_model(model, device, properties)
    except RuntimeError as error:
        raise DeviceError(f"{device} cannot run this model: {first_line(error)}") from None


def _compile_through(
    entry: Path, model: ov.Model, device: str, properties: dict[str, Any], limit_bytes: int
) -> ov.CompiledModel:
    """Compile with `entry` as the cache folder. Raises `OSError`, or `RuntimeError` of OpenVINO's."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    # OpenVINO crashes on a blob that another process is still writing.
    with FileLock(entry.with_name(f".{entry.name}.lock")):
        checked = _prepare(entry)
        compiled = core().compile_model(model, device, properties | {"CACHE_DIR": str(entry)})
        _seal(entry, checked)
        prune(entry.parent, limit_bytes, keep=entry)
    return compiled


def _prepare(entry: Path) -> dict[str, _Checked]:
    """Make the folder, delete what is damaged in it and return its sound blobs. Raises `OSError`."""
    entry.mkdir(exist_ok=True)
    if not os.access(entry, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(entry))
    checked: dict[str, _Checked] = {}
    sums = _read_sums(entry)
    for blob in _blobs(entry):
        written, found = blob.stat().st_mtime_ns, _sum(blob)
        if sums.get(blob.name) == found:
            checked[blob.name] = written, found
        else:
            logger.info("rebuilding damaged cache entry %s", blob)
            blob.unlink()
    os.utime(entry)
    return checked


def _seal(entry: Path, checked: Mapping[str, _Checked]) -> None:
    """Record size and CRC-32 of the blobs, reading only those that OpenVINO wrote since they were checked."""
    sums = {}
    for blob in _blobs(entry):
        written, found = checked.get(blob.name, (None, []))
        sums[blob.name] = found if written == blob.stat().st_mtime_ns else _sum(blob)
    if sums != _read_sums(entry):
        draft = entry / f"{SUMS}.{os.getpid()}"
        draft.write_text(json.dumps(sums), encoding="utf-8")
        draft.replace(entry / SUMS)


def _blobs(entry: Path) -> list[Path]:
    return [path for path in entry.iterdir() if path.is_file() and not path.name.startswith(SUMS)]


def _read_sums(entry: Path) -> dict[str, list[int]]:
    try:
        sums = json.loads((entry / SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return sums if isinstance(sums, dict) else {}


def _sum(blob: Path) -> list[int]:
    size = blob.stat().st_size
    if not size:
        return [0, 0]
    with blob.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return [size, zlib.crc32(data)]


def prune(folder: Path, limit_bytes: int, keep: Path | None = None) -> None:
    """Delete the longest unused entries of `folder` until it holds at most `limit_bytes`; `keep` always stays."""
    entries = sorted((path for path in folder.iterdir() if path.is_dir()), key=_last_used)
    sizes = {entry: folder_size(entry) for entry in entries}
    total = sum(sizes.values())
    for entry in entries:
        if total <= limit_bytes:
            return
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def _last_used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:  # another process deleted it
        return 0.0


def folder_size(folder: Path) -> int:
    """Return the bytes of all files under `folder`; one that another process deletes meanwhile counts for nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(root) / name).stat().st_size
    return total
