"""What a page in Markdown or plain text holds besides: tables in OTSL, and lines of text with the places they stand at.

PaddleOCR-VL writes both: `<fcel>gauge<fcel>bar<nl>` is a row of a table, and a line that it has spotted is followed by
its four corners, `<|LOC_12|>` and seven more, on a page of 1000 by 1000.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docling_core.types.doc.items.table.table_data import TableCell, TableData

_CELL = r"<(?:[eflux]cel|[cr]hed|srow)>"
_ROW = rf"{_CELL}(?:(?!<nl>|\n\s*\n).)*"
_TABLE = re.compile(
    rf"(?:<otsl>\s*)?(?P<rows>{_ROW}(?:<nl>\s*{_ROW})*(?:<nl>|(?=\n\s*\n)|\Z))(?:\s*</otsl>)?", re.DOTALL
)
"""Rows, up to a `<nl>` that no cell follows; a last one that has none ends with its paragraph."""
_MERGED = ("<lcel>", "<ucel>", "<xcel>")
"""Parts of the cell at the left, above, and both."""
_PLACE = re.compile(r"<\|LOC_(\d+)\|>")
_PLACED = re.compile(r"(.*?)((?:<\|LOC_\d+\|>\s*)+|\Z)", re.DOTALL)
_MARKS = re.compile(r"<\|(?:TEXT|LOC)_(?:START|BEGIN|SEP|END)\|>")
_CORNERS, _GRID = 4, 1000


@dataclass(frozen=True)
class Line:
    """A line of text on a page."""

    text: str
    polygon: tuple[tuple[int, int], ...]
    """x and y of its corners in pixels; none where the answer did not get so far."""


def has_places(text: str) -> bool:
    """Tell whether a page's answer says where its lines stand."""
    return bool(_PLACE.search(text))


def read_lines(text: str, size: tuple[int, int]) -> list[Line]:
    """Return the lines of a page of `size`, width and height in pixels."""
    lines = []
    for words, places in _PLACED.findall(_MARKS.sub("", text)):
        numbers = [int(each) for each in _PLACE.findall(places)]
        sides = [round(number / _GRID * size[n % 2]) for n, number in enumerate(numbers[: 2 * _CORNERS])]
        whole = len(sides) == 2 * _CORNERS
        if words.strip():
            lines.append(Line(words.strip(), tuple(zip(sides[::2], sides[1::2], strict=True)) if whole else ()))
    return lines


def split_tables(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a page in order, without the white space around them: each, and whether it is OTSL."""
    end = 0
    for found in _TABLE.finditer(text):
        if before := text[end : found.start()].strip():
            yield before, False
        yield found["rows"], True
        end = found.end()
    if rest := text[end:].strip():
        yield rest, False


def read_otsl(text: str) -> TableData:
    """Return a table in OTSL; no word is lost: a part of a merged cell that has some becomes a cell of its own."""
    from docling_core.types.doc.items.table.table_data import TableData

    rows = [_read_row(row) for row in text.split("<nl>") if row.strip()]
    columns = max(map(len, rows))
    grid = [[*row, *[("<ecel>", "")] * (columns - len(row))] for row in rows]
    return TableData(table_cells=list(_read_cells(grid)), num_rows=len(grid), num_cols=columns)


def _read_row(text: str) -> list[tuple[str, str]]:
    """Return the tags of a row's cells, and their words."""
    _, *parts = re.split(f"({_CELL})", text)
    cells = [(tag, words.strip()) for tag, words in zip(parts[::2], parts[1::2], strict=True)]
    return [("<fcel>" if tag in _MERGED and words else tag, words) for tag, words in cells]


def _read_cells(grid: list[list[tuple[str, str]]]) -> Iterator[TableCell]:
    from docling_core.types.doc.items.table.table_data import TableCell

    covered: set[tuple[int, int]] = set()
    for top, row in enumerate(grid):
        for left, (tag, words) in enumerate(row):
            if (top, left) in covered:
                continue
            right, bottom = left + 1, top + 1
            while right < len(row) and row[right][0] == "<lcel>" and (top, right) not in covered:
                right += 1
            while bottom < len(grid) and _goes_on(grid[bottom][left:right]):
                bottom += 1
            covered |= {(line, column) for line in range(top, bottom) for column in range(left, right)}
            yield TableCell(
                text=words,
                start_row_offset_idx=top,
                end_row_offset_idx=bottom,
                start_col_offset_idx=left,
                end_col_offset_idx=right,
                row_span=bottom - top,
                col_span=right - left,
                column_header=tag == "<ched>",
                row_header=tag == "<rhed>",
                row_section=tag == "<srow>",
            )


def _goes_on(cells: list[tuple[str, str]]) -> bool:
    """Tell whether these cells are part of the one above them."""
    return cells[0][0] == "<ucel>" and all(tag in _MERGED for tag, _ in cells)
