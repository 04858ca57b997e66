"""How a model is asked: an export in this process, or any server that speaks OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgevlm.decoding.config import GenerationConfig
from edgevlm.evals.items import LETTERS, Item, Suite
from edgevlm.families.base import RGB, ImageBudget
from edgevlm.model_store import default_model

if TYPE_CHECKING:
    from edgevlm.vlm import VLM

_GREY = 128


@dataclass(frozen=True)
class Scored:
    """How likely a model is to answer with each option."""

    probabilities: Mapping[str, float]
    mass: float
    """Probability of any of them; near 0 the model had something else to say."""


class Model(Protocol):
    """What can be asked."""

    name: str
    is_general: bool
    """It was made for more than the bundled model was."""

    def describe(self) -> dict[str, Any]:
        """Return what tells it from others, for the first row of the results."""

    def score(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        """Return how likely each option is. Raises `EdgeVLMError`."""

    def generate(self, pictures: Sequence[RGB], question: str, max_new_tokens: int) -> str:
        """Return the greedy answer. Raises `EdgeVLMError`."""


class LocalModel:
    """An export, loaded in this process."""

    def __init__(self, vlm: VLM, config: GenerationConfig, image_budget: ImageBudget) -> None:
        self.name, self.is_general = vlm.folder.name, vlm.folder != default_model()
        self._vlm, self._config, self._budget = vlm, config, image_budget

    def describe(self) -> dict[str, Any]:
        """Return the export's name, digest and precisions, and the detail of its pictures."""
        manifest = self._vlm.manifest
        precisions = {name: submodel.precision for name, submodel in manifest.submodels.items()}
        return {
            "model": self.name,
            "fingerprint": manifest.fingerprint,
            "precision": precisions,
            "detail": self._budget.detail,
        }

    def score(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        """As `Model.score`."""
        scores = self._vlm.score(list(pictures), question, options, self._config, self._budget)
        return Scored(scores.probabilities, scores.total_probability)

    def generate(self, pictures: Sequence[RGB], question: str, max_new_tokens: int) -> str:
        """As `Model.generate`."""
        config = replace(self._config, max_new_tokens=max_new_tokens)
        return self._vlm.generate(list(pictures), question, config, self._budget).text


@dataclass(frozen=True)
class Judged:
    """What a model said to an item, over all orders of its options."""

    answer: str
    """In the first order."""
    right: float
    """Mean over the orders."""
    robust: bool
    """Right in every order."""
    scores: Mapping[str, float]
    """Mean probability of each option."""
    mass: float


def judge(suite: Suite, model: Model, item: Item, pictures: Sequence[RGB]) -> Judged:
    """Ask an item with options about pictures, in every cyclic order where they have letters."""
    if not item.is_lettered:
        scored = model.score(pictures, item.question, item.options)
        answer = max(item.options, key=lambda option: scored.probabilities[option])
        return Judged(answer, float(answer == item.truth), answer == item.truth, scored.probabilities, scored.mass)
    answers, totals, masses = [], dict.fromkeys(item.options, 0.0), []
    for turn in range(len(item.options)):
        order = item.options[turn:] + item.options[:turn]
        letters = tuple(LETTERS[: len(order)])
        scored = model.score(pictures, suite.lettered(item.question, order), letters)
        by_option = {option: scored.probabilities[letter] for letter, option in zip(letters, order, strict=True)}
        answers.append(max(order, key=lambda option: by_option[option]))
        masses.append(scored.mass)
        for option, probability in by_option.items():
            totals[option] += probability / len(order)
    right = [answer == item.truth for answer in answers]
    return Judged(answers[0], float(np.mean(right)), all(right), totals, float(np.mean(masses)))


def blinded(pictures: Sequence[RGB]) -> list[RGB]:
    """Return grey pictures of the same sizes."""
    return [np.full_like(picture, _GREY) for picture in pictures]
