"""One page for people: the tables, the verdicts, and pictures of items that were answered wrongly."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from edgevlm.errors import OutputError
from edgevlm.evals.items import Item, Suite
from edgevlm.evals.results import CellResult, Difference, SuiteResult, answered
from edgevlm.families.base import RGB
from edgevlm.jobs.jsonl import Row

SHOWN = 12
"""Failures of a suite that are shown."""
_WIDTH = 320
_STYLE = (
    "body{font:15px system-ui;margin:2em;max-width:75em}td,th{padding:.2em .8em;text-align:left}"
    "figure{display:inline-block;width:20em;vertical-align:top;margin:1em}img{max-width:100%}figcaption{font-size:13px}"
)
HEADINGS = ("cell", "items", "right", "95 %", "chance", "blind", "majority", "robust", "unwilling", "said")


def table(result: SuiteResult) -> list[list[str]]:
    """Return the texts of a suite's table, its headings first, without columns that tell nothing."""
    rows = [HEADINGS, *(_cells(each) for each in (*result.cells, result.total))]
    told = [index for index in range(len(HEADINGS)) if any(row[index] != "-" for row in rows[1:])]
    return [[row[index] for index in told] for row in rows]


def _cells(result: CellResult) -> tuple[str, ...]:
    low, high = result.interval
    shares = (result.blind, result.majority, result.robust, result.unwilling, result.said)
    figures = ["-" if share is None else f"{share:.0%}" for share in shares]
    interval = f"{low:.0%} to {high:.0%}"
    return (result.cell, str(result.asked), f"{result.accuracy:.0%}", interval, f"{result.chance:.0%}", *figures)


def figure_lines(result: SuiteResult) -> list[str]:
    """Return a line for each figure, with its interval where it has one."""
    intervals = {name: f" [{low:.3g}, {high:.3g}]" for name, (low, high) in result.intervals.items()}
    return [f"{name}: {value:.3g}{intervals.get(name, '')}" for name, value in result.figures.items()]


def difference_line(name: str, difference: Difference) -> str:
    """Return two models' difference in a line."""
    low, high = (100 * each for each in difference.interval)
    return (
        f"{name}: {100 * difference.difference:+.1f} points [{low:+.1f}, {high:+.1f}],"
        f" {difference.only_second} gained, {difference.only_first} lost, McNemar p = {difference.p:.3f}"
    )


def write_report(
    path: Path,
    model: str,
    results: Sequence[tuple[Suite, SuiteResult, Sequence[Row], Mapping[str, Item]]],
    lines: Sequence[str],
) -> None:
    """Write the page. Raises `OutputError`."""
    body = [f"<h1>{html.escape(model)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in lines)]
    for suite, result, rows, items in results:
        headings, *told = table(result)
        head = "".join(f"<th>{each}" for each in headings)
        under = "".join("<tr>" + "".join(f"<td>{html.escape(text)}" for text in row) for row in told)
        body += [
            f"<h2>{html.escape(suite.name)}</h2><p>{html.escape(result.verdict)}</p><table><tr>{head}{under}</table>"
        ]
        wrong = [row for row in answered(rows) if row["right"] < 0.5 and row["item"] in items]
        body += [_figure(row, items[row["item"]]) for row in wrong[:SHOWN]]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(model)}</title>'
        f"<style>{_STYLE}</style>{''.join(body)}</html>\n"
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None


def _figure(row: Row, item: Item) -> str:
    pictures = "".join(f'<img src="{_data_url(picture)}" alt="">' for picture in item.pictures())
    told = f"{row['question']} — {row['answer']} (right: {row['truth']})"
    return f"<figure>{pictures}<figcaption>{html.escape(told)}</figcaption></figure>"


def _data_url(picture: RGB) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((_WIDTH, _WIDTH))
    with BytesIO() as file:
        image.save(file, format="WEBP", quality=80)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
