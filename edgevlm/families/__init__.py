"""What differs between model families at run time: one module each, one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgevlm.errors import DamagedModelError
from edgevlm.families import idefics3, internvl, llava, llava_onevision
from edgevlm.families.base import DecoderTraits, Detail, Family, ImageBudget, LanguageInputs, View, Visual

__all__ = [
    "FAMILIES",
    "DecoderTraits",
    "Detail",
    "Family",
    "ImageBudget",
    "LanguageInputs",
    "View",
    "Visual",
    "make_family",
]

FAMILIES: dict[str, Callable[[Mapping[str, Any]], Family]] = {
    "idefics3": idefics3.Idefics3,
    "internvl": internvl.InternVL,
    "llava": llava.Llava,
    "llava_onevision": llava_onevision.LlavaOnevision,
    "smolvlm": idefics3.Idefics3,
}


def make_family(name: str, facts: Mapping[str, Any]) -> Family:
    """Return the family called `name` set up from the manifest's facts about it. Raises `DamagedModelError`."""
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise DamagedModelError(f"the model's family {name!r} is unknown to this edgevlm; it knows {known}")
    try:
        return FAMILIES[name](facts)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedModelError(f"the manifest's facts about family {name!r} are incomplete: {error!r}") from None
