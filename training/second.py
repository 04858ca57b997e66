"""A second renderer that training never sees: matplotlib, other fonts, other proportions, other styles.

It asks the same kinds of questions with the same kinds of answers, so that its results tell reading from remembering.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from training.draw import COLOURS, font_files
from training.scene import Random, Scene, between, chance, pick
from training.scenes import counting, displays, gauges, grids, labels, lights, shapes
from training.scenes.charts import CATEGORIES
from training.scenes.things import PARTS, SHAPES, Thing, places, plural, polygon

FAMILIES = ("roboto", "jetbrains-mono", "comfortaa")
"""Fonts of this renderer, none of which the first one has."""
MARKERS = {"circle": "o", "square": "s", "star": "*", "cross": "P", "diamond": "d", "hexagon": "h", "triangle": "^"}


@cache
def _fonts() -> tuple[Any, ...]:
    from matplotlib.font_manager import FontProperties

    return tuple(FontProperties(fname=str(path)) for path in font_files(FAMILIES))


class Sheet:
    """A matplotlib figure measured in pixels, y downwards, as PIL measures."""

    def __init__(self, random: Random, ground: tuple[float, float, float] | None = None) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width = int(random.integers(220, 420))
        self.height = int(self.width * between(random, 0.65, 1.25))
        level = between(random, 0.55, 0.97) if chance(random, 0.6) else between(random, 0.05, 0.3)
        tint = random.normal(0, 0.04, 3)
        self.ground = ground or tuple(float(v) for v in np.clip(level + tint, 0, 1))
        self.figure = Figure(figsize=(self.width / 100, self.height / 100), dpi=100, facecolor=self.ground)
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        self.ink = (0.08, 0.08, 0.1) if sum(self.ground) > 1.4 else (0.95, 0.95, 0.92)

    def add(self, kind: str, *arguments: Any, **style: Any) -> None:
        """Add one of matplotlib's patches."""
        from matplotlib import patches

        self.axes.add_patch(getattr(patches, kind)(*arguments, **style))

    def text(self, x: float, y: float, words: str, size: float, random: Random, colour: Any = None) -> None:
        """Write a line of about `size` pixels, centred."""
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": colour or self.ink, "fontsize": size * 0.72}
        self.axes.text(x, y, words, fontproperties=pick(random, _fonts()), **style)

    def image(self) -> Image.Image:
        """Return the picture."""
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


def colour(random: Random, name: str) -> tuple[float, ...]:
    """Return a colour called `name`, near another centre than the first renderer's."""
    return tuple(float(v) for v in np.clip(np.array(COLOURS[name]) / 255 + random.normal(0, 0.04, 3), 0, 1))


def display(random: Random) -> Scene:
    """A display of slim bars with round ends, or of dots, in a round-cornered case."""
    sheet = Sheet(random)
    reading, unit = displays.value(random), pick(random, displays.UNITS) if chance(random, 0.5) else ""
    lit = pick(random, ((1.0, 0.35, 0.25), (0.45, 1.0, 0.5), (0.5, 0.85, 1.0), (1.0, 0.75, 0.3)))
    wide, high = sheet.width * between(random, 0.6, 0.92), sheet.height * between(random, 0.25, 0.4)
    x, y = (sheet.width - wide) / 2, between(random, 0.1, 0.5) * (sheet.height - high)
    style = {"boxstyle": "round,pad=4", "facecolor": (0.05, 0.05, 0.07), "edgecolor": sheet.ink}
    sheet.add("FancyBboxPatch", (x, y), wide, high, **style)
    room = wide * (0.76 if unit else 0.96)
    cells = len(reading.replace(".", ""))
    cell = min(room / cells, high * 0.62)
    at = x + (room - cell * cells) * between(random, 0.1, 0.9)
    for symbol in reading:
        if symbol == ".":
            sheet.add("Circle", (at - cell * 0.1, y + high * 0.85), cell * 0.07, color=lit)
            continue
        for name in displays.SEGMENTS[symbol]:
            _bar(sheet, name, at + cell * 0.1, y + high * 0.14, cell * 0.66, high * 0.72, lit, cell * 0.11)
        at += cell
    if unit:
        sheet.text(x + wide * 0.88, y + high / 2, unit, min(high * 0.4, wide * 0.11), random, lit)
    result = Scene(sheet.image())
    result.ask("display", displays.QUESTIONS, f"{reading} {unit}".strip(), random)
    if unit:
        result.ask("display", displays.UNIT_QUESTIONS, unit, random)
    return result


