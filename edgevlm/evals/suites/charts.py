"""Charts with other data: the same chart and question, its values drawn anew (https://arxiv.org/abs/2605.27311).

A model that reads the chart is right about each member of a family; one that knows such charts repeats itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from edgevlm.evals.drawing import as_picture, font
from edgevlm.evals.items import Item, Suite
from edgevlm.families.base import RGB

CHARTS, VARIANTS = 40, 11
"""Charts, and members of each one's family: the original and ten with other data."""
_NEAR = 2
"""Of these, the last so many have a highest value that is hardly above the next: another way to the answer."""
_SIZE, _LEFT, _TOP, _PLOT = 512, 60, 60, 380
_COLOURS = ("#3465a4", "#cc0000", "#4e9a06", "#f57900", "#75507b", "#8f5902")
_NAMES = ("North", "South", "East", "West", "Hill", "Lake")
_LARGEST = 100


@dataclass(frozen=True)
class Chart:
    """A chart's look and data."""

    kind: str
    names: tuple[str, ...]
    values: tuple[int, ...]
    """From 5 to 95."""
    title: str


class Charts(Suite):
    """Two questions about each of 40 charts in 11 forms; a question about a chart is a family."""

    name = "charts-cf"
    asks = "reads a chart whose data are new"

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return whole families, as many as `count` holds but one at least."""
        families = [_family(chart, question, seed) for question in _QUESTIONS for chart in range(CHARTS)]
        order = np.random.default_rng([seed, 1]).permutation(len(families))
        chosen = None if count is None else max(1, count // VARIANTS)
        return [item for index in order[:chosen] for item in families[index]]

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return how answers follow the data.

        generalization: P(variant right | original right); sensitivity: of variants with another truth than the
        original, how often the answer is another, too; copying: how often it is the original's truth; family-robust:
        all members right.
        """
        families: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            families[row["family"]].append(row)
        originals = {
            name: next((row for row in some if row["variant"] == "original"), None) for name, some in families.items()
        }
        pairs = [
            (first, row) for name, first in originals.items() if first for row in families[name] if row is not first
        ]
        other = [(first, row) for first, row in pairs if first["truth"] != row["truth"]]
        after_right = [row["right"] for first, row in pairs if first["right"] == 1]
        found = {
            "generalization": after_right,
            "sensitivity": [float(first["answer"] != row["answer"]) for first, row in other],
            "copying": [float(row["answer"] == first["truth"]) for first, row in other],
            "family-robust": [float(all(row["right"] == 1 for row in some)) for some in families.values()],
        }
        return {name: float(np.mean(values)) for name, values in found.items() if values}


def _family(number: int, question: str, seed: int) -> list[Item]:
    random = np.random.default_rng([seed, number])
    kind = tuple(_KINDS)[number % len(_KINDS)]
    names = tuple(random.permutation(_NAMES)[: int(random.integers(4, 7))].tolist())
    title = f"{random.choice(['Output', 'Visitors', 'Orders', 'Rain'])} {random.integers(2015, 2026)}"
    family, items = f"{kind}-{number}-{question}", []
    asked = int(random.integers(len(names)))
    for variant in range(VARIANTS):
        values = _values(random, len(names), near=variant >= VARIANTS - _NEAR)
        chart = Chart(kind, names, values, title)
        text, truth, options = _QUESTIONS[question](chart, asked, random)
        name = "original" if variant == 0 else f"near {variant}" if variant >= VARIANTS - _NEAR else f"data {variant}"
        cell = f"{kind}, {question}"
        items.append(
            Item(f"{family}-{variant}", cell, text, partial(_drawn, chart), truth, options, True, family, name)
        )
    return items


def _values(random: np.random.Generator, count: int, *, near: bool) -> tuple[int, ...]:
    """Return values that differ by 6 or more, but for the two highest where they are near."""
    values = np.sort(random.choice(np.arange(1, 16), count, replace=False)) * 6
    if near:
        values[-1] = values[-2] + 3
    return tuple(random.permutation(values).tolist())


