"""Anomalies of a series as spans of points: what two detectors find, and how near found spans are to true ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Series: TypeAlias = npt.NDArray[np.float64]
Span: TypeAlias = tuple[int, int]
"""The first and the last point."""
WINDOW = 24
_FOREST_WINDOW, _TREES = 8, 30
_NEAR = 12
"""Points that are no further apart than that lie in one span."""


def rolling_z(series: Series) -> Series:
    """Return each point's distance from the window before it, in that window's standard deviations."""
    windows = np.lib.stride_tricks.sliding_window_view(series, WINDOW)[:-1]
    scores = np.abs(series[WINDOW:] - windows.mean(-1)) / (windows.std(-1) + 1e-9)
    return np.concatenate([np.zeros(WINDOW), scores])


def isolation(series: Series) -> Series:
    """Return the anomaly score of the window around each point, of an IsolationForest of scikit-learn."""
    return _isolation(series.tobytes())


@lru_cache(maxsize=1024)
def _isolation(data: bytes) -> Series:
    from sklearn.ensemble import IsolationForest

    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data), _FOREST_WINDOW)
    forest = IsolationForest(n_estimators=_TREES, random_state=0).fit(windows)
    before = _FOREST_WINDOW // 2
    return np.pad(-forest.score_samples(windows), (before, _FOREST_WINDOW - 1 - before), "edge")


def spans_of(points: npt.NDArray[np.intp], near: int = _NEAR) -> list[Span]:
    """Return the spans of points in rising order."""
    groups = np.split(points, np.flatnonzero(np.diff(points) > near) + 1) if len(points) else []
    return [(int(group[0]), int(group[-1])) for group in groups]


class Events(NamedTuple):
    """Counts of anomalies: found, found where none is, and missed."""

    right: int
    wrong: int
    missed: int


def match(true: Sequence[Span], found: Sequence[Span]) -> Events:
    """Count events: a found span is right if it overlaps a true one that no other has been matched with."""
    left, right = sorted(true, key=lambda span: span[1]), 0
    for start, end in sorted(found, key=lambda span: span[1]):
        hit = next((span for span in left if span[0] <= end and start <= span[1]), None)
        if hit:
            left.remove(hit)
            right += 1
    return Events(right, len(found) - right, len(left))


def f1(events: Events) -> float:
    """Return the F1 of a series' events; where there is none and none was found it is 1."""
    right, wrong, missed = events
    return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 1.0


def overlap(true: Sequence[Span], found: Sequence[Span]) -> float | None:
    """Return the IoU of all true points and all found ones; None where there are neither."""
    points, others = (set().union(*(range(start, end + 1) for start, end in spans)) for spans in (true, found))
    return len(points & others) / len(points | others) if points | others else None


def schema(kinds: Sequence[str], length: int, most: int = 3) -> dict[str, object]:
    """Return the JSON Schema of an answer about a series of so many points; without kinds it names none."""
    place = {"type": "integer", "minimum": 0, "maximum": length - 1}
    span = {"type": "array", "items": place, "minItems": 2, "maxItems": 2}
    properties = {
        "anomaly": {"type": "boolean"},
        **({"kind": {"enum": list(kinds)}} if kinds else {}),
        "intervals": {"type": "array", "items": span, "maxItems": most},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def written(spans: Sequence[Span], kind: str | None = None) -> str:
    """Return the right answer; without a kind it names none."""
    named = {} if kind is None else {"kind": kind}
    return json.dumps({"anomaly": bool(spans), **named, "intervals": [list(span) for span in spans]})


def read(answer: str) -> tuple[str, list[Span]] | None:
    """Return the kind and the spans of an answer; None for one of another form, such as one that was cut short."""
    try:
        found = json.loads(answer)
        spans = [(int(min(each)), int(max(each))) for each in found["intervals"]]
        return str(found.get("kind", "")), spans if found["anomaly"] else []
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
