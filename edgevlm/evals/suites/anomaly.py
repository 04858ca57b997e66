"""Anomalies in plotted series: is there one, and of which kind? Beside two detectors that read the numbers themselves.

A series with an anomaly and its clean twin share signal and noise. VisAnomReasoner (https://arxiv.org/abs/2605.30344)
found a classical detector above every untuned model, so no figure of a model stands here without one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from edgevlm.evals.drawing import as_picture, font
from edgevlm.evals.items import Item, Suite, spread
from edgevlm.evals.statistics import auroc
from edgevlm.families.base import RGB

Series: TypeAlias = npt.NDArray[np.float64]
POINTS = 240
_PER_CELL, _SIZE, _MARGIN = 40, 512, 56
_NOISE, _WINDOW, _TREES = 0.08, 24, 30
_DETECT = "This is a measured signal over time. Is there an anomaly in it?"
_CLASSIFY = "This is a measured signal over time, with one anomaly. Of which kind is it?"


def _wave(random: np.random.Generator) -> Series:
    return np.asarray(np.sin(np.arange(POINTS) * 2 * np.pi / random.uniform(24, 48) + random.uniform(0, 6)))


def _trend(random: np.random.Generator) -> Series:
    return np.asarray(np.linspace(-1, 1, POINTS) * random.uniform(0.5, 1.5) * random.choice([-1, 1]))


def _walk(random: np.random.Generator) -> Series:
    return np.asarray(np.cumsum(random.normal(0, 0.08, POINTS)))


CARRIERS: dict[str, Callable[[np.random.Generator], Series]] = {"wave": _wave, "trend": _trend, "walk": _walk}


def _spike(series: Series, at: int) -> Series:
    series[at : at + 4] += 2.5
    return series


def _dip(series: Series, at: int) -> Series:
    series[at : at + 4] -= 2.5
    return series


def _shift(series: Series, at: int) -> Series:
    series[at:] += 2
    return series


def _flat(series: Series, at: int) -> Series:
    series[at : at + 50] = series[at]
    return series


def _burst(series: Series, at: int) -> Series:
    series[at : at + 40] += np.where(np.arange(40) % 2, 0.9, -0.9)
    return series


KINDS: dict[str, Callable[[Series, int], Series]] = {
    "a spike up": _spike,
    "a dip down": _dip,
    "a lasting shift of level": _shift,
    "a flat line": _flat,
    "a burst of noise": _burst,
}


def make_series(seed: Sequence[int], kind: str | None) -> Series:
    """Return a series with an anomaly of that kind, or without: all else is the same for a seed."""
    random = np.random.default_rng(list(seed))
    carrier = tuple(CARRIERS)[seed[-1] % len(CARRIERS)]
    series = CARRIERS[carrier](random) + random.normal(0, _NOISE, POINTS)
    at = int(random.integers(60, 170))
    return KINDS[kind](series.copy(), at) if kind else series


class Anomaly(Suite):
    """Yes or no about twins, and the kind out of five."""

    name = "anomaly"
    asks = "finds what is odd in a plotted series"

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return twins of each carrier in turn, and questions for the kind; baselines see the same series."""
        per_carrier: list[list[Item]] = [[] for _ in CARRIERS]
        for index in range(_PER_CELL * len(CARRIERS)):
            per_carrier[index % len(CARRIERS)] += _twins([seed, index])
        kinds = [_kind_of([seed, 1, index]) for index in range(_PER_CELL * len(CARRIERS))]
        return spread([*per_carrier, kinds], count)

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return how well clean and not are ranked: by the model's probability of yes, and by two detectors."""
        asked = [row for row in rows if row["options"] == ["yes", "no"]]
        twins: dict[str, dict[str, float]] = defaultdict(dict)
        for row in asked:
            twins[row["family"]][row["truth"]] = row["scores"]["yes"]
        told = [np.sign(each["yes"] - each["no"]) / 2 + 0.5 for each in twins.values() if len(each) == 2]
        if not told:
            return {}
        found = {"AUROC": _ranked(asked, lambda row: float(row["scores"]["yes"])), "twins told apart": np.mean(told)}
        for name, detector in {_Z_SCORE: rolling_z, "AUROC of IsolationForest": isolation}.items():
            values = _ranked(asked, lambda row, of=detector: of(_series_of(row)))  # type: ignore[misc]
            found |= {name: values} if np.isfinite(values) else {}
        return {name: float(value) for name, value in found.items()}

    def remark(self, figures: Mapping[str, float]) -> str:
        """Say so where ten lines of NumPy do better."""
        if not figures or figures["AUROC"] >= figures[_Z_SCORE]:
            return ""
        return f"; a rolling z-score of the numbers finds more (AUROC {figures[_Z_SCORE]:.2f}, {figures['AUROC']:.2f})"


