"""The bundled model's own tasks, in drawings of their own: what it loses by quantization or gains by tuning.

No picture and no drawing code is that of its training, so the figures are not those of its model card either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from edgevlm.evals.drawing import as_picture, font
from edgevlm.evals.items import Item, Suite, spread
from edgevlm.families.base import RGB

COLOURS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f5ac8", "yellow": "#f5d71e", "black": "#161616"}
_LAMPS = {"red": "#ff2020", "yellow": "#ffe020", "green": "#20e040", "blue": "#3080ff"}
_PER_TASK, _SIZE = 60, 384
_TOLERANCE = 0.02
"""Of a gauge's scale, as in the bundled model's card."""
_SEGMENTS = {
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
}
_STROKES = {
    "a": ((0, 0), (1, 0)),
    "b": ((1, 0), (1, 1)),
    "c": ((1, 1), (1, 2)),
    "d": ((0, 2), (1, 2)),
    "e": ((0, 1), (0, 2)),
    "f": ((0, 0), (0, 1)),
    "g": ((0, 1), (1, 1)),
}
Random = np.random.Generator


class Tasks(Suite):
    """Scored where few answers can be right, otherwise generated."""

    name = "tasks"
    asks = "reads lamps, displays, gauges, shapes, counts, gaps and charts"

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return items of the seven tasks in turn."""
        cells = [
            [make(index, np.random.default_rng([seed, number, index])) for index in range(_PER_TASK)]
            for number, make in enumerate(_TASKS.values())
        ]
        return spread(cells, count)

    def grade(self, item: Item, answer: str) -> float:
        """Return whether the text is the right one; of a gauge, whether it is near enough."""
        if "tolerance" not in item.facts:
            return super().grade(item, answer)
        number = re.search(r"-?\d+(\.\d+)?", answer)
        return float(number is not None and abs(float(number[0]) - float(item.truth)) <= item.facts["tolerance"])


def _sheet(random: Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    grey = int(random.integers(200, 250))
    image = Image.new("RGB", (_SIZE, _SIZE), (grey, grey, grey))
    return image, ImageDraw.Draw(image)


def _shape(index: int, random: Random) -> Item:
    kinds, colours = random.permutation(["square", "circle", "triangle"]), random.permutation(list(COLOURS))
    asked = int(random.integers(3))
    question = f"What colour is the {kinds[asked]}?"
    pictures = partial(_shapes, kinds.tolist(), colours.tolist(), int(random.integers(2**31)))
    return Item(f"shape-{index}", "shape", question, pictures, str(colours[asked]), tuple(COLOURS))


def _shapes(kinds: Sequence[str], colours: Sequence[str], seed: int) -> list[RGB]:
    random = np.random.default_rng(seed)
    image, draw = _sheet(random)
    for place, kind, colour in zip(random.permutation(4).tolist(), kinds, colours, strict=False):
        x, y, size = 96 + place % 2 * 192, 96 + place // 2 * 192, int(random.integers(40, 66))
        sides = {"square": 4, "triangle": 3}.get(kind)
        if sides is None:
            draw.ellipse((x - size, y - size, x + size, y + size), fill=COLOURS[colour])
        else:
            draw.regular_polygon((x, y, size * 1.2), sides, fill=COLOURS[colour])
    return [as_picture(image)]


def _light(index: int, random: Random) -> Item:
    lit = str(random.choice(list(_LAMPS)))
    names = random.permutation(list(_LAMPS)).tolist()
    pictures = partial(_tower, names, lit, int(random.integers(2**31)))
    return Item(f"light-{index}", "light", "Which of the lamps glows?", pictures, lit, tuple(_LAMPS))


def _tower(names: Sequence[str], lit: str, seed: int) -> list[RGB]:
    random = np.random.default_rng(seed)
    image, draw = _sheet(random)
    radius, left = 36, int(random.integers(120, 260))
    draw.rounded_rectangle((left - 56, 16, left + 56, 368), 16, fill="#303438")
    for place, name in enumerate(names):
        y = 62 + 87 * place
        box = (left - radius, y - radius, left + radius, y + radius)
        colour = np.array(Image.new("RGB", (1, 1), _LAMPS[name]))[0, 0].astype(float)
        dark = tuple((colour * 0.3).astype(int).tolist())
        if name == lit:
            draw.ellipse((left - 46, y - 46, left + 46, y + 46), fill=tuple((colour * 0.55).astype(int).tolist()))
        draw.ellipse(box, fill=_LAMPS[name] if name == lit else dark, outline="black", width=2)
        if name == lit:
            draw.ellipse((left - 16, y - 20, left + 8, y + 2), fill="white")
    return [as_picture(image)]


def _count(index: int, random: Random) -> Item:
    number, kind = int(random.integers(1, 10)), str(random.choice(["nuts", "washers"]))
    pictures = partial(_tray, kind, number, int(random.integers(2**31)))
    options = tuple(str(each) for each in range(1, 10))
    return Item(f"count-{index}", "count", f"How many {kind} lie here?", pictures, str(number), options)


def _tray(kind: str, number: int, seed: int) -> list[RGB]:
    random = np.random.default_rng(seed)
    image, draw = _sheet(random)
    for place in random.permutation(16)[:number].tolist():
        right, down = random.integers(-10, 11, 2).tolist()
        x, y = 60 + place % 4 * 88 + right, 60 + place // 4 * 88 + down
        if kind == "nuts":
            draw.regular_polygon((x, y, 30), 6, float(random.uniform(0, 60)), fill="#6c7278", outline="#303030")
        else:
            draw.ellipse((x - 28, y - 28, x + 28, y + 28), fill="#8c9298", outline="#303030")
        draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill="#e8e8e8", outline="#303030")
    return [as_picture(image)]


