"""Seven-segment and dot-matrix displays: digits, decimal point, minus sign, unit."""

from __future__ import annotations

from PIL import Image, ImageDraw

from training.draw import (
    Box,
    Colour,
    Pen,
    canvas,
    clutter,
    fit,
    font_files,
    jitter,
    load_font,
    luminance,
    panel,
    shade,
    text,
)
from training.scene import Random, Scene, between, chance, pick

QUESTIONS = (
    "What does the display read?",
    "What is shown on the display?",
    "Read the display.",
    "Which value does the display show?",
    "What number is on the screen?",
)
UNIT_QUESTIONS = (
    "Which unit does the display show?",
    "What is the unit on the display?",
    "In which unit is the reading?",
)
UNITS = ("°C", "V", "A", "kg", "bar", "mm", "%", "Hz", "kW", "rpm", "g", "m")
SEGMENTS = {
    "0": "abcdef",
    "1": "bc",
    "2": "abged",
    "3": "abgcd",
    "4": "fgbc",
    "5": "afgcd",
    "6": "afgedc",
    "7": "abc",
    "8": "abcdefg",
    "9": "abcdfg",
    "-": "g",
}
LIT: tuple[Colour, ...] = (
    (255, 60, 40),
    (60, 255, 90),
    (90, 190, 255),
    (255, 180, 30),
    (240, 250, 255),
    (255, 240, 60),
)


def value(random: Random) -> str:
    """Return a reading of one to five digits."""
    digits = int(random.integers(1, 6))
    decimals = int(random.integers(0, min(3, digits))) if chance(random, 0.65) else 0
    number = int(random.integers(0, 10**digits))
    body = f"{number:0{decimals + 1}d}"
    body = f"{body[:-decimals]}.{body[-decimals:]}" if decimals else body
    return f"-{body}" if chance(random, 0.2) and number else body


def wide_value(random: Random) -> str:
    """Return a reading of up to seven digits, or a time of day."""
    if chance(random, 0.06):
        return f"{int(random.integers(0, 24)):02d}:{int(random.integers(0, 60)):02d}"
    digits = int(random.choice([1, 2, 3, 3, 4, 4, 5, 6]))
    decimals = int(random.integers(0, min(4, digits))) if chance(random, 0.55) else 0
    body = f"{int(random.integers(0, 10**digits)):0{decimals + 1}d}"
    body = f"{body[:-decimals]}.{body[-decimals:]}" if decimals else body
    return f"-{body}" if chance(random, 0.15) and float(body) else body


def scene(random: Random, varied: float = 0.0) -> Scene:
    """Draw a device with one display; the share `varied` of displays is of any make."""
    loose = varied > 0 and chance(random, varied)
    image, pen, ground = canvas(random)
    width, height = image.size
    wide = between(random, 0.5, 0.94) * width
    high = (
        min(between(random, 0.26, 0.5) * width, 0.8 * height)
        if chance(random, 0.8)
        else between(random, 0.2, 0.8) * height
    )
    x0, y0 = between(random, 0.02, 0.98) * (width - wide), between(random, 0.02, 0.98) * (height - high)
    box = (x0, y0, x0 + wide, y0 + high)
    clutter(random, pen, [(0, 0, width, y0), (0, y0 + high, width, height)], ground)
    reading, unit = wide_display(random, pen, box) if loose else display(random, pen, box)
    result = Scene(image, pen.marks)
    answer = f"{reading} {unit}" if unit else reading
    result.ask("display", QUESTIONS, answer, random)
    if unit:
        result.ask("display", UNIT_QUESTIONS, unit, random)
    if chance(random, 0.3):
        result.describe(random, f"a display reading {answer}")
    return result


