"""A contact sheet of scenes and what is asked about them, to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoTokenizer

from training.data import Drawer
from training.degrade import photographed
from training.scenes import SCENES
from training.settings import PANEL

CELL, TEXT = 260, 92


def contact_sheet(
    seed: int, count: int, only: str | None = None, taught: bool = False, columns: int = 6
) -> Image.Image:
    """Return `count` scenes in a grid, held-out or `taught`, their questions and answers below each."""
    names = [only] if only else list(SCENES)
    drawer = Drawer(AutoTokenizer.from_pretrained(PANEL), seed) if taught else None
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + TEXT)), "white")
    pen, face = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for index in range(count):
        if drawer:
            scene = drawer.shuffled(index, only)
        else:
            scene = photographed(SCENES[names[index % len(names)]], np.random.default_rng((seed, index)))
        image = scene.image
        image.thumbnail((CELL - 8, CELL - 8))
        x, y = index % columns * CELL, index // columns * (CELL + TEXT)
        sheet.paste(image, (x + 4, y + 4))
        for line, pair in enumerate(scene.pairs[:6]):
            pen.text(
                (x + 4, y + CELL + line * 14),
                f"{pair.wording or pair.question} {pair.answer}"[:50],
                font=face,
                fill="black",
            )
    return sheet
