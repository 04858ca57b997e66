"""Three little factories, each one fixed camera before one device, as pictures with questions and answers.

    python -m benchmarks.factories FOLDER --factory boiler --pictures 300 --seed 1

A site never changes: its wall, its device and the dirt on its lens are the same in every picture. What changes is what
months bring: the reading, the light, shadows, small moves of the camera, reflections, hands, cables, blur and noise.
All is drawn from strokes and noise, with numpy and pillow alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import cos, hypot, radians, sin
from pathlib import Path

import click
import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Array = NDArray[np.float64]
Point = tuple[float, float]
Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]
Factory = Callable[[Generator], tuple[Image.Image, str, str]]

SIZE = (640, 480)
"""The size of a picture."""
CANVAS = (1440, 1080)
"""The size a site is drawn at: twice a picture's, and a margin for the camera to move in."""
GAMMA = 2.2

# Textures.


def canvas(mode: str = "L") -> Image.Image:
    """Return a black canvas."""
    return Image.new(mode, CANVAS)


def clouds(random: Generator, size: tuple[int, int], cells: tuple[int, int], octaves: int = 3) -> Array:
    """Return smooth noise of about zero mean and one deviation: `cells` across and down, then finer and weaker."""
    total = np.zeros((size[1], size[0]))
    for octave in range(octaves):
        shape = (cells[1] * 2**octave + 1, cells[0] * 2**octave + 1)
        grid = Image.fromarray(random.standard_normal(shape).astype(np.float32))
        total += np.asarray(grid.resize(size, Image.Resampling.BICUBIC), dtype=np.float64) * 0.55**octave
    return np.asarray((total - total.mean()) / (total.std() + 1e-6))