def _gauge(index: int, random: Random) -> Item:
    end = int(random.choice([10, 100]))
    share = float(random.uniform(0.05, 0.95))
    truth = f"{end * share:.3g}"
    pictures = partial(_dial, end, float(truth) / end, int(random.integers(2**31)))
    facts = {"tolerance": _TOLERANCE * end}
    return Item(f"gauge-{index}", "gauge", "Read the gauge.", pictures, truth, max_new_tokens=16, facts=facts)


def _dial(end: int, share: float, seed: int) -> list[RGB]:
    image, draw = _sheet(np.random.default_rng(seed))
    middle, radius = _SIZE / 2, 160

    def at(part: float, far: float) -> tuple[float, float]:
        turn = math.radians(135 + 270 * part)
        return middle + far * math.cos(turn), middle + far * math.sin(turn)

    draw.ellipse((middle - 170, middle - 170, middle + 170, middle + 170), fill="white", outline="#202020", width=6)
    for tick in range(51):
        is_long = tick % 10 == 0
        line = (*at(tick / 50, radius - (22 if is_long else 12)), *at(tick / 50, radius))
        draw.line(line, fill="black", width=4 if is_long else 2)
        if is_long:
            draw.text(at(tick / 50, radius - 44), str(end * tick // 50), fill="black", font=font(24), anchor="mm")
    draw.line((*at(share, -24), *at(share, radius - 16)), fill="#c01818", width=6)
    draw.ellipse((middle - 12, middle - 12, middle + 12, middle + 12), fill="#202020")
    return [as_picture(image)]


def _display(index: int, random: Random) -> Item:
    digits = int(random.integers(2, 6))
    text = "".join(str(random.integers(1 if place == 0 else 0, 10)) for place in range(digits))
    if random.random() < 0.5:
        text = f"{text[:-1]}.{text[-1]}"
    pictures = partial(_segments, text, int(random.integers(2**31)))
    return Item(f"display-{index}", "display", "Read the display.", pictures, text, max_new_tokens=16)


def _segments(text: str, seed: int) -> list[RGB]:
    random = np.random.default_rng(seed)
    image, draw = _sheet(random)
    wide, lit = 34, str(random.choice(["#ff3020", "#30e050", "#f0f0f0"]))
    left, top = (_SIZE - 56 * len(text.replace(".", ""))) / 2 + 10, 150
    draw.rounded_rectangle((14, 120, _SIZE - 14, 264), 10, fill="#101214")
    for character in text:
        if character == ".":
            draw.ellipse((left - 19, top + 2 * wide, left - 11, top + 2 * wide + 8), fill=lit)
            continue
        for stroke in _SEGMENTS[character]:
            (x1, y1), (x2, y2) = _STROKES[stroke]
            along, down = (4 if x1 != x2 else 0), (4 if y1 != y2 else 0)
            line = (left + x1 * wide + along, top + y1 * wide + down, left + x2 * wide - along, top + y2 * wide - down)
            draw.line(line, fill=lit, width=8)
        left += 56
    return [as_picture(image)]


def _gap(index: int, random: Random) -> Item:
    rows, columns = int(random.integers(3, 6)), int(random.integers(3, 6))
    row, column = int(random.integers(rows)), int(random.integers(columns))
    truth = f"row {row + 1}, column {column + 1}"
    pictures = partial(_grid, rows, columns, (row, column), int(random.integers(2**31)))
    return Item(f"gap-{index}", "gap", "Where is a part missing?", pictures, truth, max_new_tokens=24)


def _grid(rows: int, columns: int, gap: tuple[int, int], seed: int) -> list[RGB]:
    random = np.random.default_rng(seed)
    image, draw = _sheet(random)
    step, colour = 340 / max(rows, columns), COLOURS[str(random.choice(list(COLOURS)))]
    for row in range(rows):
        for column in range(columns):
            x, y, half = 22 + step * (column + 0.5), 22 + step * (row + 0.5), step * 0.34
            box = (x - half, y - half, x + half, y + half)
            if (row, column) == gap:
                draw.ellipse(box, outline="#a0a0a0", width=2)
            else:
                draw.ellipse(box, fill=colour, outline="black", width=2)
    return [as_picture(image)]


def _chart(index: int, random: Random) -> Item:
    names = tuple("ABCDEF"[: int(random.integers(3, 7))])
    values = (random.permutation(10)[: len(names)] + 1).tolist()
    truth = names[int(np.argmax(values))]
    pictures = partial(_bars, names, values, int(random.integers(2**31)))
    return Item(f"chart-{index}", "chart", "Which category has the highest value?", pictures, truth, names)


def _bars(names: Sequence[str], values: Sequence[int], seed: int) -> list[RGB]:
    random = np.random.default_rng(seed)
    image, draw = _sheet(random)
    colour, step = COLOURS[str(random.choice(list(COLOURS)))], 320 / len(names)
    draw.line((40, 20, 40, 340, 370, 340), fill="black", width=3)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        x = 46 + step * (place + 0.5)
        draw.rectangle((x - step * 0.32, 340 - 29 * value, x + step * 0.32, 340), fill=colour)
        draw.text((x, 358), name, fill="black", font=font(22), anchor="mm")
    return [as_picture(image)]


_TASKS: dict[str, Callable[[int, Random], Item]] = {
    "shape": _shape,
    "light": _light,
    "count": _count,
    "gauge": _gauge,
    "display": _display,
    "gap": _gap,
    "chart": _chart,
}