def _bar(sheet: Sheet, name: str, x: float, y: float, w: float, h: float, lit: Any, thick: float) -> None:
    top, middle, bottom, gap = y, y + h / 2, y + h, thick * 0.7
    across = {"a": top, "g": middle, "d": bottom}
    if name in across:
        xs, ys = [x + gap, x + w - gap], [across[name]] * 2
    else:
        left = name in "fe"
        upper = name in "fb"
        xs = [x if left else x + w] * 2
        ys = [top + gap, middle - gap] if upper else [middle + gap, bottom - gap]
    sheet.axes.plot(xs, ys, color=lit, linewidth=thick * 0.72, solid_capstyle="round")


def gauge(random: Random) -> Scene:
    """A gauge drawn as arcs, numerals outside the ticks or inside."""
    sheet = Sheet(random)
    radius = 0.42 * min(sheet.width, sheet.height)
    cx, cy = sheet.width / 2, sheet.height / 2
    low, high, step = pick(random, gauges.SCALES)
    sweep = math.radians(pick(random, (200, 240, 270)))
    start = -math.pi / 2 - sweep / 2
    face = (0.99, 0.98, 0.94) if chance(random, 0.6) else (0.1, 0.1, 0.13)
    mark = (0.1, 0.1, 0.1) if sum(face) > 1.5 else (0.95, 0.95, 0.95)
    sheet.add("Circle", (cx, cy), radius, facecolor=face, edgecolor=(0.35, 0.37, 0.4), linewidth=radius * 0.05)

    def at(value: float, r: float) -> tuple[float, float]:
        angle = start + (value - low) / (high - low) * sweep
        return cx + math.cos(angle) * r * radius, cy + math.sin(angle) * r * radius

    ticks, minor = round((high - low) / step), pick(random, (2, 4, 5))
    for index in range(ticks * minor + 1):
        major = index % minor == 0
        (x0, y0), (x1, y1) = (at(low + index * step / minor, r) for r in (0.86, 0.72 if major else 0.79))
        sheet.axes.plot([x0, x1], [y0, y1], color=mark, linewidth=1.4 if major else 0.7)
        if major:
            tick = low + index // minor * step
            sheet.text(*at(tick, 0.57), str(tick), radius * 0.15, random, mark)
    value = between(random, low, high)
    (x0, y0), (x1, y1) = at(value, -0.15), at(value, 0.78)
    sheet.axes.plot(
        [x0, x1], [y0, y1], color=colour(random, pick(random, ("red", "orange", "blue"))), linewidth=radius * 0.035
    )
    sheet.add("Circle", (cx, cy), radius * 0.07, color=mark)
    result = Scene(sheet.image())
    written = gauges.written(value, low, high)
    result.ask("gauge", gauges.QUESTIONS, written, random, tolerance=0.02 * (high - low))
    return result


def light(random: Random) -> Scene:
    """A tower of round lamps."""
    sheet = Sheet(random)
    count = int(random.integers(2, 6))
    names = [lights.STACK[i] for i in random.permutation(5)[:count]]
    lit = set(random.permutation(count)[: pick(random, (0, 1, 1, 1, 2))].tolist())
    step = sheet.height * 0.8 / count
    wide = min(step * 1.3, sheet.width * 0.4)
    x = sheet.width * between(random, 0.3, 0.7)
    sheet.add("Rectangle", (x - wide * 0.1, sheet.height * 0.85), wide * 0.2, sheet.height * 0.2, color=(0.5, 0.5, 0.5))
    for index, name in enumerate(names):
        full = np.array(colour(random, name))
        shown = np.clip(full * 0.8 + 0.3, 0, 1) if index in lit else full * 0.3
        y = sheet.height * 0.06 + index * step
        style = {"facecolor": tuple(shown), "edgecolor": (0.2, 0.2, 0.2)}
        sheet.add("FancyBboxPatch", (x - wide / 2, y), wide, step * 0.8, boxstyle="round,pad=1", **style)
    result = Scene(sheet.image())
    on = [name for index, name in enumerate(names) if index in lit]
    result.ask(
        "light", ("Which stack light is on?", "Which lamp of the stack light is lit?"), lights.listed(on), random
    )
    name = pick(random, lights.STACK)
    result.ask("presence", (f"Is the {name} light on?",), "yes" if name in on else "no", random)
    return result


