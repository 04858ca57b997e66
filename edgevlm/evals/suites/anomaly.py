"""Anomalies in plotted series: is there one, of which kind, and where? Beside two detectors that read the numbers.

A series with an anomaly and its clean twin share signal and noise. VisAnomReasoner (https://arxiv.org/abs/2605.30344)
found a classical detector above every untuned model, so no figure of a model stands here without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from edgevlm.errors import OptionError
from edgevlm.evals.drawing import as_picture, font
from edgevlm.evals.items import Item, Suite, spread
from edgevlm.evals.series import Series, Span, f1, match, read, schema, spans_of, written
from edgevlm.evals.series_figures import F1, Z_SCORE, detectors, events, kinds, ranks, told_apart, true_answer
from edgevlm.evals.series_files import Labelled, pieces, read_series
from edgevlm.evals.statistics import Estimate, Interval
from edgevlm.families.base import RGB

POINTS = 240
_PER_CELL, _SIZE, _MARGIN = 40, 512, 56
_NOISE, _ANSWER = 0.08, 128
_DETECT = "This is a measured signal over time. Is there an anomaly in it?"
_LOCATE = (
    "This is a measured signal over time; the horizontal axis counts its points. Is there an anomaly in it? Answer in"
    " JSON: whether there is one, {kind}and each one's interval, from its first point to its last."
)
_PLACE, _NONE = "where it is", "none"
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


def true_spans(seed: Sequence[int], kind: str | None) -> list[Span]:
    """Return where a series differs from its clean twin: from its first other point to its last."""
    changed = np.flatnonzero(make_series(seed, None) != make_series(seed, kind))
    return spans_of(changed, near=POINTS)


class Anomaly(Suite):
    """Yes or no about twins, the kind out of five, and where it is in JSON; or yes or no and where, of own series."""

    name = "anomaly"
    version = 2
    asks = "finds what is odd in a plotted series"
    takes_data = True

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return twins of each carrier in turn, questions for the kind, and for the place; or those of `data`."""
        if self.data:
            return spread(self._own_items(seed), count)
        per_carrier: list[list[Item]] = [[] for _ in CARRIERS]
        for index in range(_PER_CELL * len(CARRIERS)):
            per_carrier[index % len(CARRIERS)] += _twins([seed, index])
        classified = [_kind_of([seed, 1, index]) for index in range(_PER_CELL * len(CARRIERS))]
        places = [item for index in range(_PER_CELL * len(CARRIERS) // 2) for item in _places([seed, 2, index])]
        return spread([*per_carrier, classified, places], count)

    def _own_items(self, seed: int) -> list[list[Item]]:
        """Return a question whether and one where for each piece with an anomaly, and for as many without."""
        order = np.random.default_rng(seed).permutation(list(self._pieces)).tolist()
        odd = [piece for name in order if (piece := self._pieces[name]).spans]
        clean = [piece for name in order if not (piece := self._pieces[name]).spans]
        if not odd:
            raise OptionError(f"{self.data}: none of its series has an anomaly, so that there is nothing to find")
        chosen = [piece for pair in zip_longest(odd, clean[: len(odd)]) for piece in pair if piece]
        alone = len({piece.file for piece in chosen}) == 1  # then its pieces are all that can be resampled
        return [
            [make(piece, _name(piece) if alone else piece.file) for piece in chosen]
            for make in (_own_detection, _own_place)
        ]

    @cached_property
    def _pieces(self) -> dict[str, Labelled]:
        """The user's series in pieces, by their names: read once, however often the items are asked for."""
        assert self.data
        return {_name(piece): piece for series in read_series(self.data) for piece in pieces(series)}

    def grade(self, item: Item, answer: str) -> float:
        """Return the F1 of the events; 0 for what cannot be read."""
        said = read(answer)
        return f1(match(true_answer(item.truth), said[1])) if said else 0.0

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return how well clean and not are ranked, and events found: by the model, and by two detectors."""
        return {name: each.value for name, each in self._estimates(rows).items()}

    def intervals(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
        """Return those of all figures; twins, and pieces of a file, are resampled together."""
        return {name: each.interval for name, each in self._estimates(rows).items()}

    def _estimates(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
        asked = [row for row in rows if row["options"] == ["yes", "no"]]
        placed = [row for row in rows if row["cell"] == _PLACE]
        said = [read(row["answer"]) or ("", []) for row in placed]
        found = ranks(asked, "AUROC", [row["scores"]["yes"] for row in asked]) | told_apart(asked)
        found |= events(placed, "", [spans for _, spans in said]) | kinds(placed, [kind for kind, _ in said])
        for detector in detectors():
            scores = [detector.score(self._series(row)) for row in asked]
            spans = [detector.spans(self._series(row)) for row in placed]
            found |= ranks(asked, f"AUROC of {detector.name}", [float(each.max()) for each in scores])
            found |= events(placed, f" of {detector.name}", spans)
        return found

    def _series(self, row: Mapping[str, Any]) -> Series:
        facts = row["facts"]
        return self._pieces[facts["piece"]].values if self.data else make_series(facts["seed"], facts["kind"])

    def remark(self, figures: Mapping[str, float]) -> str:
        """Say so where ten lines of NumPy do better."""
        said = ""
        for name in ("AUROC", F1):
            mine, other = figures.get(name, 1.0), figures.get(f"{name} of {Z_SCORE}", 0.0)
            if mine < other:
                said += f"; a rolling z-score of the numbers finds more ({name} {other:.2f}, {mine:.2f})"
        return said


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


def _places(seed: Sequence[int]) -> list[Item]:
    kind = tuple(KINDS)[seed[-1] // len(CARRIERS) % len(KINDS)]
    return [
        Item(
            f"place-{seed[-1]}-{injected or 'clean'}",
            _PLACE,
            _LOCATE.format(kind="its kind, "),
            partial(_plot, seed, injected),
            written(true_spans(seed, injected), injected or _NONE),
            family=f"place-{seed[-1]}",
            variant=injected or "clean",
            max_new_tokens=_ANSWER,
            schema=schema([*KINDS, _NONE], POINTS),
            facts={"seed": list(seed), "kind": injected},
        )
        for injected in (kind, None)
    ]


def _name(piece: Labelled) -> str:
    return f"{piece.file}-{piece.start}"


def _own_detection(piece: Labelled, family: str) -> Item:
    truth, pictures = "yes" if piece.spans else "no", partial(_plotted, piece.values)
    facts = {"piece": _name(piece)}
    return Item(
        f"{_name(piece)}-is", "is there one", _DETECT, pictures, truth, ("yes", "no"), family=family, facts=facts
    )


def _own_place(piece: Labelled, family: str) -> Item:
    return Item(
        f"{_name(piece)}-where",
        _PLACE,
        _LOCATE.format(kind=""),
        partial(_plotted, piece.values),
        written(piece.spans),
        family=family,
        max_new_tokens=_ANSWER,
        schema=schema((), len(piece.values)),
        facts={"piece": _name(piece)},
    )


def _plot(seed: Sequence[int], kind: str | None) -> list[RGB]:
    return _plotted(make_series(seed, kind))


def _plotted(series: Series) -> list[RGB]:
    """Draw a thick line and few labels, for a small model sees little of more."""
    sheet = Image.new("RGB", (_SIZE, _SIZE), "white")
    draw, plot = ImageDraw.Draw(sheet), _SIZE - 1.5 * _MARGIN
    low, high = _bounds(series)

    def height(value: float) -> float:
        return float(_MARGIN / 2 + plot * (high - value) / (high - low))

    for tick in np.linspace(low, high, 5).tolist():
        draw.line((_MARGIN, height(tick), _SIZE - _MARGIN / 2, height(tick)), fill="#dddddd")
        draw.text((_MARGIN - 6, height(tick)), f"{tick:.3g}", fill="black", font=font(16), anchor="rm")
    for tick in np.linspace(0, len(series), 5).astype(int).tolist():
        place = (_MARGIN + plot * tick / len(series), height(low) + 14)
        draw.text(place, str(tick), fill="black", font=font(16), anchor="mm")
    draw.line((_MARGIN, height(high), _MARGIN, height(low), _SIZE - _MARGIN / 2, height(low)), fill="black", width=2)
    points = [(_MARGIN + plot * index / len(series), height(value)) for index, value in enumerate(series.tolist())]
    draw.line(points, fill="black", width=3, joint="curve")
    return [as_picture(sheet)]


def _bounds(series: Series) -> tuple[float, float]:
    """Return the ends of the vertical axis: whole numbers, or other steps where these are too large or too small."""
    low, high = float(series.min()), float(series.max())
    if high == low:
        return low - 1, high + 1
    step = 1.0 if 1 <= high - low < 20 else 10.0 ** np.floor(np.log10(high - low))
    return float(np.floor(low / step) * step), float(np.ceil(high / step) * step)
