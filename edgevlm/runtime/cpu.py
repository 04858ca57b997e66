"""What the CPU can do, and how much memory is left for a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

INT8_PRODUCTS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx_vnni_int8")
"""Instruction sets that multiply INT8 and add in 32 bits, the quickest first. Without them OpenVINO adds pairs of
products in 16 bits, where they saturate."""
_ISA = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx_vnni_int8",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@cache
def cpu_features() -> tuple[str, ...]:
    """Return those of the instruction sets that matter here which this CPU has; none where archspec cannot tell."""
    from archspec.cpu.detect import detected_info

    features = detected_info().features
    return tuple(name for name in _ISA if name in features)


def available_memory() -> int:
    """Return the bytes that this process may still allocate without swapping.

    A container or a systemd unit (`MemoryMax=`) may hold it to less than the machine has.
    """
    import psutil

    return min([psutil.virtual_memory().available, *cgroup_rooms(_MEMBERSHIP, _CGROUPS)])


def cgroup_rooms(membership: Path, root: Path) -> Iterator[int]:
    """Yield the bytes left in each cgroup (v2) with a limit, from that named in `membership` up to `root`.

    The page cache counts as used there, so there may be more.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for path in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        for folder in (root / path, *(root / path).parents):
            with suppress(OSError, ValueError):  # no such file, or "max"
                limit = int((folder / "memory.max").read_text(encoding="utf-8"))
                yield limit - int((folder / "memory.current").read_text(encoding="utf-8"))
