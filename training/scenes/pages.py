"""Pages of signs, things or gauges in rows and columns: to read one, an answer has to look somewhere for each word.

Nothing else teaches the text part so quickly where to look (reading all there is was Donut's pre-training, too: Kim et
al. 2022). They are for training alone; no task is judged by them.
"""

from __future__ import annotations

from training.draw import COLOURS, Box, Pen, background, canvas, fit, ink, jitter, luminance, named, text
from training.scene import Random, Scene, between, chance, pick
from training.scenes import gauges
from training.scenes.displays import LIT, display, dot_matrix, seven_segment
from training.scenes.labels import code
from training.scenes.shapes import pointed_at
from training.scenes.sheets import SIGNS
from training.scenes.things import PARTS, SHAPES, Thing, draw

DIGITS = "0123456789"
DIALS = 0.4
"""Share of the pages that show gauges."""
LAYOUTS = ((1, 2), (2, 1), (2, 2), (2, 2), (2, 3), (3, 2))
"""Rows and columns of gauges."""


def scene(random: Random) -> Scene:
    """Draw a page of gauges, one of displays and codes, or one of signs and things."""
    if chance(random, DIALS):
        return dials(random)
    return readings(random) if chance(random, 0.5) else grid(random)


def dials(random: Random) -> Scene:
    """Draw two to six gauges and ask for what each reads: a picture of one teaches one reading at the same cost."""
    rows, columns = pick(random, LAYOUTS)
    wide, high = between(random, 125, 190), between(random, 125, 190)
    image, ground = background(random, round(columns * wide), round(rows * high))
    pen = Pen(image)
    result = Scene(image, pen.marks)
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        box = (column * wide, row * high, (column + 1) * wide, (row + 1) * high)
        loose = chance(random, 0.4)
        read = gauges.loose_gauge(random, pen, box, ground) if loose else gauges.gauge(random, pen, box, ground, 0.0)
        number, where = place + 1, f"row {row + 1}, column {column + 1}"
        questions = (f"What does gauge {number} read?", f"Read gauge {number}.", f"Read the gauge in {where}.")
        read.ask(result, questions, random)
    return result


def readings(random: Random) -> Scene:
    """Draw one to five displays and codes below each other, of any width."""
    image, pen, _ = canvas(random)
    width, height = image.size
    rows = int(random.integers(1, 6))
    high = height / rows
    lines = []
    for row in range(rows):
        wide = width * between(random, 0.45, 0.98)
        x0, y0 = (width - wide) * random.random(), row * high + high * between(random, 0.02, 0.12)
        box = (x0, y0, x0 + wide, y0 + high * between(random, 0.6, 0.86))
        lines.append(" ".join(display(random, pen, box)).strip() if chance(random, 0.6) else _code(random, pen, box))
    result = Scene(image, pen.marks)
    result.describe(random, "; ".join(lines))
    row = int(random.integers(rows))
    result.ask("page", (f"What is in row {row + 1}?",), lines[row], random)
    return result


def _code(random: Random, pen: Pen, box: Box) -> str:
    level = int(random.integers(10, 250))
    paper = jitter(random, (level, level, level), 40)
    pen.rectangle(box, fill=paper)
    line = code(random)
    face = fit(random, line, (box[2] - box[0]) * 0.94, (box[3] - box[1]) * between(random, 0.7, 1.0))
    text(pen, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), line, face, ink(random, paper))
    return line


def grid(random: Random) -> Scene:
    """Draw a page of one to five rows, evenly spaced."""
    width, height = int(random.integers(180, 300)), int(random.integers(180, 300))
    image, ground = background(random, width, height)
    pen = Pen(image)
    rows, columns = int(random.integers(1, 6)), int(random.integers(1, 6))
    wide, high = width * between(random, 0.8, 0.98) / columns, height * between(random, 0.8, 0.98) / rows
    x0, y0 = (width - wide * columns) * random.random(), (height - high * rows) * random.random()
    page: list[list[str]] = []
    for row in range(rows):
        look = pick(random, (_print, _print, _light, _thing, _thing))
        page.append([])
        for column in range(columns):
            x, y = x0 + column * wide, y0 + row * high
            side = min(wide, high) * between(random, 0.7, 0.98)
            mx, my = x + wide / 2, y + high / 2
            box = (mx - side / 2, my - side / 2, mx + side / 2, my + side / 2)
            page[-1].append(look(random, pen, box, ground))
    result = Scene(image, pen.marks)
    result.describe(random, "; ".join(_line(words) for words in page))
    for place in random.permutation(rows * columns)[:3].tolist():
        row, column = divmod(place, columns)
        result.ask("page", (f"What is in row {row + 1}, column {column + 1}?",), page[row][column], random)
    word = pick(random, pick(random, page))
    places = [(r, c) for r, words in enumerate(page, 1) for c, each in enumerate(words, 1) if each == word]
    if len(places) == 1:
        row, column = places[0]
        result.ask("page", (f"Where is the {word}?",), f"row {row}, column {column}", random)
        x, y = 100 * (x0 + (column - 0.5) * wide) / width, 100 * (y0 + (row - 0.5) * high) / height
        result.ask("page", pointed_at(word), f"x {x:.0f}, y {y:.0f}", random, 6.0)
    return result


def _line(words: list[str]) -> str:
    """Return a row's words; signs stand close."""
    return "".join(word if len(word) == 1 else f" {word} " for word in words).replace("  ", ", ").strip()


def _print(random: Random, pen: Pen, box: Box, ground: tuple[int, int, int]) -> str:
    sign = pick(random, DIGITS if chance(random, 0.5) else SIGNS)
    face = fit(random, sign, box[2] - box[0], (box[3] - box[1]) * 1.15)
    text(pen, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), sign, face, ink(random, ground))
    return sign


def _light(random: Random, pen: Pen, box: Box, ground: tuple[int, int, int]) -> str:
    dark = jitter(random, (16, 16, 18), 14) if luminance(ground) > 100 or chance(random, 0.5) else ground
    pen.rectangle(box, fill=dark)
    x0, y0, x1, y1 = box
    inset = (x1 - x0) * 0.18
    sign = pick(random, DIGITS)
    shown = pick(random, (seven_segment, seven_segment, dot_matrix))
    shown(
        random,
        pen,
        (x0 + inset, y0 + inset / 2, x1 - inset, y1 - inset / 2),
        sign,
        jitter(random, pick(random, LIT)),
        dark,
    )
    return sign


def _thing(random: Random, pen: Pen, box: Box, ground: tuple[int, int, int]) -> str:
    seen = [name for name, c in COLOURS.items() if sum(abs(a - b) for a, b in zip(c, ground, strict=True)) > 130]
    kind, colour = pick(random, (*SHAPES, *PARTS)), pick(random, seen or list(COLOURS))
    x, y, r = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2
    draw(random, pen, Thing(kind, colour, x, y, r), named(random, colour), ground)
    return f"{colour} {kind}"
