"""Simple bar and line charts: the highest bar, a value, a spike and where."""

from __future__ import annotations

import colorsys
from functools import partial

import numpy as np
from PIL import Image

from training.draw import Box, Colour, Pen, canvas, fit, font_files, ink, load_font, named, shade, text
from training.scene import Random, Scene, between, chance, pick

CATEGORIES = (
    ("A", "B", "C", "D", "E", "F"),
    ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat"),
    ("Jan", "Feb", "Mar", "Apr", "May", "Jun"),
    ("P1", "P2", "P3", "P4", "P5", "P6"),
)
TOPS = (10, 20, 50, 100)


TITLES = ("Output", "Load per hour", "Minutes lost", "Units", "Temperature", "Shift report", "Scrap", "kWh", "Yield")
"""What may stand above a chart: nothing that reads like a category or a value."""


def scene(random: Random, varied: float = 0.0) -> Scene:
    """Draw a bar or a line chart; the share `varied` of them in other proportions and with other lines."""
    loose = varied > 0 and chance(random, varied)
    return bar_chart(random, loose) if chance(random, 0.55) else line_chart(random, loose)


def axes(random: Random) -> tuple[Image.Image, Pen, Box, Colour]:
    """Return picture, pen, the box of the plot and the ink, the axes drawn."""
    image, pen, ground = canvas(random, None if chance(random, 0.3) else (250, 250, 250))
    width, height = image.size
    box = (
        width * between(random, 0.11, 0.16),
        height * between(random, 0.06, 0.14),
        width * 0.97,
        height * between(random, 0.82, 0.88),
    )
    colour = ink(random, ground)
    pen.line((box[0], box[3], box[2], box[3]), fill=colour, width=2)
    if chance(random, 0.2):
        pen.rectangle(box, outline=colour, width=1)
    elif chance(random, 0.8):
        pen.line((box[0], box[1], box[0], box[3]), fill=colour, width=2)
    return image, pen, box, colour


def loose_axes(random: Random) -> tuple[Image.Image, Pen, Box, Colour]:
    """Return what `axes` returns, in proportions that vary more, sometimes framed, titled, on a tinted plot."""
    image, pen, ground = canvas(random, None if chance(random, 0.3) else (255, 255, 255))
    width, height = image.size
    box = (
        width * between(random, 0.1, 0.22),
        height * between(random, 0.04, 0.18),
        width * between(random, 0.85, 0.99),
        height * between(random, 0.74, 0.9),
    )
    colour, thin = ink(random, ground), int(random.integers(1, 3))
    if chance(random, 0.2):
        pen.rectangle(box, fill=shade(ground, between(random, 0.88, 1.1)))
    if chance(random, 0.5):
        pen.rectangle(box, outline=colour, width=thin)
    else:
        pen.line((box[0], box[1], box[0], box[3], box[2], box[3]), fill=colour, width=thin)
    if box[1] > 0.1 * height and chance(random, 0.7):
        title = pick(random, TITLES)
        face = fit(random, title, (box[2] - box[0]) * 0.8, box[1] * 0.7)
        text(pen, ((box[0] + box[2]) / 2, box[1] / 2), title, face, colour)
    return image, pen, box, colour


def loose_scale(random: Random, pen: Pen, box: Box, top: int, colour: Colour, height: float = 1.0) -> None:
    """Write the numbers of the vertical axis as `scale` does, beside ticks that point in or out."""
    tick = pick(random, (0, 3, 4, 5, -3, -4))
    gap = max(tick, 0) + between(random, 2, 5)
    face = fit(
        random, "100", (box[0] - gap) * between(random, 0.6, 0.95), (box[3] - box[1]) * between(random, 0.06, 0.1)
    )
    steps, grid, grey = pick(random, (2, 4, 5, 5, 10)), random.random(), int(random.integers(130, 225))
    for index in range(steps + 1):
        y = box[3] - (box[3] - box[1]) * height * index / steps
        text(pen, (box[0] - gap, y), f"{top * index / steps:g}", face, colour, "rm")
        pen.line((box[0] - tick, y, box[0], y), fill=colour, width=1)
        if not index or grid > 0.6:
            continue
        if grid < 0.35:
            pen.line((box[0], y, box[2], y), fill=(grey, grey, grey), width=1)
            continue
        for x in np.arange(box[0], box[2], 7):
            pen.line((x, y, min(x + 4, box[2]), y), fill=(grey, grey, grey), width=1)


def any_colour(random: Random) -> Colour:
    """Return a colour of any hue, neither pale nor dark."""
    return tuple(int(255 * part) for part in colorsys.hsv_to_rgb(random.random(), *random.uniform(0.45, 0.95, 2)))  # type: ignore[return-value]


def scale(random: Random, pen: Pen, box: Box, top: int, colour: Colour, height: float = 1.0) -> None:
    """Write the numbers of the vertical axis, `top` at `height` of the plot, sometimes with grid lines."""
    face = fit(random, "100", box[0] * 0.7, (box[3] - box[1]) * 0.08)
    steps = pick(random, (2, 4, 5))
    grid = chance(random, 0.5)
    for index in range(steps + 1):
        y = box[3] - (box[3] - box[1]) * height * index / steps
        text(pen, (box[0] * 0.85, y), f"{top * index / steps:g}", face, colour, "rm")
        if grid and index:
            pen.line((box[0], y, box[2], y), fill=(150, 150, 150), width=1)


