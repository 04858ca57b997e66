"""Compiled models on disk: bounded, and never trusted when damaged.

OpenVINO writes a blob into the folder it is given. It notices a truncated one by itself, but not one whose pages a
power cut left as zeros; so each blob's size and CRC-32 are kept beside it and checked before OpenVINO may read it.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.device import core, first_line
from edgevlm.errors import DeviceError

if TYPE_CHECKING:
    import openvino as ov

SUMS = "sums.json"
logger = logging.getLogger(__name__)


def compile_cached(
    model: ov.Model, device: str, properties: dict[str, Any], entry: Path | None, limit_bytes: int
) -> ov.CompiledModel:
    """Compile `model` with `entry` as its cache folder; None, or a folder that cannot be written, means no cache.

    Raises `DeviceError`.
    """
    usable = entry is not None and _prepare(entry)
    try:
        compiled = core().compile_model(model, device, properties | ({"CACHE_DIR": str(entry)} if usable else {}))
    except RuntimeError as error:
        raise DeviceError(f"{device} cannot run this model: {first_line(error)}") from None
    if entry is not None and usable:
        _seal(entry)
        prune(entry.parent, limit_bytes, keep=entry)
    return compiled


def _prepare(entry: Path) -> bool:
    """Make the folder, delete what is damaged in it, and tell whether it can be used."""
    try:
        entry.mkdir(parents=True, exist_ok=True)
        sums = _read_sums(entry)
        for blob in _blobs(entry):
            if sums.get(blob.name) != _sum(blob):
                logger.info("rebuilding damaged cache entry %s", blob)
                blob.unlink()
        os.utime(entry)
    except OSError as error:
        logger.warning("compiled models are not cached: %s", error)
        return False
    return os.access(entry, os.W_OK)


def _seal(entry: Path) -> None:
    """Record size and CRC-32 of the blobs, if they changed."""
    try:
        names = {blob.name: blob for blob in _blobs(entry)}
        if set(_read_sums(entry)) == set(names):
            return
        sums = {name: _sum(blob) for name, blob in names.items()}
        draft = entry / f"{SUMS}.{os.getpid()}"
        draft.write_text(json.dumps(sums), encoding="utf-8")
        draft.replace(entry / SUMS)
    except OSError as error:
        logger.warning("compiled models are not cached: %s", error)


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
    entries = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {entry: folder_size(entry) for entry in entries}
    total = sum(sizes.values())
    for entry in entries:
        if total <= limit_bytes:
            return
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def folder_size(folder: Path) -> int:
    """Return the bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
