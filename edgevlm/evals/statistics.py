"""Intervals and tests of right answers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]
RESAMPLES = 2000
_Z = 1.959964


def wilson(right: float, asked: int) -> Interval:
    """Return the 95 % interval of a proportion (Wilson 1927, the score interval)."""
    if not asked:
        return 0.0, 1.0
    share = right / asked
    centre = share + _Z * _Z / (2 * asked)
    half = _Z * math.sqrt(share * (1 - share) / asked + _Z * _Z / (4 * asked * asked))
    below = 1 + _Z * _Z / asked
    return (centre - half) / below, (centre + half) / below


def cluster_bootstrap(
    values: Sequence[float] | Sequence[Sequence[float]],
    clusters: Sequence[str],
    statistic: Callable[[npt.NDArray[np.float64]], float] = lambda sample: float(sample.mean()),
) -> Interval:
    """Return the 95 % interval of a statistic of `values` whose clusters are resampled whole (Efron 1979).

    Each value is a number, or several that the statistic takes as a row.
    """
    members: dict[str, list[Any]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        members[cluster].append(value)
    groups = [np.array(group, float) for group in members.values()]
    if len(groups) < 2:
        return 0.0, 1.0
    random = np.random.default_rng(0)
    found = [
        statistic(np.concatenate([groups[index] for index in random.integers(0, len(groups), len(groups))]))
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """A figure of some rows."""

    rows: Sequence[Sequence[float]]
    """What of each row it is made of."""
    clusters: Sequence[str]
    statistic: Callable[[npt.NDArray[np.float64]], float]

    @property
    def value(self) -> float:
        """The figure."""
        return self.statistic(np.array(self.rows, float))

    @property
    def interval(self) -> Interval:
        """Its 95 % interval."""
        return cluster_bootstrap(self.rows, self.clusters, self.statistic)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return how often a positive's score is above a negative's, ties counting half; 0.5 is chance."""
    if not len(positive) or not len(negative):
        return math.nan
    below = np.sort(np.asarray(negative, float))
    ranks = (np.searchsorted(below, positive, "left") + np.searchsorted(below, positive, "right")) / 2
    return float(np.mean(ranks) / len(below))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of two models whose answers differ on so many items (McNemar 1947)."""
    differing, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(differing, index) for index in range(fewer + 1)) / 2**differing if differing else 1.0
    return min(1.0, 2 * tail)