def picture(pixels: Array) -> Image.Image:
    """Return an array of 0 to 255 as a picture."""
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def bricks(random: Generator, width: int = 190, height: int = 74, mortar: int = 9) -> Array:
    """Return a wall of old bricks, every other row moved by half a brick."""
    y, x = np.mgrid[0 : CANVAS[1], 0 : CANVAS[0]]
    row = y // height
    moved = x + (row % 2) * (width // 2)
    tint = random.normal(1.0, 0.13, (row.max() + 1, moved.max() // width + 1))[row, moved // width]
    edge = np.minimum(np.minimum(moved % width, y % height), np.minimum(-moved % width, -y % height))
    joint = np.clip((mortar / 2 + 2 + clouds(random, CANVAS, (90, 70)) * 1.5 - edge) / 3, 0, 1)[..., None]
    grain = (1 + 0.09 * clouds(random, CANVAS, (120, 90)) + 0.07 * clouds(random, CANVAS, (6, 5)))[..., None]
    brick = np.array([146, 84, 66]) * tint[..., None] * grain
    return np.asarray(brick * (1 - joint) + np.array([150, 143, 132]) * grain * joint)


def sheet(random: Generator, colour: Colour, brushed: float) -> Array:
    """Return sheet metal of a colour: brushed along its length, stained in clouds."""
    streaks = clouds(random, CANVAS, (5, 400), 2) * brushed
    stains = clouds(random, CANVAS, (7, 5), 4) * 0.06
    return np.asarray(np.array(colour) * (1 + streaks + stains)[..., None])


def pipe(image: Image.Image, box: tuple[int, int, int, int], colour: Colour, upright: bool) -> None:
    """Lay a pipe into a picture: a cylinder lit from one side, with its shadow on the wall."""
    left, top, right, bottom = box
    shade = canvas()
    ImageDraw.Draw(shade).rectangle((left + 22, top + 22, right + 22, bottom + 22), fill=120)
    image.paste((20, 18, 18), mask=shade.filter(ImageFilter.GaussianBlur(14)))
    across = np.linspace(-1, 1, (right - left) if upright else (bottom - top))
    profile = 0.35 + 0.65 * np.sqrt(np.clip(1 - (across + 0.25) ** 2 / 1.6, 0, 1))
    profile += 0.35 * np.exp(-(((across + 0.4) / 0.12) ** 2))
    grid = profile[None, :] if upright else profile[:, None]
    shape = np.ones((bottom - top, right - left)) * grid
    image.paste(picture(np.array(colour) * shape[..., None]), (left, top))


def rivet(draw: ImageDraw.ImageDraw, centre: Point, radius: float, colour: Colour) -> None:
    """Draw the head of a rivet: a shadow, a dome and a gleam."""
    draw.ellipse(around(centre[0] + 3, centre[1] + 4, radius), fill=shaded(colour, 0.45))
    draw.ellipse(around(*centre, radius), fill=colour)
    draw.ellipse(around(centre[0] - radius * 0.3, centre[1] - radius * 0.3, radius * 0.4), fill=shaded(colour, 1.35))


def screw(draw: ImageDraw.ImageDraw, centre: Point, turn: float) -> None:
    """Draw a slotted screw, turned by an angle."""
    rivet(draw, centre, 15, (128, 126, 120))
    end = polar(centre, 12, turn)
    draw.line((polar(centre, -12, turn), end), fill=(46, 45, 44), width=5)


def around(x: float, y: float, radius: float) -> Box:
    """Return the box about a circle."""
    return (x - radius, y - radius, x + radius, y + radius)


def polar(centre: Point, radius: float, degrees: float) -> Point:
    """Return the point at a radius and an angle, counted counter-clockwise from the right."""
    return centre[0] + radius * cos(radians(degrees)), centre[1] - radius * sin(radians(degrees))


def shaded(colour: Colour, gain: float) -> Colour:
    """Return a colour made darker or lighter."""
    red, green, blue = (min(255, int(channel * gain)) for channel in colour)
    return red, green, blue


def text(draw: ImageDraw.ImageDraw, centre: Point, words: str, size: int, colour: Colour) -> None:
    """Write words about a point."""
    draw.text(centre, words, fill=colour, font=ImageFont.load_default(size), anchor="mm")


def drop_shadow(image: Image.Image, box: Box, radius: float, depth: int = 24) -> None:
    """Darken the wall under a box that stands out from it."""
    shade = canvas()
    moved = (box[0] - 6, box[1] + depth / 2, box[2] + depth, box[3] + depth)
    ImageDraw.Draw(shade).rounded_rectangle(moved, radius, fill=170)
    image.paste((12, 12, 14), mask=shade.filter(ImageFilter.GaussianBlur(depth * 0.7)))


# The camera.


@dataclass
class Layers:
    """A site at one moment, before any light falls on it."""

    surface: Image.Image
    """The colours of all that is seen."""
    glow: Image.Image
    """What shines by itself."""
    glass: Image.Image
    """Where a pane reflects."""
    keep: Image.Image
    """What nothing may stand before, or the answer could not be read."""


@dataclass
class Light:
    """The light of one moment."""

    day: Array
    """The colour of the light that falls on all alike."""
    lamp: float
    """How strong the lamp beside the device is."""
    noise: float
    """The noise of the sensor, of 255."""


def daylight(random: Generator) -> Light:
    """Return the light of a moment: mostly day, at times dusk, at times night with a lamp."""
    hour = random.random()
    warmth = random.uniform(-0.08, 0.1)
    tint = np.array([1 + warmth, 1, 1 - warmth])
    if hour < 0.55:
        return Light(tint * random.uniform(0.7, 1.25), 0.0, random.uniform(1.5, 5))
    if hour < 0.75:
        return Light(tint * np.array([1.1, 0.95, 0.8]) * random.uniform(0.4, 0.7), 0.0, random.uniform(3, 7))
    return Light(
        np.array([0.8, 0.95, 1.2]) * random.uniform(0.03, 0.13), random.uniform(0.3, 0.9), random.uniform(4, 9)
    )


def pose(random: Generator) -> tuple[float, ...]:
    """Return where a camera that was moved a little looks: the eight numbers of a perspective."""
    width, height = SIZE[0] * 2, SIZE[1] * 2
    turn, zoom = radians(random.uniform(-2.5, 2.5)), random.uniform(0.93, 1.0)
    shift = random.uniform(-1, 1, 2) * (22, 15)
    rows, values = [], []
    for x, y in ((0, 0), (width, 0), (width, height), (0, height)):
        across, down = (x - width / 2) * zoom, (y - height / 2) * zoom
        to_x = CANVAS[0] / 2 + across * cos(turn) - down * sin(turn) + shift[0] + random.uniform(-8, 8)
        to_y = CANVAS[1] / 2 + across * sin(turn) + down * cos(turn) + shift[1] + random.uniform(-8, 8)
        rows += [[x, y, 1, 0, 0, 0, -to_x * x, -to_x * y], [0, 0, 0, x, y, 1, -to_y * x, -to_y * y]]
        values += [to_x, to_y]
    return tuple(float(value) for value in np.linalg.solve(np.array(rows), np.array(values)))


def seen(layer: Image.Image, view: tuple[float, ...]) -> Image.Image:
    """Return a layer as the camera sees it, at a picture's size."""
    double = (SIZE[0] * 2, SIZE[1] * 2)
    warped = layer.transform(double, Image.Transform.PERSPECTIVE, view, Image.Resampling.BILINEAR)
    return warped.reduce(2)


def unit(image: Image.Image) -> Array:
    """Return a picture as numbers from 0 to 1."""
    return np.asarray(image, dtype=np.float64) / 255


def fallen_light(random: Generator, light: Light) -> Array:
    """Return how much light falls on each pixel: the day less a shadow that moves across, and the lamp's pool."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    slope = 1 + 0.25 * (random.uniform(-1, 1) * (x / SIZE[0] - 0.5) + random.uniform(-1, 1) * (y / SIZE[1] - 0.5))
    day = slope * (1 - unit(cast_shadow(random)) * random.uniform(0.3, 0.65))
    centre = random.uniform((230, 140), (400, 290))
    far = np.hypot(x - centre[0], (y - centre[1]) * 1.15)
    pool = light.lamp * np.exp(-((far / random.uniform(190, 320)) ** 2))
    warm = np.array([1.12, 0.98, 0.74])
    return np.asarray(day[..., None] * light.day + pool[..., None] * warm)


def cast_shadow(random: Generator) -> Image.Image:
    """Return the shadow of this moment: none, one edge, a beam, or the bars of a window."""
    shade = Image.new("L", SIZE)
    draw = ImageDraw.Draw(shade)
    kind = random.choice(["none", "edge", "beam", "bars"], p=[0.3, 0.25, 0.2, 0.25])
    lean, start = random.uniform(-260, 260), random.uniform(-100, 640)
    bands: dict[str, list[Point]] = {
        "none": [],
        "edge": [(0, 900)],
        "beam": [(0, random.uniform(60, 200))],
        "bars": [(offset, offset + 34) for offset in range(-640, 700, 150)],
    }
    for left, right in bands[str(kind)]:
        a, b = start + left, start + right
        draw.polygon([(a, 0), (b, 0), (b + lean, SIZE[1]), (a + lean, SIZE[1])], fill=255)
    return shade.filter(ImageFilter.GaussianBlur(random.uniform(2, 12)))


def reflection(random: Generator, glass: Image.Image) -> Image.Image:
    """Return what the pane of the device reflects: a window of some panes, and someone's dim outline."""
    layer = canvas()
    draw = ImageDraw.Draw(layer)
    if random.random() < 0.6:
        x, y = random.uniform(250, 1000), random.uniform(150, 700)
        width, height, lean = random.uniform(60, 150), random.uniform(90, 190), random.uniform(-50, 50)
        for column, row in ((0, 0), (1, 0), (0, 1), (1, 1)):
            a, b = x + column * (width + 14), y + row * (height + 14)
            c = lean * row
            draw.polygon(
                [(a + c, b), (a + width + c, b), (a + width + c + lean, b + height), (a + c + lean, b + height)], 255
            )
    if random.random() < 0.4:
        x, y = random.uniform(300, 1100), random.uniform(300, 600)
        draw.ellipse((x - 90, y - 120, x + 90, y + 120), fill=90)
        draw.rounded_rectangle((x - 200, y + 110, x + 200, y + 700), 120, fill=90)
    return ImageChops.multiply(layer.filter(ImageFilter.GaussianBlur(random.uniform(3, 12))), glass)


def cable(random: Generator) -> tuple[Image.Image, Image.Image]:
    """Return a cable that hangs through the picture, and where it is."""
    width = int(random.integers(10, 22))
    start, end = (
        np.array([random.uniform(0, 1280), -40]),
        np.array([random.choice([-40, 1320]), random.uniform(100, 900)]),
    )
    sag = (start + end) / 2 + random.uniform((-200, 0), (200, 420))
    ts = np.linspace(0, 1, 60)[:, None]
    points = (1 - ts) ** 2 * start + 2 * ts * (1 - ts) * sag + ts**2 * end
    colour = ((34, 34, 36), (150, 66, 30), (70, 80, 96))[int(random.integers(3))]
    layer, mask = Image.new("RGB", (1280, 960)), Image.new("L", (1280, 960))
    ImageDraw.Draw(mask).line([(x, y) for x, y in points], fill=255, width=width, joint="curve")
    draw = ImageDraw.Draw(layer)
    for part, gain, lift in ((1.2, 0.6, 0), (0.7, 1.0, -1), (0.25, 1.8, -3)):
        line = [(x + lift, y + lift) for x, y in points]
        draw.line(line, fill=shaded(colour, gain), width=max(2, int(width * part)), joint="curve")
    return layer, mask


def glove(random: Generator) -> tuple[Image.Image, Image.Image]:
    """Return a gloved hand that reaches in from an edge of the picture, and where it is."""
    colour = ((168, 128, 84), (92, 96, 104), (196, 92, 40), (58, 84, 120))[int(random.integers(4))]
    layer, mask = Image.new("RGB", (1280, 960), colour), Image.new("L", (1280, 960))
    draw, cover = ImageDraw.Draw(layer), ImageDraw.Draw(mask)
    aim = random.uniform(0, 360)
    palm = polar((640, 480), random.uniform(480, 640), aim)
    inward = aim + 180 + random.uniform(-15, 15)
    wrist = polar(palm, -900, inward)
    strokes: list[tuple[Point, Point, float]] = [(wrist, palm, 150)]
    strokes += [(palm, polar(palm, 210 - 9 * step**2, inward + step * 15), 52) for step in (-1.5, -0.5, 0.5, 1.5)]
    strokes.append((palm, polar(palm, 150, inward + 66), 56))
    for gain, part, lift in ((0.55, 1.0, 0), (0.85, 0.86, -3), (1.05, 0.6, -8)):
        for one, other, width in strokes:
            thick_line(
                draw,
                (one[0] + lift, one[1] + lift),
                (other[0] + lift, other[1] + lift),
                width * part,
                shaded(colour, gain),
            )
    for one, other, width in strokes:
        thick_line(cover, one, other, width, 255)
    return layer.filter(ImageFilter.GaussianBlur(5)), mask.filter(ImageFilter.GaussianBlur(2))


def thick_line(draw: ImageDraw.ImageDraw, start: Point, end: Point, width: float, fill: Colour | int) -> None:
    """Draw a line with round ends."""
    draw.line((start, end), fill=fill, width=int(width))
    for point in (start, end):
        draw.ellipse(around(*point, width / 2), fill=fill)


def hindrance(random: Generator, keep: Image.Image) -> tuple[Image.Image, Image.Image] | None:
    """Return what stands partly before the device, if anything does: a cable or a hand, clear of what is to be read."""
    wanted = unit(keep)
    if random.random() < 0.5:
        return None
    draw = cable if random.random() < 0.5 else glove
    for _ in range(12):
        layer, mask = draw(random)
        small = mask.reduce(2)
        if (unit(small) * wanted).sum() < 0.04 * wanted.sum():
            return layer.reduce(2), small
    return None


@lru_cache(maxsize=4)
def dirt(site: int) -> Array:
    """Return the dirt of a site's lens, which a wipe never quite takes off: 0 for clean, 1 for the worst."""
    random = default_rng(site)
    blots = np.clip(clouds(random, SIZE, (5, 4), 3) - 0.7, 0, 1.5) / 1.5
    specks = Image.new("L", SIZE)
    draw = ImageDraw.Draw(specks)
    for _ in range(26):
        x, y = random.uniform((0, 0), SIZE)
        draw.ellipse(around(x, y, random.uniform(1.5, 6)), fill=int(random.integers(60, 200)))
    return np.clip(0.6 * blots + unit(specks.filter(ImageFilter.GaussianBlur(1.6))), 0, 1)


def photograph(random: Generator, layers: Layers, site: int) -> Image.Image:
    """Take the picture of a site at some moment of its months."""
    view, light = pose(random), daylight(random)
    surface, glow, keep = (seen(layer, view) for layer in (layers.surface, layers.glow, layers.keep))
    mirror = unit(seen(reflection(random, layers.glass), view))
    thing = hindrance(random, keep)
    if thing is not None:
        surface.paste(thing[0], mask=thing[1])
        glow.paste((0, 0, 0), mask=thing[1])
        mirror = mirror * (1 - unit(thing[1]))
    fallen = fallen_light(random, light)
    frame = unit(surface) ** GAMMA * fallen
    frame += mirror[..., None] * random.uniform(0.04, 0.2) * (0.25 + light.day)
    frame += shine(glow) * random.uniform(0.8, 1.15)
    frame = (
        frame * (1 - 0.65 * random.random() * dirt(site)[..., None]) + 0.06 * random.random() * dirt(site)[..., None]
    )
    frame = np.clip(frame * random.uniform(0.9, 1.15), 0, 1) ** (1 / GAMMA)
    return sensed(random, frame, light.noise)


def shine(glow: Image.Image) -> Array:
    """Return the light of what shines by itself, with its bloom in the lens."""
    near, far = (glow.filter(ImageFilter.GaussianBlur(radius)) for radius in (5, 30))
    return np.asarray(unit(glow) ** GAMMA + 0.35 * unit(near) ** GAMMA + 0.5 * unit(far) ** GAMMA)


def sensed(random: Generator, frame: Array, noise: float) -> Image.Image:
    """Return a frame as a cheap sensor keeps it: blurred a little, with noise."""
    image = picture(frame * 255).filter(ImageFilter.GaussianBlur(random.uniform(0, 1) ** 2 * 1.2))
    grain = random.normal(0, noise, (SIZE[1], SIZE[0], 3)) * 0.6 + random.normal(0, noise, (SIZE[1], SIZE[0], 1)) * 0.6
    return picture(np.asarray(image, dtype=np.float64) + grain)


# The boiler: a square meter whose pointer turns counter-clockwise about the lower right corner.

PIVOT = (1006.0, 826.0)
LOWEST, HIGHEST = 40, 160
TOLERANCE = 0.02 * (HIGHEST - LOWEST)
"""What a careful person reads the boiler's gauge within, in °F."""


def angle(value: float) -> float:
    """Return where on the scale a temperature stands: the lowest near the top, the highest near the left."""
    return 87 + 96 * (value - LOWEST) / (HIGHEST - LOWEST)


@lru_cache(maxsize=1)
def boiler_room() -> Image.Image:
    """Return the boiler's wall and its gauge, without the pointer."""
    random = default_rng(101)
    image = picture(bricks(random))
    pipe(image, (1210, 0, 1330, 1080), (176, 112, 70), upright=True)
    pipe(image, (0, 985, 1440, 1065), (150, 152, 150), upright=False)
    pipe(image, (1185, 420, 1355, 480), (96, 92, 86), upright=False)
    pipe(image, (90, 0, 150, 1080), (92, 104, 92), upright=True)
    draw = ImageDraw.Draw(image)
    for y in (437, 463):
        for x in (1200, 1340):
            rivet(draw, (x, y), 8, (130, 124, 112))
    case = (270, 112, 1140, 966)
    drop_shadow(image, case, 40, 30)
    draw.rounded_rectangle(case, 40, fill=(44, 54, 52))
    draw.rounded_rectangle((278, 118, 1132, 958), 36, outline=(84, 96, 92), width=5)
    face = (318, 158, 1094, 922)
    draw.rounded_rectangle(face, 24, fill=(232, 226, 204), outline=(18, 20, 20), width=8)
    for x, y, turn in ((296, 138, 20), (1116, 138, 75), (296, 942, 130), (1116, 942, 5)):
        screw(draw, (x, y), turn)
    gauge_scale(draw)
    return image


def gauge_scale(draw: ImageDraw.ImageDraw) -> None:
    """Draw the scale: a tick every 2 °F, a longer one every 10, a number every 20."""
    ink = (30, 28, 26)
    for low, high, colour in ((90, 120, (70, 138, 84)), (144, 160, (190, 52, 40))):
        box = around(*PIVOT, 556)
        draw.arc(box, 360 - angle(high), 360 - angle(low), fill=colour, width=16)
    for value in range(LOWEST, HIGHEST + 1, 2):
        length, width = (46, 7) if value % 20 == 0 else (34, 5) if value % 10 == 0 else (20, 3)
        draw.line((polar(PIVOT, 560, angle(value)), polar(PIVOT, 560 + length, angle(value))), fill=ink, width=width)
        if value % 20 == 0:
            text(draw, polar(PIVOT, 640, angle(value)), str(value), 40, ink)
    draw.arc(around(*PIVOT, 562), 360 - angle(HIGHEST), 360 - angle(LOWEST), fill=ink, width=4)
    text(draw, (770, 560), "°F", 64, ink)
    text(draw, (590, 872), "BOILER No. 2", 26, (90, 84, 74))
    text(draw, (590, 902), "RETURN WATER", 20, (90, 84, 74))


def blade(start: float, end: float, wide: float, narrow: float, at: float, move: float = 0) -> list[Point]:
    """Return a piece of the pointer between two radii, that grows narrow towards its end."""
    centre = (PIVOT[0] + move, PIVOT[1] + move)
    corners = ((start, wide), (end, narrow), (end, -narrow), (start, -wide))
    places = [(polar(centre, radius, at), side) for radius, side in corners]
    return [(x + side * sin(radians(at)), y + side * cos(radians(at))) for (x, y), side in places]


def pointer(image: Image.Image, value: float) -> None:
    """Draw the pointer: a black shank, an orange end, a round counterweight and a brass hub, above its own shadow."""
    at = angle(value)
    shade = canvas()
    ImageDraw.Draw(shade).polygon(blade(-60, 585, 11, 2, at, 9), fill=110)
    image.paste((40, 36, 30), mask=shade.filter(ImageFilter.GaussianBlur(5)))
    draw = ImageDraw.Draw(image)
    draw.polygon(blade(-62, 400, 13, 8, at), fill=(26, 26, 28))
    draw.polygon(blade(400, 588, 8, 2.5, at), fill=(222, 84, 20))
    draw.ellipse(around(*polar(PIVOT, -58, at), 23), fill=(26, 26, 28))
    draw.ellipse(around(*PIVOT, 36), fill=(112, 86, 40))
    draw.ellipse(around(*PIVOT, 30), fill=(190, 156, 84))
    screw(draw, PIVOT, 33)


def boiler_gauge(random: Generator) -> tuple[Image.Image, str, str]:
    """Draw the boiler's gauge at any reading, told to the nearest whole °F."""
    reading = int(random.integers(LOWEST, HIGHEST + 1))
    value = float(np.clip(reading + random.uniform(-0.45, 0.45), LOWEST, HIGHEST))
    surface = boiler_room().copy()
    pointer(surface, value)
    glass, keep = canvas(), canvas()
    ImageDraw.Draw(glass).rectangle((322, 162, 1090, 918), fill=255)
    low, high = max(LOWEST, value - 24), min(HIGHEST, value + 24)
    ImageDraw.Draw(keep).arc(around(*PIVOT, 665), 360 - angle(high), 360 - angle(low), fill=255, width=150)
    image = photograph(random, Layers(surface, canvas("RGB"), glass, keep), 11)
    return image, "What does the gauge read?", str(reading)


# The kiln: four slanted characters of fourteen segments, in the blue-green of a vacuum-fluorescent display.

SEGMENTS: dict[str, tuple[Point, Point]] = {
    "a": ((0, 0), (2, 0)),
    "b": ((2, 0), (2, 2)),
    "c": ((2, 2), (2, 4)),
    "d": ((0, 4), (2, 4)),
    "e": ((0, 2), (0, 4)),
    "f": ((0, 0), (0, 2)),
    "g": ((0, 2), (1, 2)),
    "n": ((1, 2), (2, 2)),
    "h": ((0, 0), (1, 2)),
    "i": ((1, 0), (1, 2)),
    "j": ((2, 0), (1, 2)),
    "k": ((0, 4), (1, 2)),
    "l": ((1, 2), (1, 4)),
    "m": ((2, 4), (1, 2)),
}
"""Each segment's ends, in cells of a character two wide and four high."""
# fmt: off
GLYPHS = {
    "0": "abcdefjk", "1": "bcj", "2": "abdegn", "3": "abcdgn", "4": "bcfgn", "5": "adfgm", "6": "acdefgn", "7": "abc",
    "8": "abcdefgn", "9": "abcdfgn", "-": "gn", " ": "", "A": "abcefgn", "C": "adef", "D": "abcdil", "E": "adefgn",
    "F": "aefg", "G": "acdefn", "H": "bcefgn", "I": "adil", "K": "efgjm", "L": "def", "M": "bcefhj", "N": "bcefhm",
    "O": "abcdef", "P": "abefgn", "R": "abefgmn", "S": "acdfgn", "T": "ail", "U": "bcdef", "V": "efjk", "W": "bcefkm",
    "X": "hjkm", "Y": "hjl", "Z": "adjk",
}
# fmt: on
"""Each character's segments. The nought is slashed, and the five has a slanted belly, so that O and S are others."""
STATES = [
    "HOLD",
    "DONE",
    "SOAK",
    "RAMP",
    "COOL",
    "IDLE",
    "FAIL",
    "DOOR",
    "STOP",
    "OPEN",
    "WAIT",
    "FIRE",
    "VENT",
    "LOAD",
]
PROGRAMS = ["BISQUE 04", "GLAZE 6", "LUSTRE 018", "RAKU", "STONEWARE 9", "CRYSTAL 10", "SLOW DRY", "TEST TILE"]
PHOSPHOR = (92, 255, 214)


def strokes(at: Point) -> dict[str, list[Point]]:
    """Return the outline of each segment of the character whose upper left corner is at a point."""
    outlines = {}
    for name, ends in SEGMENTS.items():
        (x, y), (p, q) = ((at[0] + 56 * u + 9 * (4 - v), at[1] + 58 * v) for u, v in ends)
        long = hypot(p - x, q - y)
        along, side = ((p - x) / long, (q - y) / long), 9 if name in "abcdefgn" else 7
        gap, tip = (14 if name in "hjkm" else 6), 9
        start, end = (x + along[0] * gap, y + along[1] * gap), (p - along[0] * gap, q - along[1] * gap)
        off = (-along[1] * side, along[0] * side)
        inner = (
            (start[0] + along[0] * tip, start[1] + along[1] * tip),
            (end[0] - along[0] * tip, end[1] - along[1] * tip),
        )
        one = [(point[0] + off[0], point[1] + off[1]) for point in inner]
        other = [(point[0] - off[0], point[1] - off[1]) for point in reversed(inner)]
        outlines[name] = [start, *one, end, *other]
    return outlines


@lru_cache(maxsize=1)
def kiln_wall() -> Image.Image:
    """Return the kiln's cabinet: painted steel with louvres, buttons, a knob and a dark window for the display."""
    random = default_rng(202)
    image = picture(sheet(random, (118, 132, 140), 0.02) * (1 + 0.05 * clouds(random, CANVAS, (160, 120)))[..., None])
    draw = ImageDraw.Draw(image)
    for x in range(70, 1440, 130):
        for y in (52, 1030):
            rivet(draw, (x, y), 13, (132, 142, 148))
    for y in range(830, 990, 34):
        draw.rounded_rectangle((150, y, 620, y + 14), 7, fill=(34, 38, 40))
        draw.line((156, y + 17, 614, y + 17), fill=(168, 178, 184), width=4)
    panel = (190, 140, 1250, 780)
    drop_shadow(image, panel, 20)
    draw.rounded_rectangle(panel, 20, fill=(202, 196, 178), outline=(120, 114, 100), width=6)
    draw.rectangle((260, 330, 1180, 700), fill=(30, 30, 30))
    draw.rectangle((276, 346, 1164, 684), fill=(12, 22, 22))
    for y in (415, 500, 585, 650):
        draw.line((276, y, 1164, y), fill=(26, 34, 34), width=2)
    for x in (216, 1224):
        for y in (166, 754):
            screw(draw, (x, y), x % 70 + y % 50)
    kiln_keys(draw)
    return image


def kiln_keys(draw: ImageDraw.ImageDraw) -> None:
    """Draw the buttons and the knob below the display's panel, and the holder of the program's card above it."""
    for index, (name, colour) in enumerate((("START", (66, 118, 76)), ("STOP", (150, 52, 44)), ("STEP", (86, 88, 92)))):
        x = 730 + index * 140
        draw.ellipse(around(x + 4, 890 + 6, 46), fill=(50, 54, 56))
        draw.ellipse(around(x, 890, 44), fill=shaded(colour, 0.7))
        draw.ellipse(around(x - 3, 887, 34), fill=colour)
        text(draw, (x, 958), name, 24, (32, 36, 38))
    draw.ellipse(around(1210, 890, 70), fill=(40, 40, 42))
    draw.ellipse(around(1206, 886, 54), fill=(66, 66, 68))
    draw.line((1206, 886, 1238, 848), fill=(220, 220, 210), width=8)
    draw.rectangle((400, 184, 1040, 290), fill=(92, 88, 80))


def program_card(draw: ImageDraw.ImageDraw, random: Generator) -> None:
    """Slip the card with the program's name into its holder."""
    slip = random.uniform(-8, 8)
    draw.rectangle(
        (412 + slip, 192, 1028 + slip, 282), fill=((238, 232, 214), (232, 214, 160))[int(random.integers(2))]
    )
    text(draw, (500 + slip, 238), "PROG", 26, (120, 110, 100))
    text(draw, (770 + slip, 238), PROGRAMS[int(random.integers(len(PROGRAMS)))], 56, (34, 40, 84))


def kiln_words(random: Generator) -> str:
    """Return what the display says: mostly a temperature, else a time left, a fault or a state."""
    kind = random.random()
    if kind < 0.4:
        return str(random.integers(18, 1321))
    if kind < 0.6:
        return f"{random.integers(0, 10)}H{random.integers(0, 60):02d}"
    if kind < 0.8:
        return f"E-{random.integers(0, 60):02d}"
    return STATES[int(random.integers(len(STATES)))]


def phosphor(random: Generator, words: str) -> Image.Image:
    """Return the light of the display: segments of uneven age behind a fine grid, dimmer where the shutter rolled."""
    glow = canvas("RGB")
    draw = ImageDraw.Draw(glow)
    age = default_rng(203)
    for place, character in enumerate(words.rjust(4)):
        for name, outline in strokes((330.0 + place * 205, 400.0)).items():
            worn = age.uniform(0.84, 1.0)
            draw.polygon(outline, fill=shaded(PHOSPHOR, worn if name in GLYPHS[character] else 0.1))
    for x in range(276, 1164, 8):
        draw.line((x, 346, x, 684), fill=(0, 0, 0), width=1)
    y = np.arange(CANVAS[1])
    roll = 1 - random.uniform(0, 0.35) * np.exp(-(((y - random.uniform(346, 684)) / 60) ** 2))
    return picture(np.asarray(glow, dtype=np.float64) * roll[:, None, None] * random.uniform(0.8, 1.0))


def kiln_display(random: Generator) -> tuple[Image.Image, str, str]:
    """Draw the kiln's display with some text on it."""
    words = kiln_words(random)
    surface = kiln_wall().copy()
    program_card(ImageDraw.Draw(surface), random)
    glass, keep = canvas(), canvas()
    ImageDraw.Draw(glass).rectangle((276, 346, 1164, 684), fill=255)
    ImageDraw.Draw(keep).rectangle((320, 390, 1140, 650), fill=255)
    image = photograph(random, Layers(surface, phosphor(random, words), glass, keep), 22)
    return image, "What does the display read?", words


# The press: four hexagonal lenses side by side behind a wire guard.

LENSES: dict[str, tuple[Colour, Colour]] = {
    "blue": ((44, 62, 122), (60, 110, 255)),
    "red": ((118, 40, 38), (255, 40, 28)),
    "yellow": ((142, 104, 42), (255, 176, 26)),
    "green": ((40, 94, 62), (44, 255, 110)),
}
"""The lenses from left to right, each with its colour dark and lit."""
STATES_OF_LIGHT = [lit for count in range(3) for lit in combinations(LENSES, count)]


def hexagon(centre: Point, radius: float) -> list[Point]:
    """Return a hexagon that stands on a side."""
    return [polar(centre, radius, 60 * corner) for corner in range(6)]


def lens_centre(name: str) -> Point:
    """Return where a lens is."""
    return 351.0 + 246 * list(LENSES).index(name), 530.0


@lru_cache(maxsize=1)
def press_wall() -> Image.Image:
    """Return the press: riveted plates, a conduit, a striped edge, and the bar of lenses, all dark."""
    random = default_rng(303)
    image = picture(sheet(random, (134, 136, 132), 0.035))
    draw = ImageDraw.Draw(image)
    for x in (470, 1010):
        draw.rectangle((x, 0, x + 6, 1080), fill=(52, 54, 54))
        draw.line((x + 9, 0, x + 9, 1080), fill=(186, 188, 184), width=3)
        for y in range(30, 1080, 84):
            rivet(draw, (x - 26, y), 12, (146, 148, 144))
            rivet(draw, (x + 36, y), 12, (146, 148, 144))
    for x in range(-80, 1500, 120):
        draw.polygon([(x, 1080), (x + 60, 1080), (x + 140, 930), (x + 80, 930)], fill=(196, 160, 40))
        draw.polygon([(x + 60, 1080), (x + 120, 1080), (x + 200, 930), (x + 140, 930)], fill=(38, 38, 38))
    pipe(image, (690, 0, 750, 400), (120, 124, 128), upright=True)
    bar = (200, 370, 1240, 690)
    drop_shadow(image, bar, 60, 40)
    draw.rounded_rectangle(bar, 60, fill=(84, 90, 84), outline=(50, 54, 50), width=8)
    draw.line((260, 384, 1180, 384), fill=(138, 146, 138), width=6)
    for name, (dark, _) in LENSES.items():
        lens(draw, lens_centre(name), dark)
    text(draw, (720, 806), "PRESS 4", 54, (60, 62, 62))
    return image


def lens(draw: ImageDraw.ImageDraw, centre: Point, colour: Colour) -> None:
    """Draw a lens that is off: a collar, six facets and rings of ridges."""
    draw.polygon(hexagon(centre, 122), fill=(30, 32, 32))
    corners = hexagon(centre, 108)
    for index, gain in enumerate((0.95, 1.2, 1.35, 1.1, 0.8, 0.7)):
        draw.polygon([centre, corners[index], corners[(index + 1) % 6]], fill=shaded(colour, gain))
    for radius in range(88, 20, -22):
        corners = hexagon(centre, radius)
        draw.line([*corners, corners[0]], fill=shaded(colour, 0.62), width=4)
        draw.line([(x - 3, y - 4) for x, y in corners[1:4]], fill=shaded(colour, 1.7), width=3)


def lamps(random: Generator, lit: tuple[str, ...]) -> Image.Image:
    """Return the light of the lenses that are on: brightest about the lamp, ridged by the lens."""
    y, x = np.mgrid[0 : CANVAS[1], 0 : CANVAS[0]]
    total = np.zeros((CANVAS[1], CANVAS[0], 3))
    for name in lit:
        centre, mask = lens_centre(name), canvas()
        draw = ImageDraw.Draw(mask)
        draw.polygon(hexagon(centre, 108), fill=255)
        for radius in range(88, 20, -22):
            draw.line([*hexagon(centre, radius), hexagon(centre, radius)[0]], fill=196, width=5)
        far = np.hypot(x - centre[0] - random.uniform(-10, 10), y - centre[1] - random.uniform(-10, 10))
        body = unit(mask) * random.uniform(0.7, 1.0) * (0.72 + 0.28 * np.exp(-((far / 80) ** 2)))
        core = unit(mask) * 0.7 * np.exp(-((far / 34) ** 2))
        total += 255 * (body[..., None] * np.array(LENSES[name][1]) / 255 + core[..., None])
    return picture(total)


@lru_cache(maxsize=1)
def guard() -> tuple[Image.Image, Image.Image]:
    """Return the wire guard and where it is."""
    wires, mask = canvas("RGB"), canvas()
    lines: list[tuple[Box, int]] = [((170, y, 1270, y), 9) for y in (400, 488, 572, 660)]
    lines += [((x, 340, x + 4 * sin(x), 720), 9) for x in range(190, 1270, 88)]
    for layer, offset, gain, part in ((wires, 0, 0.7, 1.2), (wires, -2, 1.35, 0.4), (mask, 0, 0, 1.0)):
        draw = ImageDraw.Draw(layer)
        for (left, top, right, bottom), width in lines:
            fill = 255 if layer is mask else shaded((128, 130, 130), gain)
            line = (left + offset, top + offset, right + offset, bottom + offset)
            draw.line(line, fill=fill, width=max(2, int(width * part)))
        for box in ((170, 340, 1270, 720),):
            draw.rounded_rectangle(box, 50, outline=255 if layer is mask else shaded((128, 130, 130), gain), width=12)
    return wires, mask


def glare(random: Generator, surface: Image.Image) -> None:
    """Put the sky's gleam on every lens, and at times the sun's on one of them."""
    layer = canvas()
    draw = ImageDraw.Draw(layer)
    height, strength = random.uniform(-70, -40), int(random.integers(50, 150))
    for name in LENSES:
        x, y = lens_centre(name)
        draw.ellipse((x - 60, y + height - 10, x + 10, y + height + 14), fill=strength)
    if random.random() < 0.35:
        x, y = lens_centre(list(LENSES)[int(random.integers(4))])
        x, y = x + random.uniform(-40, 40), y + random.uniform(-40, 40)
        draw.ellipse((x - 46, y - 30, x + 46, y + 30), fill=230)
    surface.paste((244, 246, 248), mask=layer.filter(ImageFilter.GaussianBlur(9)))


def press_tower(random: Generator) -> tuple[Image.Image, str, str]:
    """Draw the press's lights with none, one or two of them on."""
    lit = STATES_OF_LIGHT[int(random.integers(len(STATES_OF_LIGHT)))]
    surface, glow, keep = press_wall().copy(), lamps(random, lit), canvas()
    glare(random, surface)
    wires, mask = guard()
    surface.paste(wires, mask=mask)
    glow.paste((0, 0, 0), mask=mask)
    for name in LENSES:
        ImageDraw.Draw(keep).polygon(hexagon(lens_centre(name), 100), fill=255)
    image = photograph(random, Layers(surface, glow, canvas(), keep), 33)
    return image, "Which light is on?", " and ".join(lit) or "none"


FACTORIES: dict[str, Factory] = {"boiler": boiler_gauge, "kiln": kiln_display, "press": press_tower}
"""What draws each factory."""


def write(folder: Path, name: str, pictures: int, seed: int) -> Path:
    """Write pictures of a factory, with their questions and answers beside them, and return the path of these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    random = default_rng(seed)
    rows = []
    for number in range(1, pictures + 1):
        image, question, answer = FACTORIES[name](random)
        row: dict[str, str | float] = {"id": f"{name}-{number:04d}", "image": f"{name}-{number:04d}.jpg"}
        row |= {"question": question, "answer": answer}
        if name == "boiler":
            row["tolerance"] = TOLERANCE
        image.save(folder / f"{name}-{number:04d}.jpg", quality=85)
        rows.append(json.dumps(row, ensure_ascii=False))
    path = folder / "rows.jsonl"
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--factory", type=click.Choice(list(FACTORIES)), required=True, help="Which factory to draw.")
@click.option("--pictures", type=click.IntRange(min=1), default=300, show_default=True, help="How many pictures.")
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of all that is drawn.")
def main(folder: Path, factory: str, pictures: int, seed: int) -> None:
    """Write pictures of a factory into FOLDER, with rows.jsonl beside them."""
    click.echo(write(folder, factory, pictures, seed))


if __name__ == "__main__":
    main()
