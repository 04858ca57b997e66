"""Which answers are right, and how many, with what certainty."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgevlm.evals.statistics import wilson

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def is_right(answer: str, wanted: str, tolerance: float | None) -> bool:
    """Tell whether `answer` is the text `wanted`, or that text with each number within the tolerance.

    None asks for the exact text; 0 takes a number that is written otherwise, such as 7.0 for 7.
    """
    answer = answer.strip()
    if tolerance is None:
        return answer == wanted
    if _NUMBER.sub("#", answer) != _NUMBER.sub("#", wanted):
        return False
    pairs = zip(_NUMBER.findall(wanted), _NUMBER.findall(answer), strict=True)
    return all(abs(float(one) - float(other)) <= tolerance + 1e-9 for one, other in pairs)


@dataclass(frozen=True)
class Scored:
    """Right answers."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Share of right answers; 0 of none."""
        return self.right / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (Wilson 1927, the score interval)."""
        return wilson(self.right, self.asked)
