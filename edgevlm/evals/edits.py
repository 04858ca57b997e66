"""What is done to a picture so that the answer to a question about it becomes another."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from edgevlm.evals.drawing import as_picture, font
from edgevlm.families.base import RGB

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""
Load: TypeAlias = Callable[[str], RGB]
"""Returns the picture of a name as it is, whatever was done to the one at hand."""
_SOFT_EDGE = 1.5
"""Pixels over which what is pasted passes into what is beneath."""


class _Edit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do"):
    """One change of a picture; `do` in a row of JSON names it."""


class Mirror(_Edit, frozen=True, tag="mirror"):
    """Left and right change sides."""

    def __call__(self, picture: RGB, load: Load) -> RGB:  # noqa: ARG002
        """Return the picture, flipped."""
        return np.ascontiguousarray(picture[:, ::-1])


class Hue(_Edit, frozen=True, tag="hue"):
    """All hues are turned, red by 120 degrees to green and by 240 to blue; greys stay."""

    by: int

    def __call__(self, picture: RGB, load: Load) -> RGB:  # noqa: ARG002
        """Return the picture in other colours."""
        hue, saturation, value = Image.fromarray(picture).convert("HSV").split()
        steps = round(self.by * 256 / 360)
        turned = hue.point([(level + steps) % 256 for level in range(256)])
        return as_picture(Image.merge("HSV", (turned, saturation, value)))


class Negative(_Edit, frozen=True, tag="negative"):
    """Bright and dark change places."""

    def __call__(self, picture: RGB, load: Load) -> RGB:  # noqa: ARG002
        """Return the negative."""
        return np.asarray(255 - picture, np.uint8)


class Paste(_Edit, frozen=True, tag="paste"):
    """A part of a picture is laid over a box, scaled to it: an object is added, or painted out."""

    of: str
    part: Box
    onto: Box
    shape: Literal["box", "round"] = "box"
    mirrored: bool = False

    def __call__(self, picture: RGB, load: Load) -> RGB:
        """Return the picture with the part in it."""
        image, (left, top, right, bottom) = Image.fromarray(picture), self.onto
        source = Image.fromarray(load(self.of)).crop(self.part)
        if self.mirrored:
            source = source.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        over = image.copy()
        over.paste(source.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        mask = Image.new("L", image.size)
        draw = ImageDraw.Draw(mask)
        (draw.ellipse if self.shape == "round" else draw.rectangle)((left, top, right - 1, bottom - 1), fill=255)
        return as_picture(Image.composite(over, image, mask.filter(ImageFilter.GaussianBlur(_SOFT_EDGE))))


class Write(_Edit, frozen=True, tag="write"):
    """A white label with black text is put on, centred at a point."""

    text: str
    at: tuple[int, int]
    size: int = 28
    PADDING: ClassVar[float] = 0.3

    def __call__(self, picture: RGB, load: Load) -> RGB:  # noqa: ARG002
        """Return the picture with the label."""
        image = Image.fromarray(picture)
        draw, letters = ImageDraw.Draw(image), font(self.size)
        left, top, right, bottom = draw.textbbox(self.at, self.text, letters, anchor="mm")
        room = self.PADDING * self.size
        draw.rectangle((left - room, top - room, right + room, bottom + room), fill="white", outline="black", width=2)
        draw.text(self.at, self.text, fill="black", font=letters, anchor="mm")
        return as_picture(image)


Edit: TypeAlias = Mirror | Hue | Negative | Paste | Write


def edited(picture: RGB, edits: tuple[Edit, ...], load: Load) -> RGB:
    """Return a picture after one edit and the next."""
    for edit in edits:
        picture = edit(picture, load)
    return picture
