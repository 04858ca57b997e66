"""Carrier: the same question as text, as a picture of the text, and half and half.

What a model loses between text and picture is what https://arxiv.org/abs/2605.30265 calls carrier sensitivity. Items
need no knowledge: arithmetic, order, dates, and looking up a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from PIL import Image, ImageFilter

from edgevlm.evals.drawing import as_picture, written
from edgevlm.evals.items import Item, Suite
from edgevlm.families.base import RGB

CARRIERS = ("text", "picture", "half", "half distorted", "text beside a picture")
_PER_KIND = 100
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_AS_SHOWN = "Read the picture and answer its question."
Problem = tuple[str, str, tuple[str, ...]]
"""Question, truth, options."""


class Carrier(Suite):
    """Four options each; an item's family are its five carriers."""

    name = "carrier"
    asks = "answers a question whatever carries it"

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return items whose carriers follow each other, so that any count compares them on the same questions."""
        cells = [
            [item for index in range(_PER_KIND) for item in _carried(kind, index, seed, make)]
            for kind, make in _KINDS.items()
        ]
        chosen = None if count is None else max(1, count // len(CARRIERS))
        families = [[cell[at : at + len(CARRIERS)] for at in range(0, len(cell), len(CARRIERS))] for cell in cells]
        turns = [family for index in range(_PER_KIND) for family in (each[index] for each in families)]
        return [item for family in turns[:chosen] for item in family]


def _carried(kind: str, index: int, seed: int, make: Callable[[np.random.Generator], Problem]) -> list[Item]:
    family = f"{kind}-{index}"
    random = np.random.default_rng([seed, list(_KINDS).index(kind), index])
    question, truth, options = make(random)
    before, middle, after = _thirds(question)
    asked: dict[str, tuple[str, Callable[[], Sequence[RGB]]]] = {
        "text": (question, _none),
        "picture": (_AS_SHOWN, partial(_pictures, question)),
        "half": (f"{before} [the picture goes on here] {after}", partial(_pictures, middle)),
        "half distorted": (f"{before} [the picture goes on here] {after}", partial(_distorted, middle, seed + index)),
        "text beside a picture": (question, partial(_pictures, "This page was left empty.")),
    }
    return [
        Item(f"{family}-{carrier}", carrier, text, pictures, truth, options, True, family, carrier)
        for carrier, (text, pictures) in asked.items()
    ]


def _thirds(question: str) -> tuple[str, str, str]:
    """Return a question's words in three parts, none of them empty."""
    words = question.split(" ")
    first = max(1, len(words) // 3)
    last = max(first + 1, len(words) - first)
    return " ".join(words[:first]), " ".join(words[first:last]), " ".join(words[last:])


def _none() -> list[RGB]:
    return []


def _pictures(text: str) -> list[RGB]:
    return [written(text)]


def _distorted(text: str, seed: int) -> list[RGB]:
    """Return the text as a photo of a page has it: turned a little, and blurred."""
    angle = float(np.random.default_rng(seed).uniform(-6, 6))
    sheet = Image.fromarray(written(text)).rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")
    return [as_picture(sheet.filter(ImageFilter.GaussianBlur(1.2)))]


def _options(random: np.random.Generator, truth: str, others: Sequence[str]) -> tuple[str, ...]:
    """Return the truth and three others that differ from it, in a random order."""
    wrong = list(dict.fromkeys(each for each in others if each != truth))
    chosen = [truth, *random.permutation(wrong)[:3].tolist()]
    return tuple(random.permutation(chosen).tolist())


def _sum(random: np.random.Generator) -> Problem:
    first, second, third = (int(each) for each in random.integers(12, 90, 3))
    truth = first + second - third
    question = (
        f"A box holds {first} screws. {second} are put in and {third} are taken out. How many are in the box now?"
    )
    return question, str(truth), _options(random, str(truth), [str(truth + step) for step in (-10, -2, -1, 1, 2, 10)])


def _order(random: np.random.Generator) -> Problem:
    names = random.permutation(_NAMES)[:4].tolist()
    rank = int(random.integers(4))
    told = [f"{one} is taller than {other}." for one, other in pairwise(names)]
    said = " ".join(random.permutation(told).tolist())
    which = ("the tallest", "the second tallest", "the second smallest", "the smallest")[rank]
    return f"{said} Who is {which}?", names[rank], _options(random, names[rank], names)


def _date(random: np.random.Generator) -> Problem:
    start, days = int(random.integers(7)), int(random.integers(3, 60))
    truth = _WEEKDAYS[(start + days) % 7]
    question = f"Today is {_WEEKDAYS[start]}. A pump is serviced in {days} days. On which day of the week is that?"
    return question, truth, _options(random, truth, _WEEKDAYS)


def _table(random: np.random.Generator) -> Problem:
    names = random.permutation(_NAMES)[:4].tolist()
    values = random.choice(np.arange(10, 99), 4, replace=False).tolist()
    which = int(random.integers(4))
    rows = ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
    question = f"The parts that each of four people checked are {rows}. How many parts did {names[which]} check?"
    return question, str(values[which]), _options(random, str(values[which]), [str(each) for each in values])


_KINDS: dict[str, Callable[[np.random.Generator], Problem]] = {
    "sum": _sum,
    "order": _order,
    "date": _date,
    "table": _table,
}
