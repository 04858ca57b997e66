"""The instruction sets of this machine's CPU."""

from __future__ import annotations

ISA = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
"""The instruction sets that matter to matrix products, as archspec names them."""


def cpu_features() -> list[str]:
    """Return those of `ISA` that this CPU has."""
    from archspec.cpu.detect import detected_info

    features = detected_info().features
    return [name for name in ISA if name in features]
