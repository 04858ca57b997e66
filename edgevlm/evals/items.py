"""Items and suites: questions about pictures, with the answers that are offered and the right one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from edgevlm.evals.model import Model
from edgevlm.evals.statistics import Interval
from edgevlm.families.base import RGB

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """One question. Its pictures are drawn when it is asked, and each time the same."""

    id: str
    """Unique in its suite."""
    cell: str
    """The row of the table that it counts in, such as a task and its difficulty."""
    question: str
    pictures: Callable[[], Sequence[RGB]]
    truth: str
    options: tuple[str, ...] = ()
    """What is offered, `truth` among them; none for an answer that is generated and graded by its suite."""
    is_lettered: bool = False
    """The options are listed under letters, and asked in all cyclic orders; otherwise their texts are scored."""
    family: str = ""
    """Items of one family were made of one source, so that they are no independent samples; empty: of its own."""
    variant: str = ""
    """Which member of its family it is."""
    max_new_tokens: int = 64
    """Of an answer that is generated."""
    schema: Mapping[str, Any] | None = None
    """JSON Schema of an answer that is generated."""
    task: str = ""
    """Of an answer that is generated: a model that has a prompt of its own for this task is asked that one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the suite's grade and figures need besides; it goes into the row."""

    def __post_init__(self) -> None:
        if self.options and (self.truth not in self.options or len(set(self.options)) < len(self.options)):
            raise ValueError(f"item {self.id}: the options must differ, and the truth be one of them")
        if len(self.options) > len(LETTERS) or not all(self.options):
            raise ValueError(f"item {self.id}: {len(self.options)} options, or an empty one")

    @property
    def chance(self) -> float:
        """How often a guess among the options is right; 0 where none are offered."""
        return 1 / len(self.options) if self.options else 0.0

    @property
    def cluster(self) -> str:
        """What it is resampled with."""
        return self.family or self.id


class Suite(ABC):
    """A set of items that one question about models needs."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Rises when the same seed makes other items."""
    asks: ClassVar[str]
    """What it finds out, in a line."""
    quick: ClassVar[int] = 50
    """Items of `--quick`."""
    needs_general_model: ClassVar[bool] = False
    """It asks for knowledge that a model of drawn panels cannot have."""
    needs_reference: ClassVar[bool] = False
    """It compares with a second model instead of known answers."""
    asks_blind: ClassVar[bool] = True
    """A grey picture may be answered rightly; not so where a whole page or graph is to be written down."""
    takes_data: ClassVar[bool] = False
    """It can ask the user's own items (`--data`)."""

    strategies: ClassVar[tuple[str, ...]] = ()
    """Other ways to come to an answer, which `ask_further` takes."""

    def __init__(self, data: Path | None = None) -> None:
        self.data = data
        """The user's own items."""
        self.strategy = ""
        """The chosen one of `strategies`."""

    @abstractmethod
    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return the items, `count` of them at most, cells as even as can be. Raises `OptionError`."""

    def lettered(self, question: str, options: Sequence[str]) -> str:
        """Return a question with its options under letters."""
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        return f"{question}\n{listed}\nAnswer with the letter of the right option."

    def grade(self, item: Item, answer: str) -> float:
        """Return how right a generated answer is, 0 to 1."""
        return float(answer.strip().casefold() == item.truth.strip().casefold())

    def ask_further(self, model: Model, item: Item, pictures: Sequence[RGB]) -> dict[str, Any]:  # noqa: ARG002
        """Return what else is found out about an item whose answer was generated; it goes into the row."""
        return {}

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:  # noqa: ARG002
        """Return what else the rows tell, such as how the members of a family differ, by what it is called."""
        return {}

    def intervals(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:  # noqa: ARG002
        """Return 95 % intervals of some of the figures, by what they are called."""
        return {}

    def remark(self, figures: Mapping[str, float]) -> str:  # noqa: ARG002
        """Return what the figures say, for the end of the verdict."""
        return ""

    def verdict(self, accuracy: float, low: float, high: float, chance: float, blind: float | None) -> str:
        """Return the result in a line."""
        floors = f"chance {chance:.0%}" + (f", blind {blind:.0%}" if blind is not None else "")
        at_chance = "; that is chance" if low <= chance <= high else ""
        return f"{self.asks}: {accuracy:.0%} [{low:.0%}, {high:.0%}], {floors}{at_chance}"


def spread(cells: Sequence[Sequence[Item]], count: int | None) -> list[Item]:
    """Return the first items of every cell in turn, `count` in all, None for all of them."""
    longest = max(map(len, cells), default=0)
    turns = [cell[index] for index in range(longest) for cell in cells if index < len(cell)]
    return turns if count is None else turns[:count]
