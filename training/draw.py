"""What all scenes draw with: colours, fonts, backgrounds, clutter, bevels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.scene import Mark, Random, between, chance, pick

Colour: TypeAlias = tuple[int, int, int]
Box: TypeAlias = tuple[float, float, float, float]
Point: TypeAlias = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (245, 215, 30),
    "orange": (250, 130, 20),
    "purple": (140, 60, 180),
    "white": (245, 245, 245),
    "black": (22, 22, 22),
    "gray": (130, 130, 130),
}
FONT_FOLDERS = (Path(__file__).parent / "fonts", Path("/usr/share/fonts/truetype"), Path("/usr/share/fonts/opentype"))
FAMILIES = ("dejavu", "liberation", "lato", "open-sans", "hack", "courier-prime", "inconsolata", "cantarell")
"""Fonts of this renderer; the second one draws with others (`second.FAMILIES`)."""
MORE_FAMILIES = (
    *("anonymous-pro", "cabin", "clear-sans", "crosextra", "dosis", "firacode", "freefont", "karla", "league-mono"),
    *("manrope", "mononoki", "play", "quicksand"),
)
"""Further ones to learn from, which no held-out picture has."""
_families: tuple[str, ...] = FAMILIES
_key: tuple[Colour, Colour, float] | None = None
_UNREADABLE = ("Light", "Hairline", "Thin", "ExtraLight", "Math", "Symbols", "Mono-BoldOblique", "FreeSerif")


@contextmanager
def more_fonts() -> Iterator[None]:
    """Draw with `MORE_FAMILIES`, too."""
    global _families  # noqa: PLW0603
    before, _families = _families, FAMILIES + MORE_FAMILIES
    try:
        yield
    finally:
        _families = before


@contextmanager
def keyed(key: Colour, mean: Colour, scale: float) -> Iterator[None]:
    """Draw on a ground of the colour `key`, as if its mean colour were `mean`, `scale` times as large.

    What is drawn on two keys tells its own opacity (`training.world`).
    """
    global _key  # noqa: PLW0603
    before, _key = _key, (key, mean, scale)
    try:
        yield
    finally:
        _key = before


def font_files(families: tuple[str, ...] | None = None) -> tuple[Path, ...]:
    """Return the font files of `families`, or of those that are drawn with now, in a fixed order."""
    return _font_files(families or _families)


@cache
def _font_files(families: tuple[str, ...]) -> tuple[Path, ...]:
    found = [
        path
        for folder in FONT_FOLDERS
        for family in families
        for path in sorted((folder / family).glob("*.[ot]tf"))
        if not any(word in path.stem for word in _UNREADABLE)
    ]
    if not found:
        raise SystemExit(f"no fonts of {', '.join(families)}; training/README.md names the packages that carry them")
    return tuple(found)


@cache
def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Return a font, loaded once for each size."""
    return ImageFont.truetype(str(path), size)


def jitter(random: Random, colour: Colour, amount: int = 22) -> Colour:
    """Return a colour near `colour` that still bears its name."""
    return tuple(int(np.clip(c + random.integers(-amount, amount + 1), 0, 255)) for c in colour)  # type: ignore[return-value]


def named(random: Random, name: str) -> Colour:
    """Return some colour called `name`."""
    return jitter(random, COLOURS[name])


def shade(colour: Colour, factor: float) -> Colour:
    """Return a colour made darker (below 1) or lighter (above 1)."""
    return tuple(int(np.clip(c * factor, 0, 255)) for c in colour)  # type: ignore[return-value]


def luminance(colour: Colour) -> float:
    """Return the perceived brightness, 0 to 255 (ITU-R BT.601)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def ink(random: Random, background: Colour) -> Colour:
    """Return a colour that can be read on `background`."""
    dark = luminance(background) > 125
    base = int(random.integers(0, 60)) if dark else int(random.integers(195, 256))
    return jitter(random, (base, base, base), 12)


def size(random: Random) -> tuple[int, int]:
    """Return a picture's width and height."""
    longer = int(random.integers(170, 400))
    aspect = between(random, 0.62, 1.0)
    shorter = max(130, round(longer * aspect))
    if _key:
        longer, shorter = round(longer * _key[2]), round(shorter * _key[2])
    return (longer, shorter) if chance(random, 0.65) else (shorter, longer)


