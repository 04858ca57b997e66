"""A contact sheet of scenes and what is asked about them, to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.degrade import photographed
from training.scenes import SCENES

CELL, TEXT = 260, 92


def contact_sheet(seed: int, count: int, only: str | None = None, columns: int = 6) -> Image.Image:
    """Return `count` scenes in a grid, their questions and answers below each."""
    names = [only] if only else list(SCENES)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + TEXT)), "white")
    pen, face = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for index in range(count):
        scene = photographed(SCENES[names[index % len(names)]], np.random.default_rng((seed, index)))
        image = scene.image
        image.thumbnail((CELL - 8, CELL - 8))
        x, y = index % columns * CELL, index // columns * (CELL + TEXT)
        sheet.paste(image, (x + 4, y + 4))
        for line, pair in enumerate(scene.pairs[:6]):
            pen.text((x + 4, y + CELL + line * 14), f"{pair.question} {pair.answer}"[:50], font=face, fill="black")
    return sheet
