"""What the suites draw with: a canvas, and text in Pillow's own font, the same on every machine."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edgevlm.families.base import RGB


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's bundled font."""
    return ImageFont.load_default(size)


def as_picture(image: Image.Image) -> RGB:
    """Return a drawing as a picture."""
    return np.asarray(image.convert("RGB"))


def written(text: str, width: int = 512, size: int = 24, columns: int = 36) -> RGB:
    """Return text on a white sheet, lines broken at `columns` characters."""
    lines = [part for line in text.splitlines() for part in (textwrap.wrap(line, columns) or [""])]
    line_height = round(size * 1.4)
    sheet = Image.new("RGB", (width, max(width, line_height * (len(lines) + 2))), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines, 1):
        draw.text((size, line_height * number), line, fill="black", font=font(size))
    return as_picture(sheet)
