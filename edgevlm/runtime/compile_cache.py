"""Compiled models on disk: bounded, and never trusted when damaged.

OpenVINO writes a blob into the folder it is given. It notices a truncated one by itself, but not one whose pages a
power cut left as zeros; so each blob's size and CRC-32 are kept beside it and checked before OpenVINO may read it.
OpenVINO by itself would hash graph and weights at every start to find a blob. Here names tell instead, so that a warm
start reads no IR: the entry's folder is named for one submodel of one export, `made_of` for all else that the graph is
made of, and the blob for the device and the options.
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
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from edgevlm.errors import DeviceError
from edgevlm.runtime.core import core, first_line, import_openvino

if TYPE_CHECKING:
    import openvino as ov

SUMS = "sums.json"
logger = logging.getLogger(__name__)


def compile_cached(
    read: Callable[[], ov.Model],
    device: str,
    properties: dict[str, Any],
    entry: Path | None,
    limit_bytes: int,
    made_of: str = "",
) -> ov.CompiledModel:
    """Return the model that `read` returns, compiled, with `entry` as its cache folder.

    `made_of` names what the model depends on: where it was compiled and cached under the same name before, that is
    imported, and nothing is read. None, or a folder that cannot be written, means no cache. Raises `DeviceError`, and
    what `read` raises.
    """
    if entry is not None:
        try:
            return _compile_through(entry, read, device, properties, limit_bytes, made_of)
        except OSError as error:
            logger.warning("compiled models are not cached: %s", error)
        except RuntimeError as error:
            logger.info("compiling without the cache after: %s", first_line(error))
    try:
        return core().compile_model(read(), device, properties)
    except RuntimeError as error:
        raise DeviceError(f"{device} cannot run this model: {first_line(error)}") from None


def _compile_through(
    entry: Path,
    read: Callable[[], ov.Model],
    device: str,
    properties: dict[str, Any],
    limit_bytes: int,
    made_of: str,
) -> ov.CompiledModel:
    """Compile with `entry` as the cache folder. Raises `OSError`, or `RuntimeError` of OpenVINO's."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    number = _blob_id(device, properties)
    blob = entry / f"{number}.blob"
    cached = properties | {"CACHE_DIR": str(entry), "CACHE_BLOB_ID": number}
    # OpenVINO crashes on a blob that another process is still writing.
    with FileLock(entry.with_name(f".{entry.name}.lock")):
        entry.mkdir(exist_ok=True)
        if not os.access(entry, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(entry))
        os.utime(entry)
        compiled = _import(blob, device, cached, made_of)
        if compiled is None:
            compiled = core().compile_model(read(), device, cached)
            _seal(blob, made_of)
        prune(entry.parent, limit_bytes, keep=entry)
    return compiled


def _blob_id(device: str, properties: dict[str, Any]) -> int:
    """Return a number for the options of a compiled model and for the device, as OpenVINO's own numbers are."""
    names = {"DEVICE_ARCHITECTURE", "FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"}
    facts = {}
    with suppress(RuntimeError):
        names |= set(core().get_property(device, "CACHING_PROPERTIES"))  # such as the version of a GPU's driver
    for name in names:
        with suppress(RuntimeError):  # not every device has every property
            facts[name] = str(core().get_property(device, name))
    text = json.dumps([device, facts, properties], sort_keys=True, default=str)
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1  # OpenVINO's Python takes 63 bits


def _import(blob: Path, device: str, cached: dict[str, Any], made_of: str) -> ov.CompiledModel | None:
    """Return the compiled model of a blob, or None; a blob that is damaged or outdated is deleted."""
    if not blob.is_file():
        return None
    if _read_sums(blob.parent).get(blob.name) == [*_sum(blob), made_of]:
        nothing = import_openvino().Model([], [], "nothing")  # stands for a model that need not be read
        with suppress(RuntimeError):
            compiled = core().compile_model(nothing, device, cached)
            if compiled.get_property("LOADED_FROM_CACHE"):
                return compiled
            del compiled  # of another OpenVINO: what was compiled, and cached, is the nothing
    logger.info("rebuilding the damaged or outdated cache entry %s", blob)
    blob.unlink(missing_ok=True)
    return None


def _seal(blob: Path, made_of: str) -> None:
    """Record size, CRC-32 and `made_of` of a blob that OpenVINO wrote."""
    entry = blob.parent
    there = {path.name for path in _blobs(entry)}
    sums = {name: record for name, record in _read_sums(entry).items() if name in there - {blob.name}}
    if blob.name in there:
        sums[blob.name] = [*_sum(blob), made_of]
    draft = entry / f"{SUMS}.{os.getpid()}"
    draft.write_text(json.dumps(sums), encoding="utf-8")
    draft.replace(entry / SUMS)


def _blobs(entry: Path) -> list[Path]:
    return [path for path in entry.iterdir() if path.is_file() and not path.name.startswith(SUMS)]


def _read_sums(entry: Path) -> dict[str, list[int | str]]:
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
    """Delete the longest unused entries of `folder` until it holds at most `limit_bytes`.

    `keep` and the other submodels of its model always stay: a model larger than the limit would else be compiled at
    every start.
    """
    entries = sorted((path for path in folder.iterdir() if path.is_dir()), key=_last_used)
    sizes = {entry: folder_size(entry) for entry in entries}
    total = sum(sizes.values())
    for entry in entries:
        if total <= limit_bytes:
            return
        if keep is None or _model(entry) != _model(keep):
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def _model(entry: Path) -> str:
    """Return what an entry's name has before the submodel: the export's fingerprint."""
    return entry.name.partition("-")[0]


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
