"""What a page says, whichever markup tells it: Markdown, HTML or DocTags."""

from __future__ import annotations

import html
import re

import numpy as np

_LOCATION, _TAG = re.compile(r"<loc_\d+>"), re.compile(r"<[^<>]+>")
_OTSL, _OTSL_CELL = re.compile(r"<otsl>(.*?)(?:</otsl>|$)", re.DOTALL), re.compile(r"<(?:[fe]cel|[cr]hed|srow)>([^<]*)")
_HTML_TABLE, _HTML_ROW = re.compile(r"<table.*?(?:</table>|$)", re.DOTALL), re.compile(r"<tr.*?(?=<tr|$)", re.DOTALL)
_HTML_CELL = re.compile(r"<t[hd][^>]*>(.*?)(?=<t[hdr]|</t[hdr]|</table|$)", re.DOTALL)
_RULE = re.compile(r"^\s*\|?[\s:|-]*-[\s:|-]*\|?\s*$", re.MULTILINE)
_MARKUP = re.compile(r"^\s*#{1,6}\s|^```\w*$|[|*`]|\\(?=[^\w\s])", re.MULTILINE)
Table = list[list[str]]


def plain(text: str) -> str:
    """Return what is written, without markup, its words separated by single spaces."""
    bare = html.unescape(_TAG.sub(" ", _LOCATION.sub(" ", text)))
    return " ".join(_MARKUP.sub(" ", _RULE.sub(" ", bare)).split())


def table(text: str) -> Table:
    """Return the cells of the first table, row by row; none where there is no table."""
    if found := _OTSL.search(text):
        rows = _LOCATION.sub("", found[1]).split("<nl>")
        return [cells for row in rows if (cells := [each.strip() for each in _OTSL_CELL.findall(row)])]
    if found := _HTML_TABLE.search(text):
        return [[plain(cell) for cell in _HTML_CELL.findall(row)] for row in _HTML_ROW.findall(found[0])]
    lines = [line.strip().strip("|") for line in text.splitlines() if line.strip().startswith("|")]
    return [[plain(cell) for cell in line.split("|")] for line in lines if not _RULE.match(line)]


def cell_accuracy(expected: Table, found: Table) -> float:
    """Return the share of a table's cells that are found in their places."""
    right = [
        row < len(found) and column < len(found[row]) and found[row][column] == cell
        for row, cells in enumerate(expected)
        for column, cell in enumerate(cells)
    ]
    return float(np.mean(right)) if right else 1.0


def edit_distance(first: str, second: str) -> int:
    """Return how many characters must be inserted, deleted or replaced (Levenshtein 1966), a row of NumPy at a time."""
    columns = np.arange(len(second) + 1)
    letters, row = np.array(list(second), dtype="U1"), columns
    for number, letter in enumerate(first, 1):
        best = np.empty_like(row)
        best[0] = number
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
        row = np.minimum.accumulate(best - columns) + columns  # an insertion is a step to the right
    return int(row[-1])


def error_rate(expected: str, found: str) -> float:
    """Return the character error rate: the edit distance, relative to the expected text's length."""
    return edit_distance(expected, found) / max(1, len(expected))
