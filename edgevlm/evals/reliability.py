"""The reliability diagram: how often the likeliest choice is right, by its probability; an SVG, or a page of it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from edgevlm.errors import OptionError, OutputError
from edgevlm.evals.calibration import BINS, FOLDS, Bin, Figures, Fitted
from edgevlm.evals.statistics import wilson
from edgevlm.model_store import is_there

_SIDE, _LEFT, _TOP, _COUNTS, _PANEL = 300, 56, 48, 50, 400
_STYLE = (
    "body{font:15px system-ui;margin:2em;max-width:60em}td,th{padding:.2em .8em;text-align:left}"
    "svg{max-width:100%;height:auto}"
)
_SVG_STYLE = (
    "text{font:13px system-ui,sans-serif}.title{font-weight:bold}"
    ".right{fill:#4878a8}.count{fill:#999}.gap{fill:#c03028;fill-opacity:.25}"
)
FIGURES = {"NLL": "nll", "ECE": "ece", "Brier": "brier", "right": "accuracy", "mean confidence": "confidence"}
"""Rows of the table, by what they are called."""


def table(fitted: Fitted) -> list[tuple[str, str, str]]:
    """Return the texts of the table: a figure's name, before and after."""
    return [
        (name, f"{getattr(fitted.before, field):.4f}", f"{getattr(fitted.after, field):.4f}")
        for name, field in FIGURES.items()
    ]


def check_target(path: Path) -> None:
    """Raise `OptionError` before the work begins when the report could not be written in the end."""
    if path.suffix.lower() not in {".html", ".svg"}:
        raise OptionError(f"a report is .html or .svg, not {path.name or path}")
    if not is_there(path.parent) or not path.parent.is_dir():
        raise OptionError(f"no folder {path.parent} for the report")


def write_report(path: Path, model: str, fitted: Fitted, lines: Sequence[str]) -> None:
    """Write the diagram as a page or alone, as the suffix says. Raises `OutputError`."""
    text = diagram(fitted) if path.suffix.lower() == ".svg" else page(model, fitted, lines)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None


def page(model: str, fitted: Fitted, lines: Sequence[str]) -> str:
    """Return one HTML page without any outside resource."""
    told = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    rows = "".join(f"<tr><th>{name}<td>{before}<td>{after}" for name, before, after in table(fitted))
    folds = ", ".join(f"{each:.3f}" for each in fitted.fold_temperatures)
    name = html.escape(model)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Calibration of {name}</title>'
        f"<style>{_STYLE}</style><h1>Calibration of {name}</h1>{told}{diagram(fitted)}"
        f"<table><tr><th><th>before<th>after{rows}</table>"
        f"<p>{fitted.decisions} decisions about {fitted.pictures} pictures. After: each decision under a temperature"
        f" that was fitted without its picture, in {FOLDS} folds (T = {folds}). Blue: how often the likeliest choice is"
        f" right, with 95 % intervals, in {BINS} bins of its probability; red: the gap to that probability; grey: how"
        " many decisions there are.</p></html>"
    )


def diagram(fitted: Fitted) -> str:
    """Return both reliability diagrams as one SVG."""
    width, height = 2 * _PANEL, _TOP + _SIDE + _COUNTS + 60
    panels = "".join(
        f'<g transform="translate({left},0)">{_panel(title, figures)}</g>'
        for left, title, figures in (
            (0, "before: T = 1", fitted.before),
            (_PANEL, f"after: T = {fitted.temperature:.2f}", fitted.after),
        )
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
        f"<title>Reliability before and after</title><style>{_SVG_STYLE}</style>"
        f'<rect width="{width}" height="{height}" fill="white"/>{panels}</svg>'
    )


def _panel(title: str, figures: Figures) -> str:
    ticks = "".join(
        f'<text x="{_x(at):.0f}" y="{_TOP + _SIDE + _COUNTS + 24}" text-anchor="middle">{at:g}</text>'
        f'<text x="{_LEFT - 8}" y="{_y(at) + 4:.0f}" text-anchor="end">{at:g}</text>'
        for at in (0, 0.5, 1)
    )
    most = max(each.decisions for each in figures.bins)
    return (
        f'<text x="{_LEFT}" y="20" class="title">{title}</text>'
        f'<text x="{_LEFT}" y="38">ECE {figures.ece:.3f}, NLL {figures.nll:.3f}, Brier {figures.brier:.3f}</text>'
        + "".join(_bar(each, most) for each in figures.bins)
        + f'<rect x="{_LEFT}" y="{_TOP}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="black"/>'
        f'<path d="M{_x(0)} {_y(0)}L{_x(1)} {_y(1)}" stroke="black" stroke-dasharray="4"/>{ticks}'
        f'<text x="{_x(0.5):.0f}" y="{_TOP + _SIDE + _COUNTS + 44}" text-anchor="middle">'
        "probability of the likeliest choice</text>"
        f'<text transform="translate(14,{_y(0.5):.0f}) rotate(-90)" text-anchor="middle">right</text>'
    )


def _bar(each: Bin, most: int) -> str:
    """Return a bin: how often it is right, with its interval, the gap to its confidence, and how many it holds."""
    left, width = _x(each.low) + 2, _SIDE * (each.high - each.low) - 4
    low, high = wilson(each.accuracy * each.decisions, each.decisions)
    top, bottom = sorted((_y(each.accuracy), _y(each.confidence)))
    middle, count = left + width / 2, (_COUNTS - 10) * each.decisions / most
    told = (
        f"{each.low:g} to {each.high:g}: {each.decisions} decisions, mean probability {each.confidence:.3f},"
        f" right {each.accuracy:.3f} [{low:.3f}, {high:.3f}]"
    )
    return (
        f"<g><title>{told}</title>{_rect('right', left, _y(each.accuracy), width, _y(0) - _y(each.accuracy))}"
        f"{_rect('gap', left, top, width, bottom - top)}"
        f'<path d="M{middle:.1f} {_y(low):.1f}V{_y(high):.1f}" stroke="black"/>'
        f"{_rect('count', left, _TOP + _SIDE + _COUNTS - count, width, count)}</g>"
    )


def _rect(kind: str, left: float, top: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _x(share: float) -> float:
    return _LEFT + _SIDE * share


def _y(share: float) -> float:
    return _TOP + _SIDE * (1 - share)
