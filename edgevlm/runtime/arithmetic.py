"""The arithmetic of the vision encoder: chosen at load for the machine, so that one export serves every machine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgevlm.manifest import Submodel
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.cpu import INT8_PRODUCTS, available_memory, cpu_features

Graph: TypeAlias = Literal["exported", "compressed", "float32"]
FACTOR = 4
"""Weights are decompressed where more than this many times their float32 size is available, of memory and of the
compile cache, which would else drop other models for them. Loading SmolVLM-256M's encoder so takes 1.6 times that size
more than with INT8 weights."""
_BYTES = {"w8a8": 4, "int8": 4, "int4": 8}
"""Bytes of float32 weights for each byte of compressed ones, by the submodel's precision."""


@dataclass(frozen=True)
class ChosenArithmetic:
    """What a vision encoder computes with, and why."""

    graph: Graph
    """How its graph is loaded: as it was exported; with compressed weights and activations that are not quantized; or
    with float32 weights, too."""
    name: str
    """`W8A8`, `INT8 weights`, `FP32 weights`, ..."""
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_arithmetic(
    config: RuntimeConfig,
    submodel: Submodel,
    device: str,
    features: Callable[[], Collection[str]] = cpu_features,
    memory: Callable[[], int] = available_memory,
) -> ChosenArithmetic:
    """Return what the vision submodel computes with on `device`.

    `auto` is W8A8 as exported on a CPU with INT8 products (VNNI or AMX), and on every other device. On a CPU without
    them W8A8 takes 0.93 (SmolVLM-256M's shape) to 1.22 (panel) of the time of INT8 weights, and its sums saturate; so
    activations stay unquantized, and weights are decompressed where memory is plentiful (`FACTOR`). A CPU whose
    features are not known, such as an ARM, counts as one without: that may cost speed, and never accuracy. `features`
    and `memory` tell of the machine.
    """
    precision = submodel.precision
    if precision not in _BYTES:
        return ChosenArithmetic("exported", f"{precision.upper()} weights", "as exported")
    compressed = f"{'INT4' if precision == 'int4' else 'INT8'} weights"
    names: dict[Graph, str] = {
        "exported": "W8A8" if precision == "w8a8" else compressed,
        "compressed": compressed,
        "float32": "FP32 weights",
    }
    if config.vision_arithmetic == "auto":
        graph, reason = _suited(config, submodel, device, features, memory)
    else:
        graph, reason = config.vision_arithmetic, "as asked for"
    return ChosenArithmetic(graph, names[graph], reason)


def _suited(
    config: RuntimeConfig,
    submodel: Submodel,
    device: str,
    features: Callable[[], Collection[str]],
    memory: Callable[[], int],
) -> tuple[Graph, str]:
    """Return what suits the machine, and why."""
    if not device.startswith("CPU"):
        return "exported", f"as exported, on {device}"
    known = features()
    if found := [name for name in INT8_PRODUCTS if name in known]:
        return "exported", found[0] if submodel.precision == "w8a8" else "as exported"
    room = min(memory(), config.cache_limit_bytes) if config.cache else memory()
    if FACTOR * _BYTES[submodel.precision] * submodel.size_bytes < room:
        return "float32", "no VNNI: decompressed at load"
    return "compressed", "no VNNI: activations are not quantized; weights are too large to decompress"
