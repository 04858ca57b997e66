"""What can be asked: the protocol of an export in this process and of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from edgevlm.families.base import RGB

Schema: TypeAlias = Mapping[str, Any]


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

    prompts: Mapping[str, str]
    """What it was taught to be asked for a task, by the task's name, such as `page`."""

    def describe(self) -> dict[str, Any]:
        """Return what tells it from others, for the first row of the results."""

    def score(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        """Return how likely each option is. Raises `EdgeVLMError`."""

    def generate(
        self, pictures: Sequence[RGB], question: str, max_new_tokens: int, schema: Schema | None = None
    ) -> str:
        """Return the greedy answer, JSON of `schema` where there is one. Raises `EdgeVLMError`."""

    def choose(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> str:
        """Return the greedy answer under a constraint that allows the options alone. Raises `EdgeVLMError`."""
