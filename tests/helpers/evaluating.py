"""Answerers that prove a suite's items: one that knows the truth, one that guesses, one that sees nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgevlm.evals.items import LETTERS, Item, Suite
from edgevlm.evals.model import Scored
from edgevlm.families.base import RGB


class Oracle:
    """Knows which item it is asked by its question and pictures, and gives the truth; grey pictures tell it nothing."""

    name, is_general = "oracle", True
    prompts: Mapping[str, str] = {}

    def __init__(self, suite: Suite, items: Sequence[Item]) -> None:
        self._suite = suite
        self._known = {_key(item.question, item.pictures()): item for item in items}

    def describe(self) -> dict[str, Any]:
        return {"model": self.name}

    def score(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        item = self._find(pictures, question)
        if item is None:
            return Scored({option: float(option == options[0]) for option in options}, 1.0)
        truth = item.truth
        if item.is_lettered:
            truth = next(
                letter
                for turn in range(len(item.options))
                for order in [item.options[turn:] + item.options[:turn]]
                if self._suite.lettered(item.question, order) == question
                for letter, option in zip(LETTERS, order, strict=False)
                if option == item.truth
            )
        return Scored({option: float(option == truth) for option in options}, 1.0)

    def generate(self, pictures: Sequence[RGB], question: str, max_new_tokens: int, schema: Any = None) -> str:
        item = self._find(pictures, question)
        return item.truth if item else ""

    def choose(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> str:
        scores = self.score(pictures, question, options).probabilities
        return max(options, key=lambda option: scores[option])

    def _find(self, pictures: Sequence[RGB], question: str) -> Item | None:
        seen = _digest(pictures)
        return next((item for (asked, shown), item in self._known.items() if shown == seen and asked in question), None)


class Guesser:
    """Guesses, each option alike."""

    name, is_general = "guesser", True
    prompts: Mapping[str, str] = {}

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def describe(self) -> dict[str, Any]:
        return {"model": self.name}

    def score(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        shares = self._random.dirichlet(np.ones(len(options)))
        return Scored(dict(zip(options, shares.tolist(), strict=True)), 1.0)

    def generate(self, pictures: Sequence[RGB], question: str, max_new_tokens: int, schema: Any = None) -> str:
        return ""

    def choose(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> str:
        return str(self._random.choice(list(options)))


def picture_digest(items: Sequence[Item]) -> str:
    """Return a hash of all pictures and questions of items."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.id} {item.question} {item.options} {item.truth}".encode() + _digest(item.pictures()))
    return digest.hexdigest()


def _key(question: str, pictures: Sequence[RGB]) -> tuple[str, bytes]:
    return question, _digest(pictures)


def _digest(pictures: Sequence[RGB]) -> bytes:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes())
    return digest.digest()
