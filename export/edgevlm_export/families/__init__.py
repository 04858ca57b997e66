"""What differs between model families at export: one module each, the same keys as the runtime's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.checkpoint import Checkpoint
from edgevlm_export.families import idefics3

FAMILIES: dict[str, Callable[[Checkpoint], dict[str, Any]]] = {
    "idefics3": idefics3.family_facts,
    "smolvlm": idefics3.family_facts,
}


def family_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the runtime must know about the checkpoint's family. Raises `SourceError`."""
    if checkpoint.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise SourceError(f"{checkpoint.source} is of family {checkpoint.model_type!r}; edgevlm exports {known}")
    return FAMILIES[checkpoint.model_type](checkpoint)
