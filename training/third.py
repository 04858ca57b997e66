"""A third renderer, for evaluation only: plain devices over real photographs, as a newcomer's first own picture looks.

Training never sees it, and it shares no drawing code, fonts or colours with the two other renderers. The photographs
are those among the wallpapers of two Debian packages (`ukui-wallpapers`, CC-BY-SA-3.0, holds only abstract art):

- lomiri-wallpapers-16.04: CC-BY-4.0 or CC-BY-SA-4.0, by picture ("seeding" is CC0-1.0)
- lomiri-wallpapers-20.04: CC-BY-SA-3.0

The fonts are of fonts-b612, fonts-urw-base35, fonts-adf-gillius, fonts-go, fonts-bebas-neue and fonts-dseg.
`python -m training.third sheet.png` draws a sheet to look at.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from training.scene import Random, Scene, between, chance, pick
from training.scenes.displays import UNITS
from training.scenes.gauges import SCALES, written
from training.scenes.lights import STACK, listed
from training.scenes.things import PARTS, SHAPES, plural

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Point = tuple[float, float]

FOLDERS = (Path("/usr/share/backgrounds"), Path("/usr/local/share/backgrounds"))
PHOTOGRAPHS = (
    "Bridge_by_*",
    "Dragonfly_by_*",
    "Kleiber_by_*",
    "Picture_0B_by_*",
    "Picture_1A_by_*",
    "Wine_by_*",
    "aitzgorri_by_*",
    "free_by_*",
    "friends_by_*",
    "life_by_*",
    "picosdeeuropa_by_*",
    "seeding_by_*",
    "sunset_by_*",
)
"""The wallpapers that are photographs; "greentock" is left out, since it shows a dial."""
LAMPED = "free_by_"
"""A photograph of lit lamps, under which no one should be asked which light is on."""
FONT_FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"))
FACES = (
    "B612-Regular.otf",
    "B612-Bold.otf",
    "NimbusSansNarrow-Bold.otf",
    "URWGothic-Demi.otf",
    "P052-Roman.otf",
    "C059-Bold.otf",
    "GilliusADF-Bold.otf",
    "Go-Medium.ttf",
    "Go-Mono-Bold.ttf",
)
SCREEN_FACES = (*FACES, "B612Mono-Bold.otf", "BebasNeue-Regular.otf")
SEGMENT_FACES = tuple(
    f"DSEG7{style}-{weight}.ttf"
    for style in ("Classic", "Modern", "ClassicMini", "ModernMini")
    for weight in ("Bold", "Regular", "BoldItalic")
)
DOTS = {
    "0": "3e4141413e",
    "1": "00427f4000",
    "2": "4261514946",
    "3": "2141454b31",
    "4": "1814127f10",
    "5": "2745454539",
    "6": "3c4a494930",
    "7": "0171090503",
    "8": "3649494936",
    "9": "064949291e",
    "-": "0808080808",
    ".": "6060",
}
"""Columns of seven dots, the lowest bit on top."""

DISPLAY_QUESTIONS = (
    "What does the display read?",
    "What does the digital readout say?",
    "Read off the display for me.",
    "What's on the display?",
    "Which value can you see on the screen of the device?",
    "Tell me the number on the display.",
)
GAUGE_QUESTIONS = (
    "What does the gauge read?",
    "Where is the needle pointing?",
    "What value does the pointer show?",
    "Please read the dial.",
    "What's the gauge at right now?",
)
READING_QUESTIONS = ("What is the reading?", "What value is it showing?")
LIGHT_QUESTIONS = ("Which light is on?", "Which of the lights is lit up?")
TOWER_QUESTIONS = ("Which lamp of the signal tower is on?", "Which stack light is lit?")
ONE_LAMP_QUESTIONS = ("What colour is the lamp that is lit?", "What color is the light that's on?")
LAMPS_QUESTIONS = ("Which lights are on?", "Which lamps are lit right now?")
COUNT_QUESTIONS = (
    "How many {} are there?",
    "How many {} do you see?",
    "Count the {}.",
    "What is the number of {} in the picture?",
    "How many {} can you count here?",
)
REFUSED = "not visible"

WIDE = 1500
"""Pixels across a device as it is drawn, well above those it is shown with."""
LIGHT: Colour = (240, 240, 236)
DARK: Colour = (28, 29, 32)
CASES: tuple[Colour, ...] = (
    (225, 225, 220),
    (60, 62, 66),
    (34, 35, 38),
    (150, 155, 160),
    (235, 185, 40),
    (45, 80, 130),
    (170, 45, 40),
    (90, 110, 95),
)
GLOWING: tuple[Colour, ...] = (
    (255, 45, 35),
    (70, 255, 110),
    (80, 200, 255),
    (255, 150, 20),
    (245, 245, 255),
)
FLAT: tuple[tuple[Colour, Colour], ...] = (
    ((176, 188, 160), (25, 30, 28)),
    ((200, 205, 200), (20, 20, 25)),
    ((160, 200, 80), (25, 40, 15)),
    ((30, 70, 190), (235, 245, 255)),
    ((245, 245, 245), (20, 60, 120)),
    ((240, 150, 60), (50, 25, 10)),
)
"""Backgrounds of liquid crystal and other screens, each with its ink."""
LAMPS: dict[str, Colour] = {
    "red": (240, 30, 30),
    "yellow": (255, 205, 15),
    "green": (20, 205, 85),
    "blue": (35, 95, 255),
    "white": (255, 255, 255),
}
FACE_COLOURS: tuple[Colour, ...] = (
    (250, 250, 248),
    (250, 250, 248),
    (246, 240, 222),
    (24, 24, 26),
    (24, 24, 26),
    (205, 225, 240),
    (250, 225, 120),
    (25, 50, 95),
    (30, 75, 60),
)
NEEDLES: tuple[Colour, ...] = ((20, 20, 20), (210, 30, 30), (245, 245, 245), (250, 130, 20), (25, 70, 170))
METALS: tuple[Colour, ...] = ((196, 200, 205), (206, 164, 76), (120, 126, 132), (44, 45, 48), (180, 110, 70))
PAINTS: tuple[Colour, ...] = ((215, 40, 45), (40, 95, 200), (45, 150, 70), (245, 190, 30), (130, 60, 150), (25, 25, 28))
GROUNDS: tuple[Colour, ...] = (
    (246, 245, 240),
    (214, 184, 140),
    (50, 54, 60),
    (35, 95, 75),
    (70, 110, 170),
    (170, 172, 175),
)
MORE_SCALES = ((0, 25, 5), (0, 40, 10), (0, 160, 20), (0, 12, 2), (0, 200, 50), (-40, 60, 20), (0, 300, 50))
WORDS = tuple(
    word
    for line in (
        "the of a to and in morning river letter answer under green window market often people walking between",
        "houses old garden winter paper quietly along road behind never again some table bread stone water light",
    )
    for word in line.split()
)


@cache
def photographs() -> tuple[Path, ...]:
    """Return the photographs, all of which must be installed, so that a seed draws the same everywhere."""
    found = [next((path for folder in FOLDERS for path in folder.rglob(name)), None) for name in PHOTOGRAPHS]
    there = tuple(path for path in found if path)
    if len(there) < len(found):
        raise click.UsageError(
            "photographs are missing: install the Debian packages lomiri-wallpapers-16.04 and lomiri-wallpapers-20.04"
        )
    return there


@cache
def _photograph(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        opened.draft("RGB", (1800, 1800))
        image = opened.convert("RGB")
    image.thumbnail((1800, 1800))
    return image


@cache
def _font_path(name: str) -> Path:
    for folder in FONT_FOLDERS:
        for path in sorted(folder.rglob(name)):
            return path
    packages = "fonts-b612 fonts-urw-base35 fonts-adf-gillius fonts-go fonts-bebas-neue fonts-dseg"
    raise click.UsageError(f"no font {name}: install the Debian packages {packages}")


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(name), size)


def _fit(name: str, words: str, wide: float, high: float) -> ImageFont.FreeTypeFont:
    """Return the largest font in which `words` fit into a box."""
    x0, y0, x1, y1 = _font(name, 200).getbbox(words)
    return _font(name, max(8, int(200 * min(wide / max(x1 - x0, 1), high / max(y1 - y0, 1)))))


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    """Return a colour between two: `share` of the other one."""
    r, g, b = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return r, g, b


def _apart(one: Colour, other: Colour) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _ink(ground: Colour) -> Colour:
    """Return dark or light ink, whichever is seen on a ground."""
    return DARK if 0.3 * ground[0] + 0.6 * ground[1] + 0.1 * ground[2] > 125 else LIGHT


class Layer:
    """A drawing with transparent surroundings that is later laid over a photograph."""

    def __init__(self, width: float, height: float) -> None:
        self.image = Image.new("RGBA", (round(width), round(height)), (0, 0, 0, 0))
        self.pen = ImageDraw.Draw(self.image)

    def box(self, box: Box, fill: Colour, round_by: float = 0.0, edge: Colour | None = None, width: int = 0) -> None:
        """Draw a box with round corners."""
        self.pen.rounded_rectangle(box, round_by, fill, edge, width)

    def disc(self, centre: Point, radius: float, fill: Colour, edge: Colour | None = None, width: int = 0) -> None:
        """Draw a filled circle."""
        x, y = centre
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill, edge, width)

    def write(self, at: Point, words: str, font: ImageFont.FreeTypeFont, fill: Colour, anchor: str = "mm") -> None:
        """Write a line of text."""
        self.pen.text(at, words, fill, font, anchor)

    def over(self, other: Image.Image, at: tuple[int, int] = (0, 0)) -> None:
        """Lay another drawing over this one."""
        piece = Image.new("RGBA", self.image.size, (0, 0, 0, 0))
        piece.paste(other, at)
        self.image.alpha_composite(piece)

    def glow(self, drawn: Layer, radius: float, strength: float) -> None:
        """Lay a drawing over this one, with a halo of its own light."""
        halo = drawn.image.convert("RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        halo.putalpha(halo.getchannel("A").point(lambda alpha: min(255, int(alpha * strength))))
        self.image.alpha_composite(halo)
        self.image.alpha_composite(drawn.image)


# The photograph: what is behind a device, how it stands in the picture, light, noise


def _size(random: Random, shape: float, low: float) -> tuple[int, int]:
    """Return the size of a picture in which a device of the given height per width can be `low` wide."""
    shapes = [s for s in (0.5625, 0.667, 0.75, 0.75, 1.0, 1.333, 1.5) if s > low * shape * 1.08] or [1.5]
    width = int(random.integers(320, 901))
    return width, round(width * pick(random, shapes))


def _background(random: Random, size: tuple[int, int], lamps: bool = True) -> Image.Image:
    """Return a part of a photograph."""
    paths = [path for path in photographs() if lamps or not path.name.startswith(LAMPED)]
    image = _photograph(pick(random, paths))
    zoom = between(random, 0.5, 1.0)
    scale = min(image.width / size[0], image.height / size[1]) * zoom
    wide, high = size[0] * scale, size[1] * scale
    x, y = between(random, 0, image.width - wide), between(random, 0, image.height - high)
    image = image.resize(size, Image.Resampling.BICUBIC, (x, y, x + wide, y + high))
    if chance(random, 0.5):
        image = ImageOps.mirror(image)
    if chance(random, 0.5):
        image = image.filter(ImageFilter.GaussianBlur(between(random, 0.3, 4) * size[0] / 600))
    return image


def _corners(random: Random, wide: float, high: float) -> np.ndarray:
    """Return the corners of a device turned a little in space, around the origin."""
    yaw, pitch, roll = np.radians(np.clip(random.normal(0, (6, 6, 4)), -15, 15))
    flat = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (wide / 2, high / 2)
    x, y = flat[:, 0] * math.cos(roll) - flat[:, 1] * math.sin(roll), flat @ (math.sin(roll), math.cos(roll))
    depth = 1 + (x * math.sin(yaw) + y * math.sin(pitch)) / (between(random, 1.8, 4) * max(wide, high))
    corners = np.stack((x * math.cos(yaw) / depth, y * math.cos(pitch) / depth), 1)
    return np.asarray(corners - (corners.max(0) + corners.min(0)) / 2)


def _warped(layer: Image.Image, corners: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return a drawing with its corners moved to given points of a picture."""
    big = (size[0] * 2, size[1] * 2)
    reach = np.ptp(corners, axis=0) * 2
    shrink = max(1.0, min(layer.width / reach[0], layer.height / reach[1]))
    layer = layer.resize((round(layer.width / shrink), round(layer.height / shrink)), Image.Resampling.LANCZOS)
    source = [(0, 0), (layer.width, 0), (layer.width, layer.height), (0, layer.height)]
    rows, right = [], []
    for (x, y), (u, v) in zip(corners * 2, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    solved = tuple(float(value) for value in np.linalg.solve(np.array(rows), np.array(right)))
    moved = layer.transform(big, Image.Transform.PERSPECTIVE, solved, Image.Resampling.BICUBIC)
    return moved.resize(size, Image.Resampling.BOX)


def _shaded(random: Random, image: Image.Image, device: Image.Image) -> Image.Image:
    """Return a background with the soft shadow of a device."""
    reach = image.width * between(random, 0.008, 0.03)
    turn = between(random, 0.2, math.pi - 0.2)
    offset = (round(math.cos(turn) * reach), round(math.sin(turn) * reach))
    mask = Image.new("L", image.size)
    mask.paste(device.getchannel("A"), offset)
    mask = mask.filter(ImageFilter.GaussianBlur(reach * between(random, 0.5, 1.0)))
    strength = between(random, 0.3, 0.65)
    image.paste((8, 8, 12), mask=mask.point(lambda alpha: int(alpha * strength)))
    return image


def _taken(random: Random, image: Image.Image) -> Image.Image:
    """Return a picture as a plain camera would have taken it: light, blur, noise, JPEG."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    high, wide = pixels.shape[:2]
    turn, fall = between(random, 0, 2 * math.pi), between(random, 0, 0.22)
    across = np.linspace(-1, 1, wide)[None, :] * math.cos(turn) + np.linspace(-1, 1, high)[:, None] * math.sin(turn)
    warm = between(random, -0.05, 0.05)
    tint = np.array((1 + warm, 1, 1 - warm)) * between(random, 0.82, 1.06)
    pixels = np.clip(pixels * (1 + across[..., None] * fall * 0.7) * tint, 0, 1) ** between(random, 0.88, 1.15)
    noise = random.normal(0, between(random, 0.002, 0.025), pixels.shape)
    blur = between(random, 0, 0.9) * wide / 700
    taken = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
    noisy = np.clip(np.asarray(taken, dtype=np.float32) + noise * 255, 0, 255).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(noisy).save(stored, "JPEG", quality=int(random.integers(55, 95)))
    with Image.open(stored) as opened:
        return opened.convert("RGB")


def _laid(
    random: Random, layer: Layer, low: float = 0.35, high: float = 0.9, least: float = 0.0, lamps: bool = True
) -> Image.Image:
    """Return a photograph with a device in it, between `low` and `high` of the picture's width wide.

    It is at least `least` of the picture's longer side wide, so that its marks can be read in a small copy.
    """
    shape = layer.image.height / layer.image.width
    size = _size(random, shape, low)
    wide = between(random, low, max(low, min(high, 0.92 * size[1] / size[0] / shape))) * size[0]
    wide = max(wide, min(least * max(size), 0.95 * size[0]))
    corners = _corners(random, wide, wide * shape)
    reach = np.ptp(corners, axis=0)
    corners *= min(1.0, float((np.array(size) * 0.97 / reach).min()))
    room = (np.array(size) - np.ptp(corners, axis=0)) / 2
    corners += np.array(size) / 2 + random.uniform(-1, 1, 2) * room * 0.95
    device = _warped(layer.image, corners, size)
    image = _shaded(random, _background(random, size, lamps), device)
    image.paste(device, mask=device)
    return _taken(random, image)


# Displays


def _value(random: Random) -> str:
    """Return what a display reads: up to five digits, perhaps a sign and a decimal point."""
    digits = int(random.integers(1, 6))
    places = int(random.integers(1, min(digits, 3))) if digits > 2 and chance(random, 0.55) else digits == 2
    places = int(places) if chance(random, 0.8) else 0
    number = int(random.integers(10 ** (digits - 1), 10**digits)) if digits > 1 else int(random.integers(0, 10))
    text = f"{number / 10**places:.{places}f}"
    return f"-{text}" if number and chance(random, 0.18) else text


def _segments(random: Random, layer: Layer, box: Box, reading: str, ink: Colour, ghost: Colour | None) -> None:
    """Write a reading in seven-segment digits, perhaps with the unlit segments behind them."""
    name, blanks = pick(random, SEGMENT_FACES), int(random.integers(0, 3)) if len(reading) < 4 else 0
    cells = blanks + len(reading.replace(".", ""))
    _, y0, _, y1 = _font(name, 200).getbbox("8")
    advance, gap = _font(name, 200).getlength("8") / 200, 0.17
    size = min((box[2] - box[0]) / (cells * advance + gap * reading.count(".")), (box[3] - box[1]) * 200 / (y1 - y0))
    font, x, base = _font(name, max(8, int(size))), box[2], (box[1] + box[3]) / 2 + size * (y1 - y0) / 400
    for symbol in reversed("!" * blanks + reading):
        if symbol == ".":
            layer.disc((x - size * gap * 0.55, base - size * 0.065), size * 0.075, ink)
            x -= size * gap
            continue
        if ghost:
            layer.write((x, base), "8", font, ghost, "rs")
        layer.write((x, base), symbol, font, ink, "rs")
        x -= size * advance


def _dot_matrix(random: Random, layer: Layer, box: Box, reading: str, ink: Colour, ghost: Colour | None) -> None:
    """Write a reading in dots."""
    columns: list[int] = []
    for symbol in reading:
        columns += [*bytes.fromhex(DOTS[symbol]), 0]
    columns = columns[:-1]
    step = min((box[2] - box[0]) / len(columns), (box[3] - box[1]) / 7)
    left = (box[0] + box[2] - step * len(columns)) / 2
    top = (box[1] + box[3] - step * 7) / 2
    size, square = step * between(random, 0.8, 0.94), chance(random, 0.5)
    for index, column in enumerate(columns):
        for row in range(7):
            fill = ink if column >> row & 1 else ghost
            x, y = left + index * step, top + row * step
            if fill:
                layer.box((x, y, x + size, y + size), fill, 0 if square else size / 2)


def _typed(random: Random, layer: Layer, box: Box, reading: str, ink: Colour, ghost: Colour | None) -> None:
    """Write a reading in an ordinary font."""
    font = _fit(pick(random, SCREEN_FACES), reading, box[2] - box[0], (box[3] - box[1]) * 0.9)
    layer.write(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), reading, font, ink)


def _screen(random: Random, layer: Layer, box: Box, reading: str, unit: str) -> None:
    """Fill the window of a device with its reading and unit."""
    glowing = chance(random, 0.5)
    ground, ink = (pick(random, (DARK, (10, 10, 12))), pick(random, GLOWING)) if glowing else pick(random, FLAT)
    wide, high = box[2] - box[0], box[3] - box[1]
    layer.box(box, ground, high * between(random, 0.0, 0.12), _mix(ground, (0, 0, 0), 0.5), 8)
    x0, y0, x1, y1 = box[0] + wide * 0.06, box[1] + high * 0.14, box[2] - wide * 0.06, box[3] - high * 0.14
    drawn = Layer(*layer.image.size)
    if unit:
        room = (x1 - x0) * between(random, 0.17, 0.24)
        font = _fit(pick(random, FACES), unit, room * 0.92, (y1 - y0) * between(random, 0.4, 0.6))
        low = chance(random, 0.6)
        drawn.write(
            (x1, y1 if low else y0),
            unit,
            font,
            ink,
            "rs" if low and unit not in {"kg", "g", "rpm"} else "rd" if low else "ra",
        )
        x1 -= room + (x1 - x0) * 0.05
    ghost = _mix(ground, ink, between(random, 0.05, 0.12)) if chance(random, 0.5) else None
    kind = pick(random, (_segments, _segments, _dot_matrix, _typed))
    kind(random, drawn, (x0, y0, x1, y1), reading, ink, ghost)
    layer.glow(drawn, 22 if glowing else 1, 0.8 if glowing else 0.0)


def _buttons(random: Random, layer: Layer, box: Box, case: Colour) -> None:
    """Draw a row of named buttons."""
    words = ("SET", "MODE", "HOLD", "ON", "OFF", "TARE", "MENU", "ZERO")
    names = [words[index] for index in random.permutation(len(words))[:3]]
    step = (box[2] - box[0]) / len(names)
    fill = pick(random, (_mix(case, (0, 0, 0), 0.45), _mix(case, (255, 255, 255), 0.4)))
    face = pick(random, FACES)
    for index, name in enumerate(names):
        x0, x1 = box[0] + step * (index + 0.1), box[0] + step * (index + 0.9)
        layer.box((x0, box[1], x1, box[3]), fill, (box[3] - box[1]) * 0.25)
        font = _fit(face, "MENU", (x1 - x0) * 0.6, (box[3] - box[1]) * 0.4)
        layer.write(((x0 + x1) / 2, (box[1] + box[3]) / 2), name, font, _ink(fill))


def _meter(random: Random, case: Colour) -> tuple[Layer, Box]:
    """A low wide panel meter."""
    high = WIDE * between(random, 0.34, 0.62)
    layer = Layer(WIDE, high)
    layer.box((0, 0, WIDE - 1, high - 1), case, high * between(random, 0, 0.2), _mix(case, (0, 0, 0), 0.35), 14)
    foot = chance(random, 0.5)
    if foot:
        _buttons(random, layer, (WIDE * 0.1, high * 0.8, WIDE * 0.9, high * 0.92), case)
    return layer, (WIDE * 0.07, high * 0.12, WIDE * 0.93, high * (0.74 if foot else 0.88))


def _handheld(random: Random, case: Colour) -> tuple[Layer, Box]:
    """A hand-held meter with a knob."""
    high = WIDE * between(random, 1.2, 1.6)
    layer = Layer(WIDE, high)
    layer.box((0, 0, WIDE - 1, high - 1), case, WIDE * 0.12)
    inner = _mix(case, (0, 0, 0), 0.55)
    layer.box((WIDE * 0.05, WIDE * 0.05, WIDE * 0.95, high - WIDE * 0.05), inner, WIDE * 0.09)
    bottom = WIDE * between(random, 0.46, 0.56)
    _buttons(random, layer, (WIDE * 0.12, bottom + WIDE * 0.05, WIDE * 0.88, bottom + WIDE * 0.14), inner)
    centre = (WIDE / 2, (bottom + WIDE * 0.14 + high) / 2)
    radius = (high - bottom - WIDE * 0.25) * 0.4
    layer.disc(centre, radius, _mix(inner, (255, 255, 255), 0.15), _mix(inner, (0, 0, 0), 0.5), 12)
    x, y = centre
    layer.box((x - radius * 0.15, y - radius * 0.85, x + radius * 0.15, y + radius * 0.85), case, radius * 0.1)
    return layer, (WIDE * 0.1, WIDE * 0.1, WIDE * 0.9, bottom)


def _weighing(random: Random, case: Colour) -> tuple[Layer, Box]:
    """A pair of scales with a plate."""
    high = WIDE * between(random, 0.85, 1.1)
    layer = Layer(WIDE, high)
    layer.box((0, 0, WIDE - 1, high - 1), case, WIDE * 0.08, _mix(case, (0, 0, 0), 0.3), 10)
    plate = _mix(pick(random, ((215, 218, 220), (60, 60, 64))), case, 0.1)
    edge = _mix(plate, (0, 0, 0), 0.25)
    layer.box((WIDE * 0.06, WIDE * 0.06, WIDE * 0.94, high - WIDE * 0.42), plate, WIDE * 0.05, edge, 10)
    return layer, (WIDE * 0.14, high - WIDE * 0.36, WIDE * 0.86, high - WIDE * 0.08)


def _display(random: Random) -> tuple[Image.Image, str]:
    reading, unit = _value(random), pick(random, UNITS) if chance(random, 0.55) else ""
    layer, window = pick(random, (_meter, _meter, _handheld, _weighing))(random, pick(random, CASES))
    _screen(random, layer, window, reading, unit)
    return _laid(random, layer, 0.48, least=0.55 if len(reading) > 4 else 0.48), f"{reading} {unit}".strip()


def display(random: Random) -> Scene:
    """A device with a digital read-out."""
    image, answer = _display(random)
    result = Scene(image)
    result.ask("display", DISPLAY_QUESTIONS, answer, random)
    return result


# Gauges


@dataclass(frozen=True)
class Dial:
    """The scale of a gauge: angles in degrees, clockwise from three o'clock."""

    centre: Point
    radius: float
    low: float
    high: float
    step: float
    sweep: float

    def angle(self, value: float) -> float:
        """Return where a value stands."""
        return -90 - self.sweep / 2 + (value - self.low) / (self.high - self.low) * self.sweep

    def at(self, value: float, out: float, aside: float = 0.0) -> Point:
        """Return the point `out` radii from the centre towards a value, and `aside` radii to its side."""
        turn = math.radians(self.angle(value))
        x = self.centre[0] + self.radius * (math.cos(turn) * out - math.sin(turn) * aside)
        return x, self.centre[1] + self.radius * (math.sin(turn) * out + math.cos(turn) * aside)


def _zones(random: Random, layer: Layer, dial: Dial, out: float) -> None:
    """Draw coloured parts of the scale."""
    places = [dial.low + (dial.high - dial.low) * share for share in sorted(random.uniform(0.3, 0.95, 2))]
    names = pick(random, (("green", "yellow", "red"), ("red", "green", "red"), ("green", "", "red"), ("", "", "red")))
    reach = dial.radius * out
    x, y = dial.centre
    for name, first, last in zip(names, (dial.low, *places), (*places, dial.high), strict=True):
        if name:
            box = (x - reach, y - reach, x + reach, y + reach)
            layer.pen.arc(box, dial.angle(first), dial.angle(last), LAMPS[name], round(dial.radius * 0.07))


def _scale(random: Random, layer: Layer, dial: Dial, ink: Colour, outside: bool) -> None:
    """Draw ticks and numbers."""
    ticks, minor = round((dial.high - dial.low) / dial.step), pick(random, (2, 4, 5, 5, 1))
    outer = 0.72 if outside else between(random, 0.84, 0.93)
    thick = dial.radius * between(random, 0.018, 0.035)
    if chance(random, 0.45):
        _zones(random, layer, dial, outer)
    for index in range(ticks * minor + 1):
        long = index % minor == 0
        value = dial.low + index * dial.step / minor
        ends = (dial.at(value, outer), dial.at(value, outer - (0.13 if long else 0.07)))
        layer.pen.line(ends, ink, round(thick if long else thick * 0.6))
    spacing = math.radians(dial.sweep / ticks) * (0.87 if outside else outer - 0.28)
    every = 2 if spacing < 0.24 and ticks % 2 == 0 else 1
    high = dial.radius * min(0.15, spacing * every * 0.42)
    font = _fit(pick(random, FACES), "0", 1e6, high)
    for index in range(0, ticks + 1, every):
        value = dial.low + index * dial.step
        layer.write(dial.at(value, 0.87 if outside else outer - 0.27), str(round(value)), font, ink)


def _needle(random: Random, layer: Layer, dial: Dial, value: float, ground: Colour) -> None:
    """Draw one of several needles, each plain to see."""
    fill = pick(random, [colour for colour in NEEDLES if _apart(colour, ground) > 260])
    tip = between(random, 0.68, 0.82)
    outlines = (
        ((-0.2, 0.045), (-0.2, -0.045), (tip, -0.012), (tip, 0.012)),
        ((-0.25, 0.024), (-0.25, -0.024), (tip - 0.05, -0.024), (tip, 0), (tip - 0.05, 0.024)),
        (
            (-0.15, 0.02),
            (-0.15, -0.02),
            (tip - 0.2, -0.02),
            (tip - 0.2, -0.06),
            (tip, 0),
            (tip - 0.2, 0.06),
            (tip - 0.2, 0.02),
        ),
        ((-0.1, 0.0), (0.12, -0.06), (tip, -0.008), (tip, 0.008), (0.12, 0.06)),
    )
    outline = pick(random, outlines)
    shade = [dial.at(value, out, aside) for out, aside in outline]
    layer.pen.polygon([(x + 9, y + 12) for x, y in shade], _mix(ground, (0, 0, 0), 0.3))
    layer.pen.polygon(shade, fill)
    hub = fill if chance(random, 0.4) else pick(random, ((30, 30, 32), (150, 152, 156), (190, 160, 80)))
    layer.disc(dial.centre, dial.radius * between(random, 0.06, 0.13), hub, _mix(hub, (0, 0, 0), 0.3), 6)


def _round_case(random: Random, ground: Colour) -> tuple[Layer, Point, float]:
    """A round gauge, perhaps on a square plate or on a pipe."""
    rim, kind = pick(random, CASES), pick(random, ("round", "round", "square", "pipe"))
    high = WIDE * (1.2 if kind == "pipe" else 1)
    layer, half = Layer(WIDE, high), WIDE / 2
    if kind == "square":
        layer.box((0, 0, WIDE - 1, WIDE - 1), rim, WIDE * between(random, 0.01, 0.15), _mix(rim, (0, 0, 0), 0.3), 10)
        for x, y in ((0.06, 0.06), (0.94, 0.06), (0.06, 0.94), (0.94, 0.94)):
            layer.disc((WIDE * x, WIDE * y), WIDE * 0.02, (130, 132, 135), DARK, 5)
    if kind == "pipe":
        layer.box((half - 130, WIDE * 0.9, half + 130, high - 1), (190, 155, 80), 10, (120, 95, 40), 10)
    edge = half * between(random, 0.04, 0.14)
    layer.disc((half, half), half * (0.96 if kind == "square" else 1) - 2, _mix(rim, (0, 0, 0), 0.25))
    layer.disc((half, half), half * 0.96 - 4, rim)
    layer.disc((half, half), half * 0.96 - edge, ground, _mix(ground, (0, 0, 0), 0.25), 10)
    return layer, (half, half), half * 0.96 - edge


def _wide_case(random: Random, ground: Colour) -> tuple[Layer, Point, float]:
    """A panel meter with half a dial."""
    high = WIDE * between(random, 0.68, 0.8)
    layer, case = Layer(WIDE, high), pick(random, CASES)
    layer.box((0, 0, WIDE - 1, high - 1), case, WIDE * 0.04, _mix(case, (0, 0, 0), 0.4), 12)
    edge = WIDE * between(random, 0.03, 0.06)
    layer.box((edge, edge, WIDE - edge, high - edge), ground, WIDE * 0.02)
    radius = min(WIDE / 2 - edge, high - edge * 2 - high * 0.14) * 0.98
    return layer, (WIDE / 2, edge + radius * 1.02), radius


def _gauge(random: Random) -> tuple[Image.Image, float, tuple[float, float, float]]:
    scale = pick(random, (*SCALES, *MORE_SCALES))
    low, high, step = scale
    ground = pick(random, FACE_COLOURS)
    half = chance(random, 0.22)
    layer, centre, radius = (_wide_case if half else _round_case)(random, ground)
    sweep = 180.0 if half else pick(random, (180, 210, 240, 270, 270, 300, between(random, 180, 300)))
    dial = Dial(centre, radius, low, high, step, sweep)
    ink = _ink(ground)
    _scale(random, layer, dial, ink, not half and chance(random, 0.3))
    word = pick(random, ("bar", "°C", "psi", "kPa", "PRESSURE", "TEMP", "V", "%", "", ""))
    if word:
        font = _fit(pick(random, FACES), word, radius * 0.4, radius * 0.13)
        layer.write((centre[0], centre[1] + radius * (-0.3 if half else 0.34)), word, font, ink)
    value = low + (high - low) * between(random, 0.0, 1.0)
    if chance(random, 0.15):
        value = low + step * int(random.integers(0, round((high - low) / step) + 1))
    _needle(random, layer, dial, value, ground)
    return _laid(random, layer, 0.5, least=0.6 if half else 0.46), value, scale


def gauge(random: Random) -> Scene:
    """A gauge with a needle."""
    image, value, (low, high, _) = _gauge(random)
    result = Scene(image)
    answer, tolerance = written(value, low, high), 0.02 * (high - low)
    result.ask("gauge", (*GAUGE_QUESTIONS, *READING_QUESTIONS), answer, random, tolerance=tolerance)
    return result


# Signal towers


def _lamp_colour(name: str, lit: bool) -> Colour:
    if lit:
        return _mix(LAMPS[name], (255, 255, 255), 0.06)
    return _mix(_mix(LAMPS[name], (0, 0, 0), 0.62), (80, 80, 80), 0.15)


def _cylinder(random: Random, name: str, lit: bool, wide: int, high: int) -> Layer:
    """Return one lamp of a tower, seen from the side."""
    across = np.sin(np.linspace(0.12, math.pi - 0.12, wide))
    down = np.sin(np.linspace(0.25, math.pi - 0.25, high))
    core = (across[None, :] ** 3 * down[:, None])[..., None]
    base = np.array(_lamp_colour(name, lit), dtype=np.float64)
    dark = base * (0.72 + 0.28 * across[None, :, None]) + 22 * np.roll(core, -wide // 4, axis=1)
    pixels = base * 0.9 + (255 - base * 0.9) * core * 0.65 if lit else dark
    layer = Layer(wide, high)
    layer.image.paste(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    return layer


def _tower(random: Random, names: Sequence[str], lit: set[int]) -> Layer:
    """Draw lamps one above the other on a pole."""
    wide, each = 420, int(between(random, 200, 330))
    margin, gap = 130, int(between(random, 12, 36))
    body = pick(random, ((40, 41, 44), (88, 92, 98), (125, 128, 132)))
    top, pole = int(between(random, 40, 90)), int(between(random, 60, 220))
    high = top + len(names) * (each + gap) + 70 + pole
    layer, glow = Layer(wide + 2 * margin, high + margin), Layer(wide + 2 * margin, high + margin)
    x0, x1, y = margin, margin + wide, margin + top
    layer.box((x0, margin, x1, y + 30), body, 40)
    middle = (x0 + x1) / 2
    layer.box((middle - 45, high - pole, middle + 45, high + margin), _mix(body, (120, 122, 125), 0.5))
    layer.box((x0 - 12, y - 4, x1 + 12, y + len(names) * (each + gap) + 70), body, 18)
    for index, name in enumerate(names):
        lamp = _cylinder(random, name, index in lit, wide, each)
        (glow if index in lit else layer).image.paste(lamp.image, (x0, y + gap // 2 + index * (each + gap)))
    layer.glow(glow, 75, 1.0)
    return layer


def _lamp_box(random: Random, names: Sequence[str], lit: set[int]) -> Layer:
    """Draw a box with round lamps, in a column or in a row."""
    each, down = 420, chance(random, 0.6)
    long = each * len(names)
    case = pick(random, ((38, 39, 42), (118, 121, 126), (75, 78, 84), (70, 80, 75)))
    layer, glow = (Layer(each, long) if down else Layer(long, each) for _ in range(2))
    wide, high = layer.image.size
    layer.box((0, 0, wide - 1, high - 1), case, between(random, 10, 120), _mix(case, (0, 0, 0), 0.4), 12)
    for index, name in enumerate(names):
        along = each * (index + 0.5)
        centre = (each / 2, along) if down else (along, each / 2)
        layer.disc(centre, each * 0.4, _mix(case, (0, 0, 0), 0.5))
        fill = _lamp_colour(name, index in lit)
        (glow if index in lit else layer).disc(centre, each * 0.35, fill)
        for share in np.linspace(0, 1, 12) if index in lit else ():
            inner = _mix(fill, (255, 255, 255), 0.8 * share)
            glow.disc(centre, each * 0.25 * (1 - share) + 4, inner)
    layer.glow(glow, 45, 1.0)
    return layer


def _light(random: Random) -> tuple[Image.Image, list[str], list[str]]:
    count = int(random.integers(2, 6))
    names = [STACK[index] for index in random.permutation(5)[:count]]
    on = pick(random, (0, 1, 1, 1, 1, 1, 1, 2))
    lit = {int(index) for index in random.permutation(count)[: min(on, count)]}
    layer = (_tower if chance(random, 0.65) else _lamp_box)(random, names, lit)
    shape = layer.image.height / layer.image.width
    image = _laid(
        random,
        layer,
        min(0.5, 0.35 if shape < 3 else 0.3),
        0.6 if shape > 1 else 0.9,
        0.0 if shape > 1 else 0.52,
        lamps=False,
    )
    return image, names, [name for index, name in enumerate(names) if index in lit]


def light(random: Random) -> Scene:
    """A signal tower."""
    image, names, on = _light(random)
    result = Scene(image)
    questions = (
        (*LIGHT_QUESTIONS, *TOWER_QUESTIONS, *ONE_LAMP_QUESTIONS)
        if len(on) == 1
        else (*LAMPS_QUESTIONS, *LIGHT_QUESTIONS)
    )
    result.ask("light", questions, listed(on), random)
    name = pick(random, on) if on and chance(random, 0.4) else pick(random, names if chance(random, 0.8) else STACK)
    asked = (
        f"Is the {name} light on?",
        f"Is the {name} lamp lit?",
        f"Does the {name} light shine?",
        f"Can you see the {name} light lit up?",
    )
    result.ask("presence", asked, "yes" if name in on else "no", random)
    return result


# Things to count


def _regular(corners: int, inner: float = 1.0, stretch: float = 1.0, turn: float = -90) -> list[Point]:
    """Return a polygon of radius one; every second corner lies `inner` from the middle."""
    points = []
    for index in range(corners):
        out = inner if index % 2 else 1.0
        angle = math.radians(turn + index * 360 / corners)
        points.append((math.cos(angle) * out * stretch, math.sin(angle) * out))
    return points


def _gear_outline() -> list[Point]:
    points, teeth = [], 10
    for index in range(teeth):
        for shift, out in ((-0.3, 0.78), (-0.17, 1.0), (0.17, 1.0), (0.3, 0.78)):
            angle = 2 * math.pi * (index + shift) / teeth
            points.append((math.cos(angle) * out, math.sin(angle) * out))
    return points


OUTLINES: dict[str, list[Point]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": _regular(3),
    "star": _regular(10, 0.42),
    "cross": [
        (-0.3, -1),
        (0.3, -1),
        (0.3, -0.3),
        (1, -0.3),
        (1, 0.3),
        (0.3, 0.3),
        (0.3, 1),
        (-0.3, 1),
        (-0.3, 0.3),
        (-1, 0.3),
        (-1, -0.3),
        (-0.3, -0.3),
    ],
    "diamond": _regular(4, 1.0, 0.62),
    "hexagon": _regular(6),
    "nut": _regular(6),
    "gear": _gear_outline(),
}
HOLES = {"ring": 0.68, "washer": 0.48, "nut": 0.5, "gear": 0.27}


def _screw(layer: Layer, size: float, fill: Colour, edge: Colour) -> None:
    """Draw a screw from the side, its head on top."""
    middle = layer.image.width / 2
    shaft = [(-0.2, -0.6), (0.2, -0.6), (0.2, 0.7), (0, 1.0), (-0.2, 0.7)]
    layer.pen.polygon([(middle + x * size, middle + y * size) for x, y in shaft], fill, edge, 5)
    for y in np.arange(-0.4, 0.75, 0.16):
        ends = (middle - size * 0.25, middle + y * size + 8, middle + size * 0.25, middle + y * size - 8)
        layer.pen.line(ends, edge, max(4, round(size * 0.05)))
    head = (middle - size * 0.5, middle - size, middle + size * 0.5, middle - size * 0.55)
    layer.box(head, fill, size * 0.16, edge, 6)
    layer.box((middle - size * 0.08, middle - size, middle + size * 0.08, middle - size * 0.82), edge)


def _thing(random: Random, kind: str, size: float, fill: Colour) -> Image.Image:
    """Return one thing with transparent surroundings and holes."""
    layer = Layer(size * 3, size * 3)
    middle, edge = size * 1.5, _mix(fill, (0, 0, 0) if sum(fill) > 200 else (255, 255, 255), 0.4)
    if kind == "screw":
        _screw(layer, size, fill, edge)
    elif kind in OUTLINES:
        points = [(middle + x * size, middle + y * size) for x, y in OUTLINES[kind]]
        layer.pen.polygon(points, fill, edge, max(3, round(size * 0.05)))
    else:
        layer.disc((middle, middle), size, fill, edge, max(3, round(size * 0.05)))
    if kind == "nut":
        layer.disc((middle, middle), size * 0.72, _mix(fill, (255, 255, 255), 0.2), edge, 4)
    if kind in HOLES:
        hole = size * HOLES[kind]
        layer.pen.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), (0, 0, 0, 0), edge, 6)
    turn = between(random, 0, 360) if kind in PARTS else between(random, -18, 18)
    return layer.image.rotate(turn, Image.Resampling.BICUBIC)


def _spots(random: Random, count: int, box: Box, size: float) -> list[Point]:
    """Return places for things that do not touch."""
    spots: list[Point] = []
    for _ in range(4000):
        x, y = between(random, box[0] + size, box[2] - size), between(random, box[1] + size, box[3] - size)
        if len(spots) < count and all(math.hypot(x - a, y - b) > size * 2.2 for a, b in spots):
            spots.append((x, y))
    return spots


def _tray(random: Random, high: float, ground: Colour) -> tuple[Layer, Box]:
    """Draw a tray, a mat or a sheet of paper."""
    layer, edge = Layer(WIDE, high), between(random, 0, 60)
    layer.box((0, 0, WIDE - 1, high - 1), _mix(ground, (0, 0, 0), 0.35), between(random, 0, 70))
    layer.box((edge, edge, WIDE - edge - 1, high - edge - 1), ground, between(random, 0, 40))
    return layer, (edge + 30, edge + 30, WIDE - edge - 30, high - edge - 30)


def _count(random: Random) -> tuple[Image.Image, str, int]:
    kinds = PARTS if chance(random, 0.55) else SHAPES
    target = pick(random, kinds)
    wanted = int(random.integers(0, 13))
    others = int(random.integers(0 if wanted else 2, 5))
    ground = pick(random, GROUNDS)
    layer, box = _tray(random, WIDE * between(random, 0.6, 1.05), ground)
    fills = [fill for fill in (METALS if kinds is PARTS else PAINTS) if _apart(fill, ground) > 170]
    size = between(random, 0.066, 0.088) * WIDE * (1.15 if wanted + others < 7 else 0.9)
    spots = _spots(random, wanted + others, box, size)
    wanted, one = min(wanted, len(spots)), pick(random, fills) if chance(random, 0.4) else None
    for index, (x, y) in enumerate(spots):
        kind = target if index < wanted else pick(random, [kind for kind in kinds if kind != target])
        tile = _thing(random, kind, size, one or pick(random, fills))
        shadow = Image.new("RGBA", tile.size, (0, 0, 0, 0))
        shadow.putalpha(tile.getchannel("A").filter(ImageFilter.GaussianBlur(8)).point(lambda alpha: alpha // 3))
        layer.over(shadow, (round(x - tile.width / 2) + 10, round(y - tile.height / 2) + 14))
        layer.over(tile, (round(x - tile.width / 2), round(y - tile.height / 2)))
    return _laid(random, layer, 0.68, 0.92, 0.62), target, wanted


def count(random: Random) -> Scene:
    """Like things among a few others, on a tray."""
    image, kind, number = _count(random)
    result = Scene(image)
    questions = tuple(question.format(plural(kind)) for question in COUNT_QUESTIONS)
    result.ask("count", questions, str(number), random)
    return result


# Pictures in which nothing can be read


def _page(random: Random) -> Layer:
    """A printed page."""
    layer = Layer(WIDE, WIDE * between(random, 1.1, 1.45))
    layer.box((0, 0, *layer.image.size), pick(random, ((250, 249, 244), (238, 230, 210))))
    font = _font(pick(random, FACES), int(between(random, 48, 80)))
    y = 120.0
    while y < layer.image.height - 160:
        line = " ".join(pick(random, WORDS) for _ in range(12))
        while font.getlength(line) > WIDE - 260:
            line = line.rsplit(" ", 1)[0]
        layer.write((130, y), line, font, DARK, "la")
        y += font.size * (1.5 if chance(random, 0.85) else 2.6)
    return layer


def _shelf(random: Random) -> Layer:
    """A shelf with books."""
    layer, wood = Layer(WIDE, 1300), pick(random, ((150, 100, 60), (225, 220, 210), (90, 60, 40)))
    layer.box((0, 0, WIDE - 1, 1299), _mix(wood, (0, 0, 0), 0.3), 0, wood, 45)
    for bottom in (640, 1255):
        x = 50.0
        while x < WIDE - 200:
            wide, high = between(random, 50, 120), between(random, 330, 540)
            layer.box((x, bottom - high, x + wide, bottom), _mix(pick(random, PAINTS), (128, 110, 90), 0.4), 6)
            x += wide + (5 if chance(random, 0.9) else 90)
        layer.box((0, bottom, WIDE, bottom + 45), wood)
    return layer


def _mug(random: Random) -> Layer:
    """A mug."""
    layer, fill = Layer(1250, 1150), pick(random, (*PAINTS, LIGHT))
    layer.pen.ellipse((750, 250, 1240, 850), None, _mix(fill, (0, 0, 0), 0.1), 100)
    layer.box((40, 60, 950, 1140), fill, 110)
    layer.pen.ellipse((40, 0, 950, 170), _mix(fill, (255, 255, 255), 0.25))
    layer.pen.ellipse((90, 25, 900, 150), (70, 42, 25))
    return layer


def _cupboard(random: Random) -> Layer:
    """A cupboard with doors."""
    wood = pick(random, ((165, 115, 70), (235, 232, 225), (80, 95, 100), (110, 70, 45)))
    layer = Layer(WIDE, between(random, 1000, 1900))
    high = layer.image.height
    layer.box((0, 0, WIDE - 1, high - 60), wood, 10, _mix(wood, (0, 0, 0), 0.3), 16)
    for x in (40, WIDE // 2 + 10):
        layer.box((x, 50, x + 690, high - 110), _mix(wood, (255, 255, 255), 0.1), 8, _mix(wood, (0, 0, 0), 0.35), 10)
    for x in (660, 780):
        layer.box((x, high * 0.42, x + 50, high * 0.52), (120, 118, 112), 20)
    for x in (60, WIDE - 140):
        layer.box((x, high - 62, x + 80, high - 1), _mix(wood, (0, 0, 0), 0.5))
    return layer


def _parcel(random: Random) -> Layer:
    """A parcel with tape."""
    layer = Layer(WIDE, between(random, 700, 1200))
    high, card = layer.image.height, pick(random, ((190, 150, 100), (170, 130, 85), (235, 233, 228)))
    layer.box((0, 0, WIDE - 1, high - 1), card, 12, _mix(card, (0, 0, 0), 0.3), 10)
    layer.box((0, high * 0.44, WIDE, high * 0.56), _mix(card, (255, 240, 200), 0.5))
    words = pick(random, ("FRAGILE", "THIS WAY UP", "HANDLE WITH CARE", "KITCHEN"))
    layer.write((WIDE * 0.5, high * 0.24), words, _fit(pick(random, FACES), words, WIDE * 0.6, high * 0.15), DARK)
    return layer


def _other(random: Random) -> Image.Image:
    """Return a photograph alone, or with something in it that has no reading."""
    if chance(random, 0.35):
        return _taken(random, _background(random, _size(random, 0.5, 0.5), lamps=False))
    layer = pick(random, (_page, _shelf, _mug, _cupboard, _parcel))(random)
    return _laid(random, layer, 0.35, lamps=False)


def nothing(random: Random) -> Scene:
    """A picture without what is asked about; counting is left out, since its answer would be "0"."""
    asked = {"display": DISPLAY_QUESTIONS, "gauge": GAUGE_QUESTIONS, "light": TOWER_QUESTIONS}
    shown: dict[str, Callable[[Random], Image.Image]] = {
        "display": lambda random: _display(random)[0],
        "gauge": lambda random: _gauge(random)[0],
        "light": lambda random: _light(random)[0],
        "count": lambda random: _count(random)[0],
    }
    what = pick(random, tuple(shown)) if chance(random, 0.5) else ""
    result = Scene(shown[what](random) if what else _other(random))
    about = pick(random, [name for name in asked if name != what])
    questions = (*asked[about], *LIGHT_QUESTIONS) if about == "light" and not what else asked[about]
    result.ask("refusal", questions, REFUSED, random)
    return result


SCENES: dict[str, Callable[[Random], Scene]] = {
    "display": display,
    "gauge": gauge,
    "light": light,
    "count": count,
    "nothing": nothing,
}


# A sheet to look at


def contact_sheet(seed: int, each: int, cell: int, only: str | None = None) -> Image.Image:
    """Return some pictures of each kind, with what is asked and answered below them."""
    names = [only] * 5 if only else list(SCENES)
    sheet = Image.new("RGB", (each * cell, len(names) * (cell + 44)), "white")
    pen, font = ImageDraw.Draw(sheet), _font("B612-Regular.otf", 13)
    for row, name in enumerate(names):
        for column in range(each):
            scene = SCENES[name](np.random.default_rng((seed, row, column)))
            image = ImageOps.contain(scene.image, (cell - 8, cell - 8))
            sheet.paste(image, (column * cell + 4, row * (cell + 44) + 4))
            for line, pair in enumerate(scene.pairs[:2]):
                at = (column * cell + 4, row * (cell + 44) + cell + line * 18)
                pen.text(at, f"{pair.question} {pair.answer}", "black", font)
    return sheet


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seed", default=7)
@click.option("--each", default=5, help="Pictures of each kind.")
@click.option("--cell", default=392, help="Pixels across a picture.")
@click.option("--only", type=click.Choice(list(SCENES)), help="One kind, five rows of it.")
def main(output: Path, seed: int, each: int, cell: int, only: str | None) -> None:
    """Draw a contact sheet."""
    contact_sheet(seed, each, cell, only).save(output)


if __name__ == "__main__":
    main()
