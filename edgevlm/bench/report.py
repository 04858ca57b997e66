"""A benchmark as a page or a picture: bars of where the time to the first token goes, and of decoding speed."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.bench.measure import Point, Report
from edgevlm.errors import BenchmarkError, OptionError
from edgevlm.model_store import is_there

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS: dict[str, Callable[[Point], str]] = {
    "views": lambda point: str(point.views),
    "image tokens": lambda point: str(point.image_tokens),
    "prompt tokens": lambda point: str(point.prompt_tokens),
    "preprocess ms": lambda point: _milliseconds(point, "preprocess_s"),
    "vision ms a view": lambda point: _milliseconds(point, "vision_s_per_view"),
    "prefill tokens/s": lambda point: f"{point.figures['prefill_tokens_per_s'].median:,.0f}",
    "TTFT ms": lambda point: _milliseconds(point, "ttft_s"),
    "TTFT p90 ms": lambda point: f"{point.figures['ttft_s'].p90 * 1000:,.0f}",
    "next question ms": lambda point: _milliseconds(point, "next_question_ttft_s"),
    "TPOT ms": lambda point: f"{point.figures['tpot_s'].median * 1000:,.1f}" if "tpot_s" in point.figures else "-",
    "tokens/s": lambda point: f"{point.figures['tokens_per_s'].median:,.1f}" if "tpot_s" in point.figures else "-",
    "end to end ms": lambda point: _milliseconds(point, "total_s"),
    "cores used": lambda point: f"{point.conditions.cores_used:.2f}",
    "cores of others": lambda point: f"{point.conditions.cores_of_others:.2f}",
    "peak MiB": lambda point: f"{point.peak_memory_bytes / 2**20:,.0f}",
}
"""Heading and content of each column of the table; medians, TTFT with its p90."""


def _milliseconds(point: Point, name: str) -> str:
    return f"{point.figures[name].median * 1000:,.0f}"


def name_point(point: Point) -> str:
    """Return what tells a point from the others of its run."""
    threads = f"{point.threads} thread{'s' * (point.threads > 1)}" if point.threads else "all threads"
    return f"{point.device}, {threads}, {point.inference_precision}, vision {point.vision.name}, {point.detail}"


def vision_line(report: Report) -> str:
    """Return what the vision encoder computed with, and why."""
    return f"vision: {', '.join(dict.fromkeys(str(point.vision) for point in report.points))}"


def check_target(path: Path) -> None:
    """Raise before the work begins when the report could not be written in the end."""
    if path.suffix.lower() not in {".html", ".png"}:
        raise OptionError(f"a report is .html or .png, not {path.name or path}")
    if not is_there(path.parent) or not path.parent.is_dir():
        raise OptionError(f"no folder {path.parent} for the report")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError(f"{path} cannot be written; choose another place for the report")
    _pyplot_figure(1, 1)


def write_report(report: Report, path: Path) -> None:
    """Write the report as a page or a picture, as the suffix says; drawn with matplotlib."""
    figure = draw(report)
    try:
        if path.suffix.lower() == ".png":
            with BytesIO() as png:
                figure.savefig(png, format="png", dpi=150)
                path.write_bytes(png.getvalue())
        else:
            with StringIO() as svg:
                figure.savefig(svg, format="svg")
                path.write_text(page(report, svg.getvalue()), encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror or error}") from None


def _pyplot_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("a report needs matplotlib; install it with: pip install 'edgevlm[report]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw(report: Report) -> Figure:
    """Return the plots: the parts of TTFT, and tokens a second with their range."""
    points, height = report.points, 1.2 + 0.5 * len(report.points)
    figure = _pyplot_figure(11, height)
    first, second = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [f"{name_point(point)}\n{point.views} views, {point.prompt_tokens} tokens" for point in points]
    left = [0.0] * len(points)
    stages: dict[str, Callable[[Point], float]] = {
        "preprocess": lambda point: point.figures["preprocess_s"].median,
        "vision": lambda point: point.figures["vision_s_per_view"].median * point.views,
        "prefill": lambda point: point.prompt_tokens / point.figures["prefill_tokens_per_s"].median,
    }
    for label, seconds in stages.items():
        widths = [seconds(point) for point in points]
        first.barh(names, widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    first.set_xlabel("seconds to the first token (median)")
    first.legend(frameon=False)
    speeds = [point.figures["tokens_per_s"] for point in points if "tokens_per_s" in point.figures]
    if len(speeds) == len(points):
        errors = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
        second.barh(names, [speed.median for speed in speeds], xerr=errors, color="C2")
    second.set_yticklabels([])
    second.set_xlabel("tokens a second (median, range)")
    for axes in (first, second):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def page(report: Report, svg: str) -> str:
    """Return one HTML page without any outside resource."""
    machine = "".join(f"<tr><th>{_text(k)}<td>{_text(v)}" for k, v in report.machine.items())
    load = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.load.items())
    vision = _text(vision_line(report))
    head = "".join(f"<th>{_text(heading)}" for heading in ["point", *COLUMNS])
    rows = "".join(
        f"<tr><td>{_text(name_point(point))}" + "".join(f"<td>{_text(cell(point))}" for cell in COLUMNS.values())
        for point in report.points
    )
    conditions = "".join(
        f"<tr><th>{_text(name_point(point))}<td>{_text(point.conditions.line)}" for point in report.points
    )
    style = (
        "body{font:15px system-ui;margin:2em}td,th{padding:.2em .8em;text-align:left}svg{max-width:100%;height:auto}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(report.model)}</title>'
        f"<style>{style}</style><h1>{_text(report.model)}</h1><p>Load: {_text(load)}<br>{vision}</p>"
        f"{svg[svg.index('<svg') :]}<table>{head}{rows}</table><h2>Machine</h2><table>{machine}</table>"
        f"<h2>Conditions</h2><table>{conditions}</table></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