def display(random: Random, pen: Pen, box: Box) -> tuple[str, str]:
    """Draw one display; return its reading and its unit, if it shows one."""
    (x0, y0, x1, y1), wide, high = box, box[2] - box[0], box[3] - box[1]
    reading, unit = value(random), pick(random, UNITS) if chance(random, 0.5) else ""
    if chance(random, 0.75):
        lit, dark = jitter(random, pick(random, LIT)), jitter(random, (16, 16, 18), 14)
    else:
        lit, dark = jitter(random, (25, 30, 25), 15), jitter(random, (165, 185, 150), 20)
    panel(random, pen, box, dark)
    inner = (x0 + wide * 0.06, y0 + high * 0.14, x1 - wide * 0.06, y1 - high * 0.14)
    unit_width = 0.2 * (inner[2] - inner[0]) if unit else 0.0
    area = (inner[0], inner[1], inner[2] - unit_width, inner[3])
    (seven_segment if chance(random, 0.6) else dot_matrix)(random, pen, area, reading, lit, dark)
    if unit:
        room = max(0.0, (inner[3] - inner[1]) / 2 - 8)
        face = fit(random, unit, unit_width * 0.8, (inner[3] - inner[1]) * 0.5)
        middle = (inner[1] + inner[3]) / 2
        text(pen, (inner[2] - unit_width * 0.45, middle + between(random, -room, room)), unit, face, lit)
    return reading, unit


def wide_display(random: Random, pen: Pen, box: Box) -> tuple[str, str]:
    """Draw one display of any make, colours and proportions; return its reading and its unit."""
    (x0, y0, x1, y1), wide, high = box, box[2] - box[0], box[3] - box[1]
    reading, unit = wide_value(random), pick(random, MORE_UNITS) if chance(random, 0.45) else ""
    lit, dark = some_colours(random)
    if chance(random, 0.6):
        case = jitter(random, pick(random, CASES), 25)
        panel(random, pen, box, case)
        edge = min(wide, high) * between(random, 0.03, 0.14)
        x0, y0, x1, y1 = x0 + edge, y0 + edge, x1 - edge, y1 - edge
        pen.rounded_rectangle((x0, y0, x1, y1), between(random, 0, 0.2) * (y1 - y0), fill=dark)
    else:
        panel(random, pen, box, dark)
    margin = between(random, 0.04, 0.2)
    inner = (x0 + (x1 - x0) * 0.05, y0 + (y1 - y0) * margin, x1 - (x1 - x0) * 0.05, y1 - (y1 - y0) * margin)
    unit_width = between(random, 0.14, 0.26) * (inner[2] - inner[0]) if unit else 0.0
    area = (inner[0], inner[1], inner[2] - unit_width, inner[3])
    style = printed if ":" in reading else pick(random, (seven_segment, seven_segment, dot_matrix, printed, printed))
    style(random, pen, area, reading, lit, dark)
    if unit:
        face = fit(random, unit, unit_width * 0.8, (inner[3] - inner[1]) * between(random, 0.3, 0.7))
        low, tall = inner[3] - inner[1], sum(face.getmetrics())
        middle = between(random, inner[1] + tall / 2, max(inner[1] + tall / 2, inner[1] + low - tall / 2))
        text(pen, (inner[2] - unit_width * 0.45, middle), unit, face, lit)
    return reading, unit


MORE_UNITS = (
    *UNITS,
    "°F",
    "psi",
    "kPa",
    "ppm",
    "mA",
    "mV",
    "kV",
    "Ω",
    "W",
    "kWh",
    "l",
    "ml",
    "t",
    "s",
    "min",
    "h",
    "cm",
)
CASES: tuple[Colour, ...] = ((40, 40, 44), (200, 200, 196), (90, 95, 100), (170, 40, 35), (40, 70, 140), (225, 180, 40))


def some_colours(random: Random) -> tuple[Colour, Colour]:
    """Return the colours of lit segments and of the ground behind them, well apart in brightness."""
    if chance(random, 0.4):
        return jitter(random, pick(random, LIT)), jitter(random, (16, 16, 18), 14)
    while True:
        one, other = (tuple(int(v) for v in random.integers(0, 256, 3)) for _ in range(2))
        if abs(luminance(one) - luminance(other)) > 110:  # type: ignore[arg-type]
            return one, other  # type: ignore[return-value]


def printed(random: Random, pen: Pen, area: Box, reading: str, lit: Colour, dark: Colour) -> None:
    """Write the reading in a font."""
    x0, y0, x1, y1 = area
    face = fit(random, reading, (x1 - x0) * 0.96, (y1 - y0) * between(random, 0.8, 1.25))
    room = max(0.0, (x1 - x0) - face.getlength(reading)) / 2
    text(pen, ((x0 + x1) / 2 + between(random, -room, room), (y0 + y1) / 2), reading, face, lit)


