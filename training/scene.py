"""A drawn picture and what is true about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import numpy as np
from PIL import Image

_T = TypeVar("_T")
Random: TypeAlias = np.random.Generator
DESCRIBE = ("Describe the picture.", "What do you see?", "What does the picture show?", "What is in the picture?")


@dataclass(frozen=True)
class QA:
    """A question, its answer, and how an answer is judged."""

    task: str
    question: str
    answer: str
    tolerance: float | None = None
    """Largest error of a numeric answer; None asks for the exact text."""
    share: float | None = None
    """How far along its scale stands what is read, 0 to 1, if a scale is read."""
    scale: str = ""
    """The name of that scale."""
    about: tuple[int, ...] = ()
    """Which of the picture's marks are asked about, where the question's words do not tell."""
    lead: str = ""
    """What is written before the answer, as a form does that the model did not choose."""
    close: str = ""
    """What ends the form."""
    wording: str = ""
    """What the model reads in place of the question, if anything."""
    follows: bool = False
    """Whether it is asked after the question before it, in one conversation."""


@dataclass(frozen=True)
class Mark:
    """What is drawn at a point of the picture: a sign, a kind, a colour, a state."""

    x: float
    y: float
    name: str
    share: float | None = None
    """How far along its scale it stands, 0 to 1, if it measures anything."""


@dataclass
class Scene:
    """A picture with everything that may be asked about it, and marks that help the vision tower to learn."""

    image: Image.Image
    marks: list[Mark] = field(default_factory=list)
    pairs: list[QA] = field(default_factory=list)

    def ask(
        self,
        task: str,
        questions: tuple[str, ...],
        answer: str,
        random: Random,
        tolerance: float | None = None,
        share: float | None = None,
        scale: str = "",
        about: tuple[int, ...] = (),
    ) -> None:
        """Add one question, worded in one of several ways."""
        self.pairs.append(QA(task, pick(random, questions), answer, tolerance, share, scale, about))

    def describe(self, random: Random, answer: str, tolerance: float | None = None) -> None:
        """Add the question for a description: one long answer teaches more than several short ones."""
        self.ask("description", DESCRIBE, answer, random, tolerance)


def pick(random: Random, choices: Sequence[_T]) -> _T:
    """Return one of `choices`, all equally likely."""
    return choices[int(random.integers(len(choices)))]


def chance(random: Random, probability: float) -> bool:
    """Return True with `probability`."""
    return bool(random.random() < probability)


def between(random: Random, low: float, high: float) -> float:
    """Return a number drawn evenly from an interval."""
    return float(random.uniform(low, high))
