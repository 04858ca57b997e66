"""What differs between model families at run time: one module each, one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from edgevlm.errors import DamagedModelError
from edgevlm.families.base import DecoderTraits, Detail, Family, ImageBudget, LanguageInputs, View, Visual

__all__ = [
    "FAMILIES",
    "LOCATING",
    "DecoderTraits",
    "Detail",
    "Family",
    "ImageBudget",
    "LanguageInputs",
    "View",
    "Visual",
    "make_family",
]


def _load(module: str, name: str, facts: Mapping[str, Any]) -> Family:
    """Set up the class `name` of a family's module, which is imported now: a process runs one family."""
    family: Family = getattr(import_module(f"{__name__}.{module}"), name)(facts)
    return family


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Family]] = {
    "gemma3": partial(_load, "gemma3", "Gemma3"),
    "gemma4": partial(_load, "gemma4", "Gemma4"),
    "granite_docling": partial(_load, "granite_docling", "GraniteDocling"),
    "idefics3": partial(_load, "idefics3", "Idefics3"),
    "internvl": partial(_load, "internvl", "InternVL"),
    "lfm2_vl": partial(_load, "lfm2_vl", "Lfm2VL"),
    "lighton_ocr": partial(_load, "lighton_ocr", "LightOnOcr"),
    "llava": partial(_load, "llava", "Llava"),
    "llava_onevision": partial(_load, "llava_onevision", "LlavaOnevision"),
    "minicpmv4_6": partial(_load, "minicpm", "MiniCPM"),
    "qwen2_5_vl": partial(_load, "qwen_vl", "QwenVL"),
    "qwen2_vl": partial(_load, "qwen_vl", "QwenVL"),
    "qwen3_5": partial(_load, "qwen_vl", "QwenVL"),
    "qwen3_vl": partial(_load, "qwen_vl", "QwenVL"),
    "smolvlm": partial(_load, "idefics3", "Idefics3"),
}
LOCATING = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and the bundled panel"
"""The models whose families have a `grounding`, in words."""


def make_family(name: str, facts: Mapping[str, Any]) -> Family:
    """Return the family called `name` set up from the manifest's facts about it. Raises `DamagedModelError`."""
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise DamagedModelError(f"the model's family {name!r} is unknown to this edgevlm; it knows {known}")
    try:
        return FAMILIES[name](facts)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedModelError(f"the manifest's facts about family {name!r} are incomplete: {error!r}") from None