def seven_segment(
    random: Random,
    pen: Pen,
    area: tuple[float, float, float, float],
    reading: str,
    lit: Colour,
    dark: Colour,
) -> None:
    """Draw the reading in slanted bars, unlit ones faintly there."""
    x0, y0, x1, y1 = area
    cells = len(reading.replace(".", ""))
    high = y1 - y0
    wide = min((x1 - x0) / cells, high * between(random, 0.5, 0.75))
    start = x1 - wide * cells if chance(random, 0.6) else x0 + between(random, 0, 1) * (x1 - x0 - wide * cells)
    slant = between(random, -0.02, 0.14)
    thick = between(random, 0.07, 0.17) * wide / 0.62
    ghost = between(random, 0, 0.12) if chance(random, 0.5) else 0.0
    off: Colour = tuple(round(d + (c - d) * ghost) for c, d in zip(lit, dark, strict=True))  # type: ignore[assignment]
    at = 0
    for symbol in reading:
        left = start + at * wide
        if symbol == ".":
            r = min(thick * 0.62, wide * 0.11)
            x, y = left - wide * 0.13 - (y1 - y0) / 2 * slant, y1 - r
            pen.ellipse((x - r, y - r, x + r, y + r), fill=lit)
            pen.mark(x, y, symbol)
            continue
        pen.mark(left + wide * 0.37, (y0 + y1) / 2, symbol)
        for name, points in bars(left, y0, wide * 0.74, high, thick, slant).items():
            if name in SEGMENTS[symbol]:
                pen.polygon(points, fill=lit)
            elif ghost:
                pen.polygon(points, fill=off)
        at += 1


def bars(x: float, y: float, w: float, h: float, t: float, slant: float) -> dict[str, list[tuple[float, float]]]:
    """Return the polygons of the seven segments of one cell."""
    g = t * 0.12

    def across(top: float) -> list[tuple[float, float]]:
        m, half = top + t / 2, t / 2
        points = [(x + g, m), (x + half + g, top), (x + w - half - g, top), (x + w - g, m)]
        return [*points, (x + w - half - g, top + t), (x + half + g, top + t)]

    def down(left: float, top: float, bottom: float) -> list[tuple[float, float]]:
        m, half = left + t / 2, t / 2
        points = [(m, top + g), (left + t, top + half + g), (left + t, bottom - half - g), (m, bottom - g)]
        return [*points, (left, bottom - half - g), (left, top + half + g)]

    middle = y + h / 2
    shapes = {
        "a": across(y),
        "g": across(middle - t / 2),
        "d": across(y + h - t),
        "f": down(x, y, middle),
        "b": down(x + w - t, y, middle),
        "e": down(x, middle, y + h),
        "c": down(x + w - t, middle, y + h),
    }
    return {name: [(px + (middle - py) * slant, py) for px, py in points] for name, points in shapes.items()}


def dot_matrix(
    random: Random,
    pen: Pen,
    area: tuple[float, float, float, float],
    reading: str,
    lit: Colour,
    dark: Colour,
) -> None:
    """Draw the reading as a grid of dots, its glyphs taken from a small font without smoothing."""
    x0, y0, x1, y1 = area
    mono = [path for path in font_files() if "Mono" in path.stem and "Oblique" not in path.stem]
    face = load_font(pick(random, mono), int(random.integers(10, 14)))
    left, top, right, bottom = (round(v) for v in face.getbbox(reading))
    bitmap = Image.new("1", (right - left, bottom - top))
    ImageDraw.Draw(bitmap).text((-left, -top), reading, font=face, fill=1)
    cell = min((x1 - x0) / bitmap.width, (y1 - y0) / bitmap.height)
    start = x0 + between(random, 0, 1) * (x1 - x0 - cell * bitmap.width)
    dot = cell * between(random, 0.38, 0.5)
    for index, symbol in enumerate(reading):
        middle = face.getlength(reading[:index]) + face.getlength(symbol) / 2 - left
        pen.mark(start + middle * cell, y0 + bitmap.height * cell / 2, symbol)
    faint = shade(dark, 1.5) if chance(random, 0.4) else None
    draw = pen.ellipse if chance(random, 0.6) else pen.rectangle
    for row in range(bitmap.height):
        for column in range(bitmap.width):
            on = bitmap.getpixel((column, row))
            if not on and faint is None:
                continue
            x, y = start + (column + 0.5) * cell, y0 + (row + 0.5) * cell
            draw((x - dot, y - dot, x + dot, y + dot), fill=lit if on else faint)
