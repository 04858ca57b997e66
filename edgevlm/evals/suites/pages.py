"""Pages to read: drawn sheets whose text is known, in columns, with a table, as a bad scan, and under a stamp.

Right is 1 less the character error rate, of what is written without its markup: Markdown, HTML and DocTags count alike.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from edgevlm.evals.drawing import as_picture, font
from edgevlm.evals.items import Item, Suite, spread
from edgevlm.evals.texts import cell_accuracy, error_rate, plain, table
from edgevlm.families.base import RGB

_PER_KIND, _WIDTH, _HEIGHT, _MARGIN, _GUTTER = 20, 768, 1024, 56, 36
_SPOKEN = (
    "the pump valve pressure was checked and found in order before noon report shows a leak at line four operator"
    " cleaned filter then replaced seal temperature rose to limit while motor ran without load please send new parts"
    " by end of week inspection took place after repair team noted wear on bearing"
)
_WORDS = _SPOKEN.split()
_STAMP = "CHECKED"
_HEADS = ("Part", "Stock", "Price", "Shelf")


@dataclass(frozen=True)
class Page:
    """What stands on a page, and how."""

    kind: str
    title: str
    paragraphs: tuple[str, ...]
    size: int
    """Of the letters, in pixels."""
    cells: tuple[tuple[str, ...], ...] = ()

    @property
    def markdown(self) -> str:
        """The page as it should be read."""
        lines = ["| " + " | ".join(row) + " |" for row in self.cells]
        if lines:
            lines.insert(1, "|" + " --- |" * len(self.cells[0]))
        return "\n\n".join([f"# {self.title}", *self.paragraphs, *(["\n".join(lines)] if lines else [])])


class Pages(Suite):
    """Generated answers; a model with a prompt of its own for pages is asked that one."""

    name = "pages"
    asks = "reads a page"
    quick = 10
    needs_general_model = True
    asks_blind = False

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return pages of the five kinds in turn."""
        cells = [[_item(kind, seed, number, index) for index in range(_PER_KIND)] for number, kind in enumerate(_KINDS)]
        return spread(cells, count)

    def grade(self, item: Item, answer: str) -> float:
        """Return 1 less the character error rate, 0 at least."""
        return max(0.0, 1 - error_rate(plain(item.truth), _unstamped(answer)))

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the median character error rate, and how much of the tables was read into its place."""
        rates = [error_rate(plain(row["truth"]), _unstamped(row["answer"])) for row in rows]
        tables = [cell_accuracy(table(row["truth"]), table(row["answer"])) for row in rows if table(row["truth"])]
        found = {
            "character error rate, median": float(np.median(rates)),
            "pages without an error": float(np.mean(np.array(rates) == 0)),
        }
        return found | ({"table cells in place": float(np.mean(tables))} if tables else {})


def _unstamped(answer: str) -> str:
    """Return what an answer says of the page; whether it also reads the stamp does not count."""
    return plain(plain(answer).replace(_STAMP, " "))


def _item(kind: str, seed: int, number: int, index: int) -> Item:
    random = np.random.default_rng([seed, number, index])
    sizes, count = ((16, 20), 4) if kind == "columns" else ((16, 24), 2)
    paragraphs = tuple(_paragraph(random) for _ in range(count))
    cells = _cells(random) if kind == "table" else ()
    page = Page(kind, f"Report {random.integers(100, 1000)}", paragraphs, int(random.integers(*sizes)), cells)
    pictures = partial(_drawn, page, int(random.integers(2**31)))
    question = "Convert this page to Markdown."
    return Item(f"{kind}-{index}", kind, question, pictures, page.markdown, max_new_tokens=1024, task="page")


def _paragraph(random: np.random.Generator) -> str:
    sentences = []
    for _ in range(int(random.integers(2, 4))):
        words = random.choice(_WORDS, int(random.integers(6, 12))).tolist()
        words.insert(int(random.integers(1, len(words))), str(random.integers(10, 1000)))
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences)


def _cells(random: np.random.Generator) -> tuple[tuple[str, ...], ...]:
    columns, rows = int(random.integers(3, 5)), int(random.integers(3, 6))
    body = [[f"{random.integers(1000):03}" for _ in range(columns - 1)] for _ in range(rows)]
    return (_HEADS[:columns], *((f"P-{random.integers(100, 1000)}", *row) for row in body))


def _drawn(page: Page, seed: int) -> list[RGB]:
    random = np.random.default_rng(seed)
    sheet = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), page.title, fill="black", font=font(page.size + 12))
    top = _MARGIN + 2 * page.size + 24
    columns = 2 if page.kind == "columns" else 1
    width = (_WIDTH - 2 * _MARGIN - _GUTTER * (columns - 1)) / columns
    per_column = len(page.paragraphs) // columns
    bottom: float = top
    for column in range(columns):
        left, bottom = _MARGIN + column * (width + _GUTTER), top
        for paragraph in page.paragraphs[column * per_column : (column + 1) * per_column]:
            bottom = _write(draw, paragraph, (left, bottom), width, page.size) + page.size
    if page.cells:
        _rule(draw, page, bottom + 10)
    return [as_picture(_KINDS[page.kind](sheet, random))]


def _write(draw: ImageDraw.ImageDraw, text: str, at: tuple[float, float], width: float, size: int) -> float:
    """Write a paragraph; return where it ends."""
    y = at[1]
    for line in textwrap.wrap(text, int(width / (size * 0.56))):
        draw.text((at[0], y), line, fill="black", font=font(size))
        y += size * 1.4
    return y


def _rule(draw: ImageDraw.ImageDraw, page: Page, top: float) -> None:
    """Draw the table with its lines."""
    rows, columns, height = len(page.cells), len(page.cells[0]), page.size * 1.8
    width = (_WIDTH - 2 * _MARGIN) / columns
    for row in range(rows + 1):
        draw.line((_MARGIN, top + row * height, _WIDTH - _MARGIN, top + row * height), fill="black", width=2)
    for column in range(columns + 1):
        x = _MARGIN + column * width
        draw.line((x, top, x, top + rows * height), fill="black", width=2)
    for row, cells in enumerate(page.cells):
        for column, cell in enumerate(cells):
            place = (_MARGIN + (column + 0.5) * width, top + (row + 0.5) * height)
            draw.text(place, cell, fill="black", font=font(page.size), anchor="mm")


def _clean(sheet: Image.Image, random: np.random.Generator) -> Image.Image:  # noqa: ARG001
    return sheet


def _scanned(sheet: Image.Image, random: np.random.Generator) -> Image.Image:
    """Turn the sheet a little, blur it, and add noise and a grey ground."""
    angle = float(random.uniform(-2.5, 2.5))
    turned = sheet.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white").filter(ImageFilter.GaussianBlur(0.7))
    noise = random.normal(-14, 9, (_HEIGHT, _WIDTH, 1))
    return Image.fromarray(np.clip(np.asarray(turned, np.float32) + noise, 0, 255).astype(np.uint8))


def _stamped(sheet: Image.Image, random: np.random.Generator) -> Image.Image:
    """Stamp the sheet over its text, translucently."""
    stamp = Image.new("RGBA", (260, 110), (0, 0, 0, 0))
    draw, red = ImageDraw.Draw(stamp), (200, 20, 30, 110)
    draw.rounded_rectangle((4, 4, 255, 105), 12, outline=red, width=6)
    draw.text((130, 55), _STAMP, fill=red, font=font(48), anchor="mm")
    stamp = stamp.rotate(float(random.uniform(-25, 25)), Image.Resampling.BICUBIC, expand=True)
    place = (int(random.integers(_MARGIN, _WIDTH - stamp.width)), int(random.integers(140, 320)))
    sheet.paste(stamp, place, stamp)
    return sheet


_KINDS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "plain": _clean,
    "columns": _clean,
    "table": _clean,
    "scan": _scanned,
    "stamp": _stamped,
}