def _highest(chart: Chart, asked: int, random: np.random.Generator) -> tuple[str, str, tuple[str, ...]]:  # noqa: ARG001
    truth = chart.names[int(np.argmax(chart.values))]
    wrong = random.permutation([name for name in chart.names if name != truth])[:3].tolist()
    return "Which one has the highest value?", truth, tuple(random.permutation([truth, *wrong]).tolist())


def _value(chart: Chart, asked: int, random: np.random.Generator) -> tuple[str, str, tuple[str, ...]]:
    truth = chart.values[asked]
    steps = random.permutation([step for step in (-36, -24, -12, 12, 24, 36) if 0 < truth + step < _LARGEST])[:3]
    options = random.permutation([str(truth), *(str(truth + step) for step in steps)]).tolist()
    return f"What is the value of {chart.names[asked]}?", str(truth), tuple(options)


_QUESTIONS: dict[str, Callable[[Chart, int, np.random.Generator], tuple[str, str, tuple[str, ...]]]] = {
    "highest": _highest,
    "value": _value,
}


def _drawn(chart: Chart) -> list[RGB]:
    sheet = Image.new("RGB", (_SIZE, _SIZE), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_LEFT, 20), chart.title, fill="black", font=font(22))
    _KINDS[chart.kind](draw, chart)
    return [as_picture(sheet)]


def _height(value: float) -> float:
    return _TOP + _PLOT * (1 - value / _LARGEST)


def _axes(draw: ImageDraw.ImageDraw, chart: Chart) -> list[float]:
    """Draw the axes; return where each name stands on the horizontal one."""
    for tick in range(0, _LARGEST + 1, 20):
        y = _height(tick)
        draw.line((_LEFT, y, _SIZE - 20, y), fill="#dddddd")
        draw.text((_LEFT - 8, y), str(tick), fill="black", font=font(16), anchor="rm")
    draw.line((_LEFT, _TOP, _LEFT, _height(0), _SIZE - 20, _height(0)), fill="black", width=2)
    step = (_SIZE - 20 - _LEFT) / len(chart.names)
    places = [_LEFT + step * (index + 0.5) for index in range(len(chart.names))]
    for x, name in zip(places, chart.names, strict=True):
        draw.text((x, _height(0) + 16), name, fill="black", font=font(16), anchor="mm")
    return places


def _bars(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    for x, value in zip(_axes(draw, chart), chart.values, strict=True):
        draw.rectangle((x - 20, _height(value), x + 20, _height(0)), fill=_COLOURS[0])


def _line(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    points = [(x, _height(value)) for x, value in zip(_axes(draw, chart), chart.values, strict=True)]
    draw.line(points, fill=_COLOURS[1], width=4)
    for x, y in points:
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=_COLOURS[1])


def _points(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    for index, (x, value) in enumerate(zip(_axes(draw, chart), chart.values, strict=True)):
        y = _height(value)
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=_COLOURS[index])


def _stacked(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    """Draw bars whose lower part is a third: the value is that of the whole bar."""
    for x, value in zip(_axes(draw, chart), chart.values, strict=True):
        draw.rectangle((x - 20, _height(value), x + 20, _height(value / 3)), fill=_COLOURS[2])
        draw.rectangle((x - 20, _height(value / 3), x + 20, _height(0)), fill=_COLOURS[3])


def _pie(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    """Draw slices with their values beside them, since a pie has no axis."""
    box, turn = (116, 110, 396, 390), -90.0
    for index, (name, value) in enumerate(zip(chart.names, chart.values, strict=True)):
        angle = 360 * value / sum(chart.values)
        draw.pieslice(box, turn, turn + angle, fill=_COLOURS[index], outline="white")
        middle = math.radians(turn + angle / 2)
        at = (256 + 185 * math.cos(middle), 250 + 165 * math.sin(middle))
        draw.text(at, f"{name} {value}", fill="black", font=font(16), anchor="mm")
        turn += angle


_KINDS: dict[str, Callable[[ImageDraw.ImageDraw, Chart], None]] = {
    "bar": _bars,
    "line": _line,
    "scatter": _points,
    "stacked": _stacked,
    "pie": _pie,
}
