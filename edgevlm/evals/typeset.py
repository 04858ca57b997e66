"""Text as a picture of a page: words in lines, formulas drawn, and what a camera or a scanner does to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edgevlm.errors import OptionError

_DELIMITED = r"\$\$.{1,999}?\$\$|\$(?!\s)[^$\n]{1,999}?(?<!\s)\$(?!\d)|\\\(.{1,999}?\\\)|\\\[.{1,999}?\\\]"
"""A formula in LaTeX's delimiters; a price such as $5 is none, as in Pandoc."""
_FORMULA = re.compile(f"({_DELIMITED})", re.DOTALL)
CHUNK = re.compile(rf"(?:{_DELIMITED}|\S)+", re.DOTALL)
"""What stands between spaces, formulas whole."""
_SMALLEST, _LARGEST = 20, 32
_WIDTHS = ((400, 512), (1200, 768))
"""A sheet's width in pixels for texts of so many characters at most; longer ones have `_WIDEST`."""
_WIDEST = 1024
_PAPER = 255
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Ink = npt.NDArray[np.uint8]
Random = np.random.Generator


class Typesetter:
    """Draws text in a font file, or in Pillow's own font; where that lacks a character, in matplotlib's DejaVu Sans.

    Raises `OptionError` for a file that holds no font.
    """

    def __init__(self, font: Path | None = None) -> None:
        self._faces = [_Face(file) for file in ((font,) if font else (None, *_dejavu()))]

    def why_not(self, text: str) -> str | None:
        """Return why a text cannot be drawn as it is, None where it can."""
        if self._face(text) is None:
            return "a character that no font here has: give --font, or pip install 'edgevlm[report]' for DejaVu Sans"
        for formula in _FORMULA.findall(text):
            try:
                _drawn(formula, _SMALLEST)
            except ModuleNotFoundError:
                return "formulas need matplotlib: pip install 'edgevlm[report]'"
            except ValueError:
                return "a formula that matplotlib's mathtext cannot draw"
        return None

    def sheet(self, text: str, random: Random) -> Image.Image:
        """Return a text that can be drawn in black on white, its size and margins drawn, its own line breaks kept."""
        face = self._face(text)
        assert face
        size = int(random.integers(_SMALLEST, _LARGEST + 1))
        width = next((wide for most, wide in _WIDTHS if len(text) <= most), _WIDEST)
        margin = int(random.integers(size // 2, 2 * size))
        lines = [line for part in text.strip().split("\n") for line in face.lines(part, size, width - 2 * margin)]
        gap = round(size * 0.35)
        height = 2 * margin + sum(line.ascent + line.descent + gap for line in lines) - gap
        page = np.zeros((height, width), np.uint8)
        top = margin
        for line in lines:
            for left, box in line.boxes:
                _stamp(page, box, margin + left, top + line.ascent)
            top += line.ascent + line.descent + gap
        return Image.fromarray(np.asarray(_PAPER - page, np.uint8))

    def _face(self, text: str) -> _Face | None:
        characters = set("".join(text.split()))
        return next((face for face in self._faces if all(map(face.has, characters))), None)


class _Face:
    """One font, in any size."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._font(_SMALLEST)  # raises now rather than in the middle of the work

    def has(self, character: str) -> bool:
        return _has(self._file, character)

    def lines(self, text: str, size: int, width: int) -> Iterator[_Line]:
        """Yield a paragraph's lines; an empty one has a line, too."""
        left, line = 0, _Line([], *self._height(size))
        for box in self._boxes(text, size, width):
            if line.boxes and left + box.ink.shape[1] > width:
                yield line
                left, line = 0, _Line([], *self._height(size))
            ascent, descent = max(line.ascent, box.ascent), max(line.descent, box.ink.shape[0] - box.ascent)
            line = _Line([*line.boxes, (left, box)], ascent, descent)
            left += box.ink.shape[1] + box.space
        yield line

    def _boxes(self, text: str, size: int, width: int) -> Iterator[_Box]:
        """Yield words and formulas, words in pieces where they are wider than a line and formulas smaller."""
        for chunk in CHUNK.findall(text):
            boxes = []
            for number, part in enumerate(_FORMULA.split(chunk)):
                boxes += self._pieces(part, size, width) if number % 2 == 0 else [_fitted(part, size, width)]
            yield from boxes[:-1]
            yield boxes[-1]._replace(space=round(size * 0.3))

    def _pieces(self, word: str, size: int, width: int) -> list[_Box]:
        pieces, font = [], self._font(size)
        while word:
            most = len(word)
            while most > 1 and font.getlength(word[:most]) > width:
                most -= 1
            pieces.append(self._word(word[:most], size))
            word = word[most:]
        return pieces

    def _word(self, word: str, size: int) -> _Box:
        font, (ascent, descent) = self._font(size), self._height(size)
        image = Image.new("L", (max(1, round(font.getlength(word)) + 1), ascent + descent))
        ImageDraw.Draw(image).text((0, 0), word, fill=255, font=font)
        return _Box(np.asarray(image), ascent)

    def _font(self, size: int) -> Font:
        return _font(self._file, size)

    def _height(self, size: int) -> tuple[int, int]:
        font = self._font(size)
        return font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (size, size // 4)


class _Box(NamedTuple):
    """A word or a formula, 255 where there is ink."""

    ink: Ink
    ascent: int
    """Rows above the baseline."""
    space: int = 0
    """After it."""


class _Line(NamedTuple):
    boxes: list[tuple[int, _Box]]
    ascent: int
    descent: int


@cache
def _font(file: Path | None, size: int) -> Font:
    if file is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(file, size)
    except OSError as error:
        raise OptionError(f"{file} cannot be read as a font: {error}") from None


@cache
def _has(file: Path | None, character: str) -> bool:
    """Tell whether a font has a character: what it lacks, it draws as it draws a code point that is no character."""
    font = _font(file, _LARGEST)
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def _fitted(formula: str, size: int, width: int) -> _Box:
    """Return a formula, smaller where it is wider than a line."""
    box = _drawn(formula, size)
    wide = box.ink.shape[1]
    return _drawn(formula, size * (width - 1) / wide) if wide > width else box


def _dejavu() -> Iterator[Path]:
    """Yield the file of the font that matplotlib has, without importing it."""
    spec = find_spec("matplotlib")
    if spec and spec.origin:
        file = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            yield file


def _drawn(formula: str, size: float) -> _Box:
    """Return a formula. Raises `ValueError` for what mathtext does not know, `ModuleNotFoundError` without it."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    delimiter = 2 if formula.startswith(("$$", "\\")) else 1
    source = " ".join(formula[delimiter:-delimiter].split())
    parsed = MathTextParser("agg").parse(f"${source}$", dpi=72, prop=FontProperties(size=size))
    ink = np.asarray(parsed.image)
    return _Box(ink, ink.shape[0] - round(parsed.depth))


def _stamp(page: Ink, box: _Box, left: int, baseline: int) -> None:
    """Lay a box's ink on a page, cut at its edge."""
    top = baseline - box.ascent
    under = page[top : top + box.ink.shape[0], left : left + box.ink.shape[1]]
    np.maximum(under, box.ink[: under.shape[0], : under.shape[1]], out=under)


def distorted(sheet: Image.Image, random: Random) -> Image.Image:
    """Return a sheet as a photo of it might be: each of turned, wavy, shadowed, stained and blurred or not."""
    for change in _CHANGES:
        if random.random() < 0.5:
            sheet = change(sheet, random)
    return sheet


def _turned(sheet: Image.Image, random: Random) -> Image.Image:
    return sheet.rotate(float(random.uniform(-5, 5)), Image.Resampling.BICUBIC, expand=True, fillcolor=_PAPER)


def _wavy(sheet: Image.Image, random: Random) -> Image.Image:
    pixels = np.asarray(sheet)
    columns = np.arange(pixels.shape[1])
    height, length, phase = random.uniform(1, 3), random.uniform(120, 400), random.uniform(0, 2 * np.pi)
    shift = np.round(height * np.sin(2 * np.pi * columns / length + phase)).astype(int)
    rows = np.clip(np.arange(pixels.shape[0])[:, None] + shift, 0, pixels.shape[0] - 1)
    return Image.fromarray(pixels[rows, columns])


def _shadowed(sheet: Image.Image, random: Random) -> Image.Image:
    ramp = np.linspace(0, 1, sheet.width) if random.random() < 0.5 else np.linspace(0, 1, sheet.height)[:, None]
    light = 1 - random.uniform(0.1, 0.4) * (ramp if random.random() < 0.5 else 1 - ramp)
    return Image.fromarray(np.asarray(np.asarray(sheet) * light, np.uint8))


def _stained(sheet: Image.Image, random: Random) -> Image.Image:
    stains = Image.new("L", sheet.size, 255)
    for _ in range(int(random.integers(1, 4))):
        x, y = random.uniform(0, sheet.width), random.uniform(0, sheet.height)
        across, down = random.uniform(10, 60, 2)
        box = (x - across, y - down, x + across, y + down)
        ImageDraw.Draw(stains).ellipse(box, fill=int(random.integers(170, 230)))
    soft = np.asarray(stains.filter(ImageFilter.GaussianBlur(4)), np.uint16)
    return Image.fromarray((np.asarray(sheet) * soft // 255).astype(np.uint8))


def _blurred(sheet: Image.Image, random: Random) -> Image.Image:
    return sheet.filter(ImageFilter.GaussianBlur(float(random.uniform(0.4, 1.2))))


_CHANGES: tuple[Callable[[Image.Image, Random], Image.Image], ...] = (_turned, _wavy, _shadowed, _stained, _blurred)