def background(random: Random, width: int, height: int, base: Colour | None = None) -> tuple[Image.Image, Colour]:
    """Return a plain, graded or textured ground and its mean colour."""
    if _key and base is None:
        return Image.new("RGB", (width, height), _key[0]), _key[1]
    if base is None:
        level = int(random.integers(15, 245))
        base = jitter(random, (level, level, level), 26)
    kind = random.random()
    if kind < 0.4:
        return Image.new("RGB", (width, height), base), base
    first, second = np.array(shade(base, between(random, 0.75, 1.0))), np.array(shade(base, between(random, 1.0, 1.25)))
    if kind < 0.75:
        angle = between(random, 0, 2 * np.pi)
        xs, ys = np.linspace(-0.5, 0.5, width) * np.cos(angle), np.linspace(-0.5, 0.5, height) * np.sin(angle)
        ramp = np.clip(xs[None, :] + ys[:, None] + 0.5, 0, 1)[..., None]
    else:
        coarse = random.random(
            (max(2, height // int(random.integers(4, 40))), max(2, width // int(random.integers(4, 40))))
        )
        grain = Image.fromarray((coarse * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
        ramp = np.asarray(grain, np.float32)[..., None] / 255
    return Image.fromarray((first + (second - first) * ramp).astype(np.uint8)), base


class Pen(ImageDraw.ImageDraw):
    """Pillow's pen, which also remembers what was drawn where."""

    def __init__(self, image: Image.Image) -> None:
        super().__init__(image)
        self.marks: list[Mark] = []

    def mark(self, x: float, y: float, *names: str, share: float | None = None) -> None:
        """Remember what is at `(x, y)`, and how far along its scale it stands."""
        self.marks += [Mark(x, y, name, share) for name in names]


def canvas(random: Random, base: Colour | None = None) -> tuple[Image.Image, Pen, Colour]:
    """Return a fresh picture, its pen and its mean colour."""
    image, colour = background(random, *size(random), base)
    return image, Pen(image), colour


def panel(random: Random, pen: Pen, box: Box, colour: Colour) -> None:
    """Draw a plate with a rim, and sometimes screws."""
    x0, y0, x1, y1 = box
    radius = between(random, 0, 0.12) * min(x1 - x0, y1 - y0)
    rim = max(1, round(between(random, 0.005, 0.025) * (x1 - x0)))
    pen.rounded_rectangle(box, radius, fill=colour, outline=shade(colour, pick(random, (0.5, 0.7, 1.4))), width=rim)
    if chance(random, 0.3):
        r = 0.02 * (x1 - x0) + 1
        for x, y in (
            (x0 + 3 * r, y0 + 3 * r),
            (x1 - 3 * r, y0 + 3 * r),
            (x0 + 3 * r, y1 - 3 * r),
            (x1 - 3 * r, y1 - 3 * r),
        ):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=shade(colour, 0.6))


def text(
    pen: Pen,
    at: tuple[float, float],
    words: str,
    face: ImageFont.FreeTypeFont,
    fill: Colour,
    anchor: str = "mm",
) -> None:
    """Write one line, each sign marked."""
    pen.text(at, words, font=face, fill=fill, anchor=anchor)
    left = at[0] - face.getlength(words) * (0.5 if anchor == "mm" else 1.0)
    for index, sign in enumerate(words):
        pen.mark(left + face.getlength(words[:index]) + face.getlength(sign) / 2, at[1], sign)


def fit(random: Random, words: str, width: float, height: float) -> ImageFont.FreeTypeFont:
    """Return a font in which `words` fill the space without leaving it."""
    path = pick(random, font_files())
    at_100 = load_font(path, 100)
    wide, high = at_100.getlength(words), sum(at_100.getmetrics())
    return load_font(path, max(7, int(100 * min(width / max(wide, 1), height / high))))


def clutter(random: Random, pen: Pen, free: list[Box], ground: Colour) -> None:
    """Draw things that mean nothing into the free boxes: lines, plates, a word."""
    for box in free:
        if chance(random, 0.5):
            continue
        x0, y0, x1, y1 = box
        if x1 - x0 < 12 or y1 - y0 < 12:
            continue
        colour = shade(ground, between(random, 0.6, 1.5))
        kind = random.random()
        if kind < 0.4:
            y = between(random, y0, y1)
            pen.line((x0, y, x1, y + between(random, -4, 4)), fill=colour, width=int(random.integers(1, 4)))
        elif kind < 0.7:
            pen.rectangle((x0 + 2, y0 + 2, x1 - 2, y1 - 2), outline=colour, width=int(random.integers(1, 3)))
        else:
            word = pick(random, ("PUMP", "MODEL A", "SERIES", "MADE IN EU", "CAUTION", "UNIT", "ACME", "TYPE K"))
            text(
                pen, ((x0 + x1) / 2, (y0 + y1) / 2), word, fit(random, word, (x1 - x0) * 0.8, min(16, y1 - y0)), colour
            )
