"""What differs between model families at export: one module each, the same keys as the runtime's table."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.checkpoint import Checkpoint
from edgevlm_export.config import Section, UncoveredError
from edgevlm_export.families import idefics3, internvl
from edgevlm_export.families.base import Architecture

__all__ = ["FAMILIES", "GRAPHS", "Architecture", "UncoveredError", "architecture", "family_facts"]

FAMILIES: dict[str, Callable[[Checkpoint], tuple[dict[str, Any], Section]]] = {
    "idefics3": idefics3.family_facts,
    "internvl": internvl.family_facts,
    "smolvlm": idefics3.family_facts,
}
GRAPHS: dict[str, Callable[[Checkpoint, Mapping[str, Any], Container[str]], Architecture]] = {
    "idefics3": idefics3.architecture,
    "internvl": internvl.architecture,
    "smolvlm": idefics3.architecture,
}
"""The families that the native route covers."""


def family_facts(checkpoint: Checkpoint) -> tuple[dict[str, Any], Section]:
    """Return what the runtime must know about the checkpoint's family, and the image processor's settings as read.

    Raises `SourceError`.
    """
    if checkpoint.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise SourceError(f"{checkpoint.source} is of family {checkpoint.model_type!r}; edgevlm exports {known}")
    return FAMILIES[checkpoint.model_type](checkpoint)


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:
    """Return the model as graphs of the tensors called so.

    Raises `SourceError`, and `UncoveredError` where there are none.
    """
    if checkpoint.model_type not in GRAPHS:
        raise UncoveredError(f"the native route does not cover family {checkpoint.model_type!r}")
    if checkpoint.config.get("quantization_config") is not None:
        raise SourceError("the checkpoint is quantized already; take the original one")
    return GRAPHS[checkpoint.model_type](checkpoint, facts, tensors)
