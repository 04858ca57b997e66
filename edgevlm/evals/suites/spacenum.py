"""Numbers and places, after SpaceNum (https://arxiv.org/abs/2605.23898): from a picture to coordinates, and back.

Two anchors make a frame: red is the origin and blue lies at (4, 0), at any rotation. A third mark has coordinates in
that frame. Each wrong option is a mistake with a name, so that what a model takes is a diagnosis.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from edgevlm.evals.drawing import as_picture, font
from edgevlm.evals.items import LETTERS, Item, Suite, spread
from edgevlm.families.base import RGB

MARKS = ("objects", "boxes", "points")
"""The ladder of abstraction: the same layouts."""
_PER_CELL = 60
_SIZE, _ANCHOR = 512, 4
_FRAME = (
    "The red mark is at (0, 0) and the blue mark at (4, 0); the second number grows to the left of the way from red to"
    " blue."
)
Place = tuple[int, int]


class SpaceNum(Suite):
    """Four options each; the original's 30 % by chance comes from another mix of options, so figures do not compare."""

    name = "spacenum"
    asks = "turns places into numbers and back"

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return items of both directions for objects, boxes and points in turn."""
        cells = [
            [make(seed, index, marks) for index in range(_PER_CELL)]
            for marks in MARKS
            for make in (_space_to_number, _number_to_space)
        ]
        return spread(cells, count)

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return how often each mistake was taken, of the items that ask for coordinates."""
        asked = [row for row in rows if row["cell"].startswith("space to number")]
        taken = Counter(_mistakes(row["truth"]).get(row["answer"], "right") for row in asked)
        return {f"taken: {name}": share / len(asked) for name, share in taken.items()} if asked else {}


def _space_to_number(seed: int, index: int, marks: str) -> Item:
    place, turn, order = _layout(seed, index)
    truth = _told(place)
    options = [truth, *_mistakes(truth)]
    question = f"{_FRAME} Where is the green mark?"
    shuffled = tuple(options[each] for each in order)
    pictures = partial(_single, place, turn, marks)
    return Item(
        f"s2n-{marks}-{index}",
        f"space to number, {marks}",
        question,
        pictures,
        truth,
        shuffled,
        True,
        f"s2n-{index}",
        marks,
    )


def _number_to_space(seed: int, index: int, marks: str) -> Item:
    place, turn, order = _layout(seed, index + _PER_CELL)
    truth = _told(place)
    options = [truth, *_mistakes(truth)]
    shown = [_read(options[each]) for each in order]
    letter = LETTERS[list(order).index(0)]
    question = f"{_FRAME} In which of the four pictures is the green mark at {truth}?"
    pictures = partial(_sheet, shown, turn, marks)
    name = f"n2s-{marks}-{index}"
    return Item(
        name, f"number to space, {marks}", question, pictures, letter, tuple("ABCD"), False, f"n2s-{index}", marks
    )


def _layout(seed: int, index: int) -> tuple[Place, float, tuple[int, ...]]:
    """Return the place of the mark, the frame's rotation in radians, and the order of the options."""
    random = np.random.default_rng([seed, index])
    while True:
        place = (int(random.integers(-4, 7)), int(random.integers(-5, 6)))
        if len({_told(place), *_mistakes(_told(place))}) == 4 and place not in {(0, 0), (_ANCHOR, 0)}:
            return place, float(random.uniform(0, 2 * math.pi)), tuple(random.permutation(4).tolist())


def _mistakes(truth: str) -> dict[str, str]:
    """Return the wrong options by what they are mistakes of."""
    x, y = _read(truth)
    return {_told((y, x)): "axes swapped", _told((x, -y)): "mirrored", _told((x + 2, y)): "two steps off"}


def _told(place: Place) -> str:
    return f"({place[0]}, {place[1]})"


def _read(told: str) -> Place:
    x, y = told.strip("()").split(", ")
    return int(x), int(y)


def _single(place: Place, turn: float, marks: str) -> list[RGB]:
    return [as_picture(_scene(place, turn, marks))]


def _sheet(places: Sequence[Place], turn: float, marks: str) -> list[RGB]:
    """Draw four layouts on one sheet, under letters."""
    sheet = Image.new("RGB", (_SIZE, _SIZE), "white")
    draw, half = ImageDraw.Draw(sheet), _SIZE // 2
    for index, place in enumerate(places):
        corner = (index % 2 * half, index // 2 * half)
        sheet.paste(_scene(place, turn, marks).resize((half, half), Image.Resampling.LANCZOS), corner)
        draw.rectangle((*corner, corner[0] + half - 1, corner[1] + half - 1), outline="black", width=2)
        draw.text((corner[0] + 12, corner[1] + 8), LETTERS[index], fill="black", font=font(28))
    return [as_picture(sheet)]


def _scene(place: Place, turn: float, marks: str) -> Image.Image:
    """Draw the two anchors and the mark, seen from above."""
    unit = _SIZE / 20
    image = Image.new("RGB", (_SIZE, _SIZE), "#f4efe6")
    draw = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        along, across = (x - 1) * unit, y * unit
        right = math.cos(turn) * along - math.sin(turn) * across
        up = math.sin(turn) * along + math.cos(turn) * across
        return _SIZE / 2 + right, _SIZE / 2 - up

    for (x, y), colour in (((0, 0), "#cc0000"), ((_ANCHOR, 0), "#2050c0"), (place, "#20a030")):
        _mark(draw, *at(x, y), colour, marks)
    return image


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, colour: str, marks: str) -> None:
    size = 5 if marks == "points" else 14
    box = (x - size, y - size, x + size, y + size)
    if marks == "boxes":
        draw.rectangle(box, outline=colour, width=4)
        return
    if marks == "objects":  # a round box with its shadow
        draw.ellipse(tuple(each + 6 for each in box), fill="#c8c0b0")
    draw.ellipse(box, fill=colour)
    if marks == "objects":
        draw.ellipse((x - 6, y - 6, x + 2, y + 2), fill="white")
