"""What differs between model families at export: one module each, the same keys as the runtime's table."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.families import (
    gemma3,
    gemma4,
    granite_docling,
    idefics3,
    internvl,
    lfm2_vl,
    lighton_ocr,
    llava,
    llava_onevision,
    minicpm,
    qwen_vl,
)
from edgevlm_export.families.base import Architecture, FamilyExporter
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

__all__ = [
    "FAMILIES",
    "Architecture",
    "FamilyExporter",
    "UnsupportedError",
    "architecture",
    "exporter",
    "family_config",
]

FAMILIES: dict[str, FamilyExporter] = {
    "gemma3": gemma3.EXPORTER,
    "gemma4": gemma4.EXPORTER,
    "granite_docling": granite_docling.EXPORTER,
    "idefics3": idefics3.EXPORTER,
    "internvl": internvl.EXPORTER,
    "lfm2_vl": lfm2_vl.EXPORTER,
    "lighton_ocr": lighton_ocr.EXPORTER,
    "llava": llava.EXPORTER,
    "llava_onevision": llava_onevision.EXPORTER,
    "minicpmv4_6": minicpm.EXPORTER,
    "qwen2_5_vl": qwen_vl.EXPORTER,
    "qwen2_vl": qwen_vl.EXPORTER,
    "qwen3_5": qwen_vl.EXPORTER,
    "qwen3_vl": qwen_vl.EXPORTER,
    "smolvlm": idefics3.EXPORTER,
}

_NOT_BUILT: Mapping[str, str] = {
    "gemma3_text": "a Gemma 3 that takes no pictures",
    "gemma3n": "Gemma 3n, whose encoders and per-layer embeddings are not built",
}
"""Relatives of the families that are taken for them, and what they are."""


def exporter(checkpoint: Checkpoint) -> FamilyExporter:
    """Return what knows the checkpoint's family. Raises `SourceError`."""
    if checkpoint.model_type not in FAMILIES:
        known, kind = ", ".join(sorted(FAMILIES)), checkpoint.model_type
        named = f"{kind!r} ({_NOT_BUILT[kind]})" if kind in _NOT_BUILT else repr(kind)
        raise SourceError(f"{checkpoint.source} is of family {named}; edgevlm exports {known}")
    return FAMILIES[checkpoint.model_type]


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return what the runtime must know about the checkpoint's family, and the image processor's settings as read.

    Raises `SourceError`.
    """
    return exporter(checkpoint).family_config(checkpoint)


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:
    """Return the model as graphs of the tensors called so.

    Raises `SourceError`, and `UnsupportedError` where there are none.
    """
    if any(checkpoint.config.get(key) is not None for key in ("quantization_config", "quantization")):  # of MLX
        raise SourceError("the checkpoint is quantized already; take the original one")
    return exporter(checkpoint).architecture(checkpoint, facts, tensors)