def _thing(sheet: Sheet, thing: Thing, fill: Any, random: Random) -> None:
    """Draw one thing with matplotlib's own marker shapes where it has them."""
    x, y, r = thing.x, thing.y, thing.r
    if thing.kind in MARKERS:
        area = {"o": 2.0, "s": 1.7, "*": 2.5, "P": 2.1, "d": 1.9, "h": 2.2, "^": 2.1}[MARKERS[thing.kind]]
        size = (r * area * 0.72) ** 2
        sheet.axes.scatter([x], [y], s=size, marker=MARKERS[thing.kind], color=[fill], linewidths=0)
    elif thing.kind in {"ring", "washer"}:
        sheet.add("Wedge", (x, y), r, 0, 360, width=r * (0.3 if thing.kind == "ring" else 0.52), color=fill)
    elif thing.kind == "nut":
        sheet.add("Polygon", polygon(x, y, r, 6, between(random, 0, 1)), color=fill)
        sheet.add("Circle", (x, y), r * 0.45, color=sheet.ground)
    elif thing.kind == "gear":
        sheet.add("Polygon", polygon(x, y, r, 10, between(random, 0, 1), 0.76), color=fill)
        sheet.add("Circle", (x, y), r * 0.3, color=sheet.ground)
    else:
        turn = between(random, 0, 2 * math.pi)
        dx, dy = math.cos(turn) * r, math.sin(turn) * r
        sheet.axes.plot([x - dx * 0.4, x + dx], [y - dy * 0.4, y + dy], color=fill, linewidth=r * 0.24)
        sheet.add("Circle", (x - dx * 0.45, y - dy * 0.45), r * 0.42, color=fill)


def _visible(ground: tuple[float, ...], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if sum(abs(a / 255 - b) for a, b in zip(COLOURS[name], ground, strict=True)) > 0.55]


def count(random: Random) -> Scene:
    """Scattered things."""
    sheet = Sheet(random)
    kinds = PARTS if chance(random, 0.5) else SHAPES
    target = pick(random, kinds)
    others = [kind for kind in kinds if kind != target]
    wanted, rest = int(random.integers(0, 13)), int(random.integers(1, 6))
    scale = min(sheet.width, sheet.height)
    spots = places(random, wanted + rest, sheet.width, sheet.height, scale * 0.05, scale * 0.085)
    wanted = min(wanted, len(spots))
    names = _visible(sheet.ground, counting.METALS) or ["red"]
    for index, spot in enumerate(spots):
        thing = Thing(target if index < wanted else pick(random, others), pick(random, names), *spot)
        _thing(sheet, thing, colour(random, thing.colour), random)
    result = Scene(sheet.image())
    many = plural(target)
    result.ask("count", (f"How many {many} are there?", f"Count the {many}."), str(wanted), random)
    return result


def missing(random: Random) -> Scene:
    """A tray of parts, drawn without a plate."""
    sheet = Sheet(random)
    rows, columns = int(random.integers(2, 6)), int(random.integers(2, 7))
    kind = pick(random, grids.KINDS)
    gap = (int(random.integers(rows)), int(random.integers(columns))) if chance(random, 0.6) else None
    w, h = sheet.width * 0.86 / columns, sheet.height * 0.86 / rows
    fill = colour(random, pick(random, _visible(sheet.ground, ("blue", "red", "orange", "black", "white"))))
    for row in range(rows):
        for column in range(columns):
            if (row, column) != gap:
                x, y = sheet.width * 0.07 + w * (column + 0.5), sheet.height * 0.07 + h * (row + 0.5)
                _thing(sheet, Thing(kind, "", x, y, min(w, h) * 0.34), fill, random)
    result = Scene(sheet.image())
    result.ask("missing", ("Is a part missing?", "Does the grid lack a part?"), "yes" if gap else "no", random)
    where = f"row {gap[0] + 1}, column {gap[1] + 1}" if gap else "none"
    result.ask("missing", ("Which part is missing?", "Where is a part missing?"), where, random)
    return result


