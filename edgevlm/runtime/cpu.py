"""What the CPU can do."""

from __future__ import annotations

from functools import cache

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


@cache
def cpu_features() -> tuple[str, ...]:
    """Return those of the instruction sets that matter here which this CPU has; none where archspec cannot tell."""
    from archspec.cpu.detect import detected_info

    features = detected_info().features
    return tuple(name for name in _ISA if name in features)
