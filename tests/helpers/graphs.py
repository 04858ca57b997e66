"""What OpenVINO's CPU plugin made of a graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm import VLM
from edgevlm.runtime.cpu import INT8_PRODUCTS, cpu_features
from tests.conftest import F32


def runtime_kinds(compiled: Any) -> Counter[str]:
    """Return the layer types that the plugin made of a model."""
    return Counter(node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops())


def check_fused(folder: Path) -> None:
    """Two layers: four products each and the head; attention with its KV cache in one node; no weight decompressed."""
    paged, stateful = (
        runtime_kinds(VLM(folder, replace(F32, kv_cache=kind)).language_model._compiled)
        for kind in ("paged", "stateful")
    )
    assert paged["PagedAttention"] == stateful["ScaledDotProductAttention"] == 2
    assert stateful["MemoryInput"] == stateful["MemoryOutput"] == 2 * 2
    assert paged["MemoryInput"] == paged["ScaledDotProductAttention"] == 0
    for kinds in (paged, stateful):
        assert kinds["FullyConnected"] == 2 * 4 + 1
        assert kinds["MatMul"] <= 1  # the angles of RoPE, where they are a product
        assert kinds["RMS"] == 2 * 2 + 1
        assert kinds["RoPE"] == 2 * 2


def check_tower_fused(vlm: VLM, layers: int, quantized: bool = False) -> None:
    """The vision part: four products a layer and two of the projector; attention in one node each.

    A CPU with VNNI and without AVX-512 takes attention of quantized activations apart.
    """
    paged = VLM(vlm.folder, replace(F32, kv_cache="paged"))
    vision, language = runtime_kinds(vlm.vision._compiled), runtime_kinds(paged.language_model._compiled)
    assert vision["FullyConnected"] == layers * 4 + 2
    if not quantized or "avx512f" in cpu_features():
        assert vision["Softmax"] == vision["MatMul"] == 0
    assert language["FullyConnected"] == 2 * 4 + 1
    assert language["PagedAttention"] == 2
    assert language["RMS"] == 2 * 2 + 1
    assert language["RoPE"] == 2 * 2


def least_w8a8_cosine() -> float:
    """Without VNNI a CPU adds products of quantized activations in 16 bits, where they saturate."""
    return 0.99 if set(INT8_PRODUCTS) & set(cpu_features()) else 0.97