_Z_SCORE = "AUROC of a rolling z-score"


def rolling_z(series: Series) -> float:
    """Return the largest distance of a point from the window before it, in that window's standard deviations."""
    windows = np.lib.stride_tricks.sliding_window_view(series, _WINDOW)[:-1]
    return float(np.max(np.abs(series[_WINDOW:] - windows.mean(-1)) / (windows.std(-1) + 1e-9)))


def isolation(series: Series) -> float:
    """Return the highest anomaly score of a window of points; not a number without scikit-learn."""
    try:
        from sklearn.ensemble import IsolationForest
    except ImportError:
        return float("nan")
    windows = np.lib.stride_tricks.sliding_window_view(series, 8)
    forest = IsolationForest(n_estimators=_TREES, random_state=0).fit(windows)
    return float(-forest.score_samples(windows).min())


def _ranked(rows: Sequence[Mapping[str, Any]], score: Callable[[Mapping[str, Any]], float]) -> float:
    scores: dict[str, list[float]] = {"yes": [], "no": []}
    for row in rows:
        scores[row["truth"]].append(score(row))
    return auroc(scores["yes"], scores["no"])


def _series_of(row: Mapping[str, Any]) -> Series:
    return make_series(row["facts"]["seed"], row["facts"]["kind"])


def _twins(seed: Sequence[int]) -> list[Item]:
    carrier, kind = tuple(CARRIERS)[seed[-1] % len(CARRIERS)], tuple(KINDS)[seed[-1] // len(CARRIERS) % len(KINDS)]
    family = f"{carrier}-{seed[-1]}"
    return [
        Item(
            f"{family}-{truth}",
            f"{carrier}, is there one",
            _DETECT,
            partial(_plot, seed, injected),
            truth,
            ("yes", "no"),
            family=family,
            variant=injected or "clean",
            facts={"seed": list(seed), "kind": injected},
        )
        for truth, injected in (("yes", kind), ("no", None))
    ]


def _kind_of(seed: Sequence[int]) -> Item:
    random = np.random.default_rng(list(seed))
    kind = tuple(KINDS)[int(random.integers(len(KINDS)))]
    options = tuple(random.permutation(list(KINDS)).tolist())
    name, facts = f"kind-{seed[-1]}", {"seed": list(seed), "kind": kind}
    return Item(name, "which kind", _CLASSIFY, partial(_plot, seed, kind), kind, options, True, facts=facts)


def _plot(seed: Sequence[int], kind: str | None) -> list[RGB]:
    """Draw a thick line and few labels, for a small model sees little of more."""
    series = make_series(seed, kind)
    sheet = Image.new("RGB", (_SIZE, _SIZE), "white")
    draw, plot = ImageDraw.Draw(sheet), _SIZE - 1.5 * _MARGIN
    low, high = np.floor(series.min()), np.ceil(series.max())

    def height(value: float) -> float:
        return float(_MARGIN / 2 + plot * (high - value) / (high - low))

    for tick in np.linspace(low, high, 5).tolist():
        draw.line((_MARGIN, height(tick), _SIZE - _MARGIN / 2, height(tick)), fill="#dddddd")
        draw.text((_MARGIN - 6, height(tick)), f"{tick:.3g}", fill="black", font=font(16), anchor="rm")
    for tick in range(0, POINTS + 1, 60):
        place = (_MARGIN + plot * tick / POINTS, height(low) + 14)
        draw.text(place, str(tick), fill="black", font=font(16), anchor="mm")
    draw.line((_MARGIN, height(high), _MARGIN, height(low), _SIZE - _MARGIN / 2, height(low)), fill="black", width=2)
    points = [(_MARGIN + plot * index / POINTS, height(value)) for index, value in enumerate(series.tolist())]
    draw.line(points, fill="black", width=3, joint="curve")
    return [as_picture(sheet)]
