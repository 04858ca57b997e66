"""How a family's models are asked where something is, and how they write it down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grounding:
    """A family's convention for places in a picture, in the words that its models were trained with.

    An answer is `opening`, the places with `separator` between them, and `closing`; or `opening` and `none`.
    `{label}` in these texts stands for what is looked for, without its article, as a JSON string; `<|name|>` is a
    special token of the tokenizer.
    """

    question: str
    """`{phrase}` stands for what is looked for, `{noun}` for that without its article."""
    place: tuple[str, ...]
    """The texts around the coordinates of one place: five around x1, y1, x2, y2 of a box, three around a point."""
    scale: int | None
    """Coordinates run from 0 to this power of ten along each side; None: they are pixels of the resized picture."""
    opening: str = ""
    separator: str = ""
    closing: str = ""
    none: str | None = None
    """What follows the opening where nothing is found; None: the model always names a place."""
    most: int | None = None
    """The most places of an answer, where the convention has a limit."""


def json_boxes(question: str, scale: int | None) -> Grounding:
    """Return the convention of a fenced JSON list of `{"bbox_2d": [x1, y1, x2, y2], "label": ...}`."""
    return Grounding(
        question,
        ('\n\t{"bbox_2d": [', ", ", ", ", ", ", '], "label": {label}}'),
        scale,
        opening="```json\n[",
        separator=",",
        closing="\n]\n```",
        none="]\n```",
    )
