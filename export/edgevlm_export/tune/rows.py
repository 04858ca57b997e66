"""Labelled pictures: rows of a JSON Lines or a CSV file, checked, and a fifth of the pictures kept apart."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from PIL import Image

from edgevlm.errors import ImageError, TuningError
from edgevlm.inputs.image import Crop, Picture, load_picture
from edgevlm.jobs.spec import Row as BatchRow
from edgevlm.strict_json import read_json, write_json
from edgevlm_export.tune.scores import is_right

FEWEST_PICTURES = 10
HELD_OUT = 0.2
"""Share of the pictures that are kept apart."""
TWINS = 1.5
"""Mean difference, of 255 levels, below which two thumbnails are of one scene: frames of a camera that stands still."""
_THUMBNAIL = 48


class Row(BatchRow, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of a row: those of a row of `edgevlm batch`, the right answer, and how far a number may be off."""

    image: str
    answer: str | int | float | bool | dict[str, Any] | list[Any]
    tolerance: float = 0.0


@dataclass(frozen=True, eq=False)
class Example:
    """A picture, a question about it and the right answer."""

    picture: Picture
    """What the model sees of it: the crop, where the row has one."""
    path: Path
    question: str
    answer: str
    tolerance: float = 0.0
    where: str = ""
    """The row's file and line, for errors."""
    is_cropped: bool = False

    def is_right(self, answer: str) -> bool:
        """Tell whether `answer` is the text asked for, its numbers within the tolerance."""
        return is_right(answer, self.answer, self.tolerance or None)


def read_examples(source: Path, question: str | None = None) -> list[Example]:
    """Return the examples of `source`, a .jsonl or .csv file, or a folder that holds `rows.jsonl` or `labels.csv`.

    Raises `TuningError`, which names the first line that cannot be used.
    """
    if source.is_dir():
        found = [source / name for name in ("rows.jsonl", "labels.csv") if (source / name).is_file()]
        if not found:
            raise TuningError(f"{source} holds no rows.jsonl and no labels.csv with the right answers")
        source = found[0]
    pictures: dict[tuple[Path, Crop | UnsetType], Picture] = {}
    examples = []
    for line, fields in _lines(source):
        where = f"{source}, line {line}"
        row = _row(fields, where)
        asked = question if row.question is UNSET else row.question
        if not asked:
            raise TuningError(f'{where}: no "question", and --question gives none')
        path = source.parent / row.image
        try:
            seen = path, row.crop
            picture = pictures.get(seen) or pictures.setdefault(seen, _picture(path, row.crop))
        except ImageError as error:
            raise TuningError(f"{where}: {error}") from None
        is_cropped = row.crop is not UNSET
        examples.append(Example(picture, path, asked, _written(row.answer), row.tolerance, where, is_cropped))
    _check(examples, source)
    return examples


def _picture(path: Path, crop: Crop | UnsetType) -> Picture:
    """Return a file's picture, or the part of it that the row's box tells. Raises `ImageError`."""
    picture = load_picture(path)
    return picture if crop is UNSET else picture.cropped(crop)


def _lines(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TuningError(f"no such file of rows: {source}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(f"cannot read {source}: {getattr(error, 'strerror', None) or 'not text in UTF-8'}") from None
    if source.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for fields in reader:
                given: dict[str, Any] = {name: value for name, value in fields.items() if value not in (None, "")}
                if "crop" in given:
                    given["crop"] = given["crop"].strip("[] ").replace(",", " ").split()
                yield reader.line_num, given
        except csv.Error as error:
            raise TuningError(f"{source}, line {reader.line_num}: {error}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, read_json(line)
        except ValueError as error:
            raise TuningError(f"{source}, line {number}: not JSON that can be read: {error}") from None


def _row(fields: Mapping[str, Any], where: str) -> Row:
    try:
        row = msgspec.convert(fields, Row, strict=False)
    except msgspec.ValidationError as error:
        raise TuningError(f"{where}: {error}; a row has an image, a question and an answer") from None
    if not math.isfinite(row.tolerance) or row.tolerance < 0:
        raise TuningError(f"{where}: the tolerance must be 0 or more")
    return row


def _written(answer: Any) -> str:
    """Return the answer as the model is to write it."""
    text = answer if isinstance(answer, str) else write_json(answer)
    return text.strip()


def _check(examples: Sequence[Example], source: Path) -> None:
    """Raise `TuningError` for rows from which nothing can be learned."""
    pictures = {each.picture.digest for each in examples}
    if len(pictures) < FEWEST_PICTURES:
        raise TuningError(
            f"{source} has {len(pictures)} pictures; tuning needs {FEWEST_PICTURES}, and is good from 50 on"
        )
    if len({each.answer for each in examples}) < 2:
        raise TuningError(f"{source} has one answer alone, {examples[0].answer!r}; give rows with others, too")
    known: dict[tuple[bytes, str], Example] = {}
    for each in examples:
        if not each.answer:
            raise TuningError(f"{each.where}: the answer is empty")
        other = known.setdefault((each.picture.digest, each.question), each)
        if other.answer != each.answer:
            raise TuningError(
                f"{each.where} says {each.answer!r} where {other.where} says {other.answer!r} of the same picture"
            )


def split(examples: Sequence[Example], seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Return the examples to learn from and those kept apart: a fifth of the pictures, near-twins on one side.

    Raises `TuningError` where all are near-twins, since none could be kept apart.
    """
    groups = _twins(examples)
    if len(groups) < 2:
        raise TuningError('all pictures are nearly the same; give pictures that differ, or a "crop" of what differs')
    order = np.random.default_rng(seed).permutation(len(groups))
    wanted = max(2, round(HELD_OUT * sum(map(len, groups))))
    held: list[Example] = []
    kept: list[Example] = []
    for index in order:
        is_held = len(held) < wanted and len(held) + len(groups[index]) <= len(examples) / 2
        (held if is_held else kept).extend(groups[index])
    return kept, held


def _twins(examples: Sequence[Example]) -> list[list[Example]]:
    """Return the examples in groups: those of one file, or of pictures that hardly differ, together."""
    small = np.stack([_thumbnail(each.picture) for each in examples])
    group = list(range(len(examples)))
    for index in range(1, len(examples)):
        near = np.flatnonzero(np.abs(small[:index] - small[index]).mean(1) < TWINS)
        if len(near):
            group[index] = group[int(near[0])]
    first: dict[Path, int] = {}
    for index, each in enumerate(examples):
        one, other = group[first.setdefault(each.path, index)], group[index]
        if one != other:  # two crops of one file
            group = [one if of == other else of for of in group]
    return [[examples[i] for i, of in enumerate(group) if of == one] for one in sorted(set(group))]


def _thumbnail(picture: Picture) -> np.ndarray:
    small = Image.fromarray(picture.pixels).convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1)