def bar_chart(random: Random, loose: bool = False) -> Scene:
    """Draw bars with names below, and maybe values above."""
    image, pen, box, colour = loose_axes(random) if loose else axes(random)
    count = int(random.integers(2, 7))
    names = pick(random, CATEGORIES)[:count]
    top = pick(random, TOPS)
    while True:
        values = random.integers(round(top * 0.05) or 1, top + 1, count)
        order = np.sort(values)
        if order[-1] - order[-2] >= 0.06 * top and order[1] - order[0] >= 0.06 * top:
            break
    height = between(random, 0.7 if loose else 0.86, 0.97)
    (loose_scale if loose else scale)(random, pen, box, top, colour, height)
    shown = chance(random, 0.6)
    slot = (box[2] - box[0]) / count
    wide = slot * between(random, 0.45, 0.8)
    tinted = any_colour if loose else partial(_some, names=("blue", "green", "orange", "purple", "red"))
    one = tinted(random)
    many = chance(random, 0.3)
    edge = colour if loose and chance(random, 0.4) else None
    face = fit(random, "Wed" if len(names[0]) > 2 else "P1", slot * 0.8, box[3] * 0.09)
    for index, value in enumerate(values):
        x = box[0] + slot * (index + 0.5)
        share = int(value) / top
        y = box[3] - (box[3] - box[1]) * height * share
        fill = tinted(random) if many else one
        pen.rectangle((x - wide / 2, y, x + wide / 2, box[3]), fill=fill, outline=edge)
        place = {order[-1]: ("highest",), order[0]: ("lowest",)}.get(value, ())
        pen.mark(x, y, "top", *place, share=share)
        pen.mark(x, (box[3] + image.height) / 2, "bar", *place, f"0..{top}", share=share)
        text(pen, (x, (box[3] + image.height) / 2), names[index], face, colour)
        if shown:
            text(pen, (x, max(y - face.size * 0.6, face.size * 0.5)), str(value), face, colour)
    result = Scene(image, pen.marks)
    highest, lowest = names[int(values.argmax())], names[int(values.argmin())]
    result.ask(
        "chart",
        ("Which bar is the highest?", "Which category has the highest value?", "What has the largest bar?"),
        highest,
        random,
    )
    if count > 2:
        result.ask("chart", ("Which bar is the lowest?", "Which category has the smallest value?"), lowest, random)
    index = int(random.integers(count))
    questions = (f"What is the value of {names[index]}?", f"How high is the bar {names[index]}?")
    tolerance = 0.0 if shown else 0.05 * top
    result.ask("chart", questions, str(values[index]), random, tolerance, values[index] / top, f"0..{top}")
    told = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    result.describe(random, f"a bar chart: {told}", tolerance)
    return result


def _some(random: Random, names: tuple[str, ...]) -> Colour:
    return named(random, pick(random, names))


def line_chart(random: Random, loose: bool = False) -> Scene:
    """Draw a series, calm or with one spike or dip."""
    image, pen, box, colour = loose_axes(random) if loose else axes(random)
    count = int(random.integers(24, 60))
    level, swing = between(random, 0.25, 0.5), between(random, 0.02, 0.1)
    xs = np.linspace(0, 1, count)
    ys = level + swing * np.sin(xs * between(random, 3, 25) + between(random, 0, 6)) + between(random, -0.15, 0.15) * xs
    ys += random.normal(0, between(random, 0.003, 0.015), count)
    spike = int(random.integers(1, count - 1)) if chance(random, 0.6) else None
    if spike is not None:
        ys[spike] += between(random, 0.3, 0.45)
    top = pick(random, TOPS)
    (loose_scale if loose else scale)(random, pen, box, top, colour)
    inset = (box[2] - box[0]) * between(random, 0, 0.06) if loose else 0.0
    box = (box[0] + inset, box[1], box[2] - inset, box[3])
    face = load_font(pick(random, font_files()), max(8, round(box[3] * 0.07)))
    for index in pick(random, ((0, 2.5, 5, 7.5, 10), (0, 5, 10), range(0, 11, 2))) if loose else range(0, 11, 2):
        x = box[0] + (box[2] - box[0]) * index / 10
        if loose:
            pen.line((x, box[3], x, box[3] + 4), fill=colour, width=1)
        text(pen, (min(x, image.width - 8), (box[3] + image.height) / 2), f"{index * 10:g}", face, colour)
    points = [
        (box[0] + (box[2] - box[0]) * x, box[3] - (box[3] - box[1]) * y) for x, y in zip(xs, ys.clip(0, 1), strict=True)
    ]
    stroke = any_colour(random) if loose else _some(random, ("blue", "red", "green", "purple"))
    pen.line(points, fill=stroke, width=int(random.integers(1, 4)))
    if loose and chance(random, 0.35):
        dot = between(random, 1.2, 3)
        for x, y in points:
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=stroke)
    if spike is not None:
        pen.mark(*points[spike], "spike", share=spike / (count - 1))
    result = Scene(image, pen.marks)
    questions = (
        "Is there a spike in the curve?",
        "Does the line have a spike?",
        "Is there an anomaly in the time series?",
    )
    result.ask("chart", questions, "yes" if spike is not None else "no", random)
    if spike is not None:
        where = round(100 * spike / (count - 1))
        result.ask(
            "chart", ("Where is the spike?", "At which position is the spike?"), str(where), random, 5.0, where / 100
        )
    told = "no spike" if spike is None else f"a spike at {round(100 * spike / (count - 1))}"
    result.describe(random, f"a line chart up to {top}, {told}", 5.0)
    return result
