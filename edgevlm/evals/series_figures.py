"""What answers about series add up to: ranks of clean and not, events found and missed, beside two detectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from edgevlm.evals.series import Series, Span, isolation, match, overlap, read, rolling_z, spans_of
from edgevlm.evals.statistics import Estimate, auroc

Z_SCORE = "a rolling z-score"
F1 = "events, F1"


@dataclass(frozen=True)
class Detector:
    """A classical way to find anomalies in the numbers."""

    name: str
    score: Callable[[Series], Series]
    """Of each point."""
    threshold: float
    """Of an anomaly's score, chosen on series of another seed."""

    def spans(self, series: Series) -> list[Span]:
        """Return what it finds."""
        return spans_of(np.flatnonzero(self.score(series) > self.threshold))


def detectors() -> list[Detector]:
    """Return those that can be had: the second needs scikit-learn."""
    found = [Detector(Z_SCORE, rolling_z, 5.0)]
    return [*found, Detector("IsolationForest", isolation, 0.6)] if find_spec("sklearn") else found


def ranks(rows: Sequence[Mapping[str, Any]], name: str, scores: Sequence[float]) -> dict[str, Estimate]:
    """Return how often a series with an anomaly has a higher score than one without, where there are both."""
    odd = [float(row["truth"] == "yes") for row in rows]
    if len(set(odd)) < 2:
        return {}
    pairs = list(zip(scores, odd, strict=True))
    return {name: Estimate(pairs, [row["family"] for row in rows], _auroc)}


def _auroc(pairs: Series) -> float:
    """Return the AUROC of scores, each beside 1 or 0; half where a sample holds one kind alone."""
    odd = pairs[:, 1] == 1
    found = auroc(pairs[odd, 0].tolist(), pairs[~odd, 0].tolist())
    return found if np.isfinite(found) else 0.5


def told_apart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Return how often the twin with an anomaly has the higher score."""
    twins: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if "seed" in row["facts"]:
            twins[row["family"]][row["truth"]] = row["scores"]["yes"]
    told = {name: [np.sign(each["yes"] - each["no"]) / 2 + 0.5] for name, each in twins.items() if len(each) == 2}
    return {"twins told apart": Estimate(list(told.values()), list(told), _mean)} if told else {}


def events(rows: Sequence[Mapping[str, Any]], whose: str, found: Sequence[Sequence[Span]]) -> dict[str, Estimate]:
    """Return precision, recall and F1 of all events, and the mean IoU where there is an anomaly or one was found."""
    if not rows:
        return {}
    true, clusters = [true_answer(row["truth"]) for row in rows], [row["family"] for row in rows]
    counts = [match(*pair) for pair in zip(true, found, strict=True)]
    shared = [(overlap(*pair), cluster) for *pair, cluster in zip(true, found, clusters, strict=True)]
    either = [([share], cluster) for share, cluster in shared if share is not None]
    told = {
        f"events, precision{whose}": Estimate(counts, clusters, lambda each: _share(each[:, 0], each[:, :2])),
        f"events, recall{whose}": Estimate(counts, clusters, lambda each: _share(each[:, 0], each[:, ::2])),
        f"{F1}{whose}": Estimate(counts, clusters, lambda each: _share(2 * each[:, 0], each @ (2, 1, 1))),
    }
    if either:
        told[f"overlap{whose}"] = Estimate([share for share, _ in either], [cluster for _, cluster in either], _mean)
    return told


def kinds(rows: Sequence[Mapping[str, Any]], said: Sequence[str]) -> dict[str, Estimate]:
    """Return how often the kind is right, where there is an anomaly whose kind is known."""
    odd = [(row, kind) for row, kind in zip(rows, said, strict=True) if row["facts"].get("kind")]
    right = [[float(row["facts"]["kind"] == kind)] for row, kind in odd]
    return {"kind right": Estimate(right, [row["family"] for row, _ in odd], _mean)} if odd else {}


def _share(part: Series, whole: Series) -> float:
    return float(part.sum() / whole.sum()) if whole.sum() else 0.0


def _mean(values: Series) -> float:
    return float(values.mean())


def true_answer(truth: str) -> list[Span]:
    """Return the spans of a right answer."""
    said = read(truth)
    assert said
    return said[1]
