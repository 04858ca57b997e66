"""What the rows of a suite add up to: a table by cell, floors, intervals, and two models paired."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgevlm.errors import OptionError
from edgevlm.evals.items import Suite
from edgevlm.evals.statistics import Interval, cluster_bootstrap, mcnemar, wilson
from edgevlm.jobs.jsonl import Row

_LOW_MASS = 0.05
_ROUNDING = 1e-9


@dataclass(frozen=True)
class CellResult:
    """The items of one cell, or of all."""

    cell: str
    asked: int
    accuracy: float
    interval: Interval
    """95 %: Wilson's, or a bootstrap over families where items belong together or are right in part."""
    chance: float
    blind: float | None
    """Accuracy about grey pictures."""
    majority: float | None
    """Accuracy of always giving the commonest right answer; None where each item has options of its own."""
    robust: float | None
    """Share right in every order of the options; None where options have no letters."""
    unwilling: float | None
    """Share of items where the model put less than 5 % on all options together."""
    said: float | None = None
    """Accuracy of the answers that were generated, of items with options."""

    @property
    def is_chance(self) -> bool:
        """Whether the interval holds chance."""
        return self.interval[0] - _ROUNDING <= self.chance <= self.interval[1] + _ROUNDING


@dataclass(frozen=True)
class SuiteResult:
    """A suite's table and its line."""

    suite: str
    cells: tuple[CellResult, ...]
    total: CellResult
    verdict: str
    figures: dict[str, float]
    """What else the suite tells."""
    intervals: dict[str, Interval]
    """95 % intervals of some of the figures."""
    unanswered: dict[str, int]
    """Items that could not be asked and do not count, by the reason."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm eval --json` prints."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """A second model on the same items."""

    difference: float
    """The second's accuracy less the first's."""
    interval: Interval
    only_first: int
    only_second: int
    p: float
    """McNemar's, exact."""


def summarize(suite: Suite, rows: Sequence[Row]) -> SuiteResult:
    """Return the results of a suite's rows. Raises `OptionError` where none could be asked."""
    unanswered = Counter(row["error"] for row in rows if "error" in row)
    rows = answered(rows)
    if not rows:
        raise OptionError(f"no item of the suite {suite.name} can be asked: {next(iter(unanswered), 'it has none')}")
    cells: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["cell"]].append(row)
    total = _count("all", rows)
    figures = suite.figures(rows) | _said(rows)
    verdict = suite.verdict(total.accuracy, *total.interval, total.chance, total.blind) + suite.remark(figures)
    counted = tuple(_count(cell, some) for cell, some in cells.items())
    return SuiteResult(suite.name, counted, total, verdict, figures, suite.intervals(rows), dict(unanswered))


def answered(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of items that could be asked."""
    return [row for row in rows if "error" not in row]


def compare(first: Sequence[Row], second: Sequence[Row]) -> Difference:
    """Return how a second model's answers to the same items differ. Only items that both were asked count."""
    others = {row["item"]: row for row in answered(second)}
    pairs = [(row, others[row["item"]]) for row in answered(first) if row["item"] in others]
    differences = [other["right"] - row["right"] for row, other in pairs]
    only_first = sum(row["right"] >= 0.5 > other["right"] for row, other in pairs)
    only_second = sum(other["right"] >= 0.5 > row["right"] for row, other in pairs)
    interval = cluster_bootstrap(differences, [row["family"] for row, _ in pairs]) if len(pairs) > 1 else (-1.0, 1.0)
    mean = float(np.mean(differences)) if differences else 0.0
    return Difference(mean, interval, only_first, only_second, mcnemar(only_first, only_second))


def compare_cells(first: Sequence[Row], second: Sequence[Row]) -> dict[str, Difference]:
    """Return `compare` for each cell, in order; of many cells one or another differs by chance."""
    cells = dict.fromkeys(row["cell"] for row in answered(first))
    return {cell: compare([row for row in first if row["cell"] == cell], second) for cell in cells}


def _count(cell: str, rows: Sequence[Row]) -> CellResult:
    right = [float(row["right"]) for row in rows]
    families = [row["family"] for row in rows]
    is_proportion = len(set(families)) == len(rows) and {0.0, 1.0}.issuperset(right)
    interval = wilson(sum(right), len(right)) if is_proportion else cluster_bootstrap(right, families)
    offered = [row for row in rows if row["options"]]
    return CellResult(
        cell,
        len(rows),
        float(np.mean(right)),
        interval,
        float(np.mean([1 / len(row["options"]) if row["options"] else 0.0 for row in rows])),
        _mean([row["blind"] for row in rows if "blind" in row]),
        _majority(offered),
        _mean([float(row["robust"]) for row in offered if "robust" in row]),
        _mean([float(row["mass"] < _LOW_MASS) for row in offered]),
        _mean([row["said_right"] for row in offered if "said_right" in row]),
    )


def _said(rows: Sequence[Row]) -> dict[str, float]:
    """Return how often a model knows and does not say: right by its scores, and wrong in what it generated."""
    both = [row for row in rows if "said_right" in row]
    if not both:
        return {}
    knows, says = (np.array([row[name] for row in both]) for name in ("right", "said_right"))
    return {
        "knows and does not say": float(np.mean((knows >= 0.5) & (says < 0.5))),
        "says and does not know": float(np.mean((knows < 0.5) & (says >= 0.5))),
        "says none of the options": float(np.mean([row["said"] == "" for row in both])),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _majority(rows: Sequence[Row]) -> float | None:
    if not rows or len({tuple(sorted(row["options"])) for row in rows}) > 1:
        return None
    return max(Counter(row["truth"] for row in rows).values()) / len(rows)