def label(random: Random) -> Scene:
    """A label with a dashed rim."""
    sheet = Sheet(random)
    printed = labels.code(random)
    prefix = pick(random, labels.PREFIXES) if chance(random, 0.3) else ""
    line = f"{prefix} {printed}".strip()
    wide, high = sheet.width * 0.88, sheet.height * between(random, 0.3, 0.5)
    x, y = sheet.width * 0.06, between(random, 0.1, 0.5) * (sheet.height - high)
    paper = (0.99, 0.99, 0.97) if chance(random, 0.7) else (0.98, 0.85, 0.3)
    sheet.add("Rectangle", (x, y), wide, high, facecolor=paper, edgecolor=(0.2, 0.2, 0.2), linestyle="--")
    size = min(high * 0.5, wide * 1.45 / max(len(line), 3))
    sheet.text(x + wide / 2, y + high / 2, line, size, random, (0.05, 0.05, 0.05))
    result = Scene(sheet.image())
    result.ask("label", labels.QUESTIONS, line, random)
    return result


def chart(random: Random) -> Scene:
    """matplotlib's own bar chart."""
    sheet = Sheet(random, (1.0, 1.0, 1.0))
    bars, top = int(random.integers(2, 7)), pick(random, (10, 20, 50, 100))
    names = pick(random, CATEGORIES)[:bars]
    while True:
        values = random.integers(max(1, round(top * 0.05)), top + 1, bars)
        order = np.sort(values)
        if order[-1] - order[-2] >= 0.08 * top and order[1] - order[0] >= 0.08 * top:
            break
    axes = sheet.figure.add_axes((0.16, 0.14, 0.8, 0.76))
    drawn = axes.bar(names, values, color=colour(random, pick(random, ("blue", "green", "orange", "purple"))))
    axes.set_ylim(0, top * 1.1)
    axes.bar_label(drawn, fontsize=10)
    result = Scene(sheet.image())
    result.ask("chart", ("Which bar is the highest?",), names[int(values.argmax())], random)
    index = int(random.integers(bars))
    result.ask("chart", (f"What is the value of {names[index]}?",), str(values[index]), random, tolerance=0.0)
    return result


def shape(random: Random) -> Scene:
    """Shapes on a plain ground."""
    sheet = Sheet(random)
    scale = min(sheet.width, sheet.height)
    spots = places(random, int(random.integers(1, 5)), sheet.width, sheet.height, scale * 0.08, scale * 0.17)
    kinds = [SHAPES[i] for i in random.permutation(len(SHAPES))[: len(spots)]]
    names = _visible(sheet.ground, shapes.NAMES)
    things = [Thing(kind, pick(random, names), *spot) for kind, spot in zip(kinds, spots, strict=True)]
    for thing in things:
        _thing(sheet, thing, colour(random, thing.colour), random)
    result = Scene(sheet.image())
    one = pick(random, things)
    result.ask("shape", (f"What colour is the {one.kind}?",), one.colour, random)
    where = shapes.quadrant(one, sheet.width, sheet.height)
    if where:
        result.ask("shape", (f"Where is the {one.kind}?",), where, random)
    shapes.relate(random, result, things)
    kind, name = (one.kind, one.colour) if chance(random, 0.5) else (pick(random, SHAPES), pick(random, shapes.NAMES))
    there = any(thing.kind == kind and thing.colour == name for thing in things)
    result.ask("presence", (f"Is there a {name} {kind}?",), "yes" if there else "no", random)
    return result


SCENES: dict[str, Callable[[Random], Scene]] = {
    "display": display,
    "gauge": gauge,
    "light": light,
    "count": count,
    "missing": missing,
    "label": label,
    "chart": chart,
    "shape": shape,
}
