"""Any multiple-choice set in VLMEvalKit's TSV form: `index`, `image` in base64, `question`, `A` to `Z`, `answer`."""

from __future__ import annotations

import base64
import csv
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from edgevlm.errors import ImageError, OptionError
from edgevlm.evals.items import LETTERS, Item, Suite
from edgevlm.families.base import RGB
from edgevlm.inputs.image import ImageFile, load_image

_REFERENCE = 64
"""An `image` shorter than that is the `index` of the row that has the picture, as in VLMEvalKit."""


class MultipleChoice(Suite):
    """Items of the user's own file."""

    name = "mcq"
    asks = "answers the questions of this file"
    takes_data = True
    form = "VLMEvalKit's TSV"

    def __init__(self, data: Path | None = None) -> None:
        if data is None:
            raise OptionError(f"the suite {self.name} needs --data: {self.form}")
        super().__init__(data)

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return the file's items in an order of the seed. Raises `OptionError`."""
        rows = self._rows
        pictures = {row["index"]: row["image"] for row in rows}
        order = np.random.default_rng(seed).permutation(len(rows))
        return [self._item(rows[index], pictures) for index in order[:count]]

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        """The file's rows, which hold its pictures: read once, however often the items are asked for."""
        assert self.data
        return read_tsv(self.data)

    def lettered(self, question: str, options: Sequence[str]) -> str:
        """Return the prompt as VLMEvalKit writes it."""
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        return "\n".join([question, "Options:", listed, "Please select the correct answer from the options above."])

    def _item(self, row: Mapping[str, str], pictures: Mapping[str, str]) -> Item:
        where = f"{self.data} row {row['index']}"
        options = tuple(text for letter in LETTERS if (text := (row.get(letter) or "").strip()))
        answer = row["answer"].strip()
        truth = (row.get(answer) or "").strip() if answer in LETTERS else ""
        if len(options) < 2 or len(set(options)) < len(options):
            raise OptionError(f"{where}: there must be two options or more, and no two alike")
        if not truth:
            raise OptionError(f"{where}: the answer {answer!r} is none of its options' letters")
        hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
        question = f"{hint}Question: {row['question']}"
        image = pictures.get(row["image"], row["image"]) if len(row["image"]) < _REFERENCE else row["image"]
        cell = row.get("category") or "all"
        return Item(row["index"], cell, question, partial(_decoded, image, where), truth, options, is_lettered=True)


def read_tsv(path: Path, needed: Sequence[str] = ("index", "image", "question", "answer")) -> list[dict[str, str]]:
    """Return the rows of a file of tab-separated values. Raises `OptionError`."""
    limit = csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [
                {name: value or "" for name, value in row.items() if name}
                for row in csv.DictReader(file, delimiter="\t")
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OptionError(f"{path} cannot be read as a TSV: {getattr(error, 'strerror', None) or error}") from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise OptionError(f"{path} has no rows")
    if missing := [name for name in needed if name not in rows[0]]:
        raise OptionError(f"{path} has no column {missing[0]!r}; it has {', '.join(rows[0])}")
    if len({row["index"] for row in rows}) < len(rows):
        raise OptionError(f"{path} has two rows with the same index")
    return rows


def _decoded(image: str, where: str) -> list[RGB]:
    try:
        data = base64.b64decode(image, validate=False)
        return [load_image(ImageFile(data, where))]
    except (ValueError, ImageError) as error:
        raise OptionError(f"{where}: its image cannot be decoded: {error}") from None
