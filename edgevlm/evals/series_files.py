"""Labelled series of the user's own files: text named as in the UCR archive, and CSV with a column `Label` (TSB-AD)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgevlm.errors import OptionError
from edgevlm.evals.series import WINDOW, Series, Span, spans_of

_PIECE, _FEWEST = 1000, 2 * WINDOW
_UCR = re.compile(r".*_(\d+)_(\d+)_(\d+)\.txt", re.IGNORECASE)
_TIMES = ("time", "timestamp", "date", "datetime", "index")
_NEEDED = "CSV with a column Label of 0 and 1, or text named as in the UCR archive, NAME_TRAINED_FROM_TO.txt"


@dataclass(frozen=True)
class Labelled:
    """A series, or a piece of one."""

    file: str
    start: int
    """Its first point in the file."""
    values: Series
    spans: tuple[Span, ...]
    """Its anomalies, counted from its own first point."""


def read_series(path: Path) -> list[Labelled]:
    """Return the series of a file, or of each of a folder's. Raises `OptionError`."""
    if not path.exists():
        raise OptionError(f"{path} does not exist; --data takes a folder of series: {_NEEDED}")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    series = [_read(file) for file in files if file.suffix.lower() in (".csv", ".txt")]
    if not series:
        raise OptionError(f"{path} holds no series: {_NEEDED}")
    return series


def pieces(series: Labelled) -> Iterator[Labelled]:
    """Yield a series in pieces of nearly the same length, short enough to be plotted."""
    bounds = np.linspace(0, len(series.values), -(-len(series.values) // _PIECE) + 1).astype(int).tolist()
    for start, stop in pairwise(bounds):
        inside = [(max(one, start), min(other, stop - 1)) for one, other in series.spans]
        spans = tuple((one - start, other - start) for one, other in inside if one <= other)
        yield Labelled(series.file, start, series.values[start:stop], spans)


def _read(path: Path) -> Labelled:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    values, spans = _ucr(path, text) if path.suffix.lower() == ".txt" else _csv(path, text)
    if len(values) < _FEWEST:
        raise OptionError(f"{path} has {len(values)} points; a series needs {_FEWEST} at least")
    return Labelled(path.name, 0, values, tuple(spans))


def _ucr(path: Path, text: str) -> tuple[Series, list[Span]]:
    """Return numbers between white space; the anomaly stands in the name, its points counted from 1."""
    if not (named := _UCR.fullmatch(path.name)):
        raise OptionError(f"{path}: the name of a text does not say where its anomaly is; --data takes {_NEEDED}")
    values = np.array([_number(word, f"{path} value {place}") for place, word in enumerate(text.split(), 1)])
    start, end = int(named[2]), int(named[3])
    if not 1 <= start <= end <= len(values):
        raise OptionError(f"{path}: its name says points {start} to {end}, but it has {len(values)}")
    return values, [(start - 1, end - 1)]


def _csv(path: Path, text: str) -> tuple[Series, list[Span]]:
    """Return the one column of values, and the spans where `Label` is 1."""
    heading = text.partition("\n")[0]
    rows = list(csv.reader(text.splitlines(), delimiter=max(",;\t", key=heading.count)))
    names = [name.strip() for name in rows[0]] if rows else []
    labels = [place for place, name in enumerate(names) if name.lower() == "label"]
    values = [place for place, name in enumerate(names) if name.lower() not in ("label", *_TIMES)]
    if len(labels) != 1:
        raise OptionError(f"{path} has no column Label, or several; it has {', '.join(names) or 'no columns'}")
    if len(values) != 1:
        told = ", ".join(names[place] for place in values) or "none"
        raise OptionError(f"{path}: one column of values can be plotted, but it has {told}")
    return _columns(path, rows, values[0], labels[0])


def _columns(path: Path, rows: Sequence[Sequence[str]], value: int, label: int) -> tuple[Series, list[Span]]:
    found, marked = [], []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(rows[0]):
            raise OptionError(f"{path} line {number} has {len(row)} columns, but its heading {len(rows[0])}")
        found.append(_number(row[value], f"{path} line {number}"))
        marked.append(_number(row[label], f"{path} line {number}, Label"))
    if wrong := sorted(set(marked) - {0, 1}):
        raise OptionError(f"{path}: Label must be 0 or 1, not {wrong[0]:g}")
    return np.array(found), spans_of(np.flatnonzero(marked), near=1)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise OptionError(f"{where}: {text.strip()[:40]!r} is no number; leave such rows out, or fill them in")
    return value
