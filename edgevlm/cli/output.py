"""Terminal output through Rich: tables on stdout, a bar on stderr; programs use `--json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from edgevlm.answer import Answer

if TYPE_CHECKING:
    from edgevlm.bench.measure import Report
    from edgevlm.decoding.scoring import Scores
    from edgevlm.locations import Locations

_POINTS_ABREAST = 5
"""Points of a benchmark that fit beside each other in a terminal of 80 columns."""


class Bar:
    """A bar with the time that is left on stderr, silent when stderr is no terminal; rows that failed are told."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self._progress = RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=None, rate="loading the model …")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def progress(self, done: int, total: int) -> None:
        """Show how many of how many are done."""
        task = self._progress.tasks[0]
        if task.total is None:
            self._progress.reset(self._task, total=total, completed=done)
            return
        rate = f"{task.speed * 60:.0f}/min" if task.speed else ""
        self._progress.update(self._task, completed=done, total=total, rate=rate)

    def row(self, row: Mapping[str, Any]) -> None:
        """Report a failed row."""
        if "error" in row:
            where = f"line {row['line']}" if "line" in row else row["path"]
            self.tell(f"{where}: {row['error']}")

    def tell(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(Text(line), soft_wrap=True)


def print_row(row: Mapping[str, Any]) -> None:
    """Print a picture's name and what was answered about it, or what was wrong with it."""
    Console().print(Text(f"{row['path']}  {row.get('answer', row.get('error'))}"), soft_wrap=True)


def print_stats(answer: Answer) -> None:
    """Print tokens, timings and memory of an answer, on stderr so that stdout holds the answer alone."""
    timings = answer.timings
    thought = f", {answer.reasoning_tokens} of them of the thought" if answer.reasoning_tokens else ""
    speed = f"{timings.tokens_per_s:.1f} tokens/s" if timings.tokens_per_s else "-"
    rows = {
        "prompt": f"{answer.prompt_tokens} tokens, {answer.image_tokens} of them image tokens of {answer.views} views",
        "cached": f"{answer.cached_tokens} tokens, {answer.cached_views} views",
        "answer": f"{answer.generated_tokens} tokens{thought} ({answer.finish_reason})",
        "drafts": f"{answer.accepted_tokens} of {answer.drafted_tokens} tokens came true",
        "load": f"{timings.load_s:.2f} s",
        "preprocess": f"{timings.preprocess_s:.3f} s",
        "vision": f"{timings.vision_s:.3f} s",
        "prefill": f"{timings.prefill_s:.3f} s",
        "TTFT": f"{timings.ttft_s:.3f} s",
        "TPOT": f"{timings.tpot_s * 1000:.1f} ms ({speed})" if timings.tpot_s else "-",
        "peak memory": f"{answer.peak_memory_bytes / 2**20:,.0f} MiB",
    }
    _print_pairs(rows, Console(stderr=True))


def print_scores(scores: Scores) -> None:
    """Print the choices with their probabilities, the likeliest first."""
    for choice, probability in sorted(scores.probabilities.items(), key=lambda each: -each[1]):
        Console().print(Text(f"{probability:7.2%}  {choice}"), soft_wrap=True)


def print_locations(found: Locations) -> None:
    """Print a line for each place, numbered as `-o` draws them, and on stderr what is not plain from them."""
    for number, each in enumerate(found.locations, 1):
        kind, coordinates = ("box", each.box) if each.box else ("point", each.point)
        assert coordinates
        places = " ".join(f"{value:.1f}" for value in coordinates)
        Console().print(Text(f"{number}  {kind} {places}  score {each.score:.2f}"), soft_wrap=True)
    told = Console(stderr=True)
    if not found.locations:
        told.print(Text(f"(found nothing: {found.phrase})"), soft_wrap=True)
    if found.dropped:
        told.print(f"(left out: {found.dropped} without area or named twice)", highlight=False)


def print_bench(report: Report) -> None:
    """Print a benchmark's table, and what it was taken on."""
    from edgevlm.bench.conditions import machine_line
    from edgevlm.bench.report import COLUMNS, name_point, vision_line

    console = Console()
    points = list(enumerate(report.points, 1))
    for number, point in points:
        console.print(f"{number}: {name_point(point)}", highlight=False)
    for first in range(0, len(points), _POINTS_ABREAST):
        abreast = points[first : first + _POINTS_ABREAST]
        table = Table(report.model, *(str(number) for number, _ in abreast))
        for heading, cell in COLUMNS.items():
            table.add_row(heading, *(cell(point) for _, point in abreast))
        console.print(table)
    console.print(vision_line(report), highlight=False)
    load = report.load
    console.print(
        f"load {load['compile']:.2f} s, with compiled models on disk {load['cached']:.2f} s;"
        f" a new process needs {load['process']:.2f} s to its first token (global view only)",
        highlight=False,
    )
    console.print(machine_line(report.machine), highlight=False)
    for number, point in points:
        console.print(f"{number}: {point.conditions.line}", highlight=False)


def print_models(models: Sequence[Mapping[str, Any]]) -> None:
    """Print the models that are there."""
    table = Table("name", "family", "precision", "size", "state")
    for each in models:
        size = megabytes(each["size_bytes"]) if each.get("size_bytes") else "-"
        texts = (each["name"], each.get("family", "-"), each.get("precision", "-"), size, each["state"])
        table.add_row(*(Text(text) for text in texts))
    Console().print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print nested facts, a line each."""
    rows: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows |= {f"{name}: {key}": str(each) for key, each in value.items()}
        else:
            rows[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    _print_pairs(rows, Console())


def megabytes(size: int) -> str:
    """Return a size for people, in MB of a million bytes."""
    return f"{size / 1e6:,.1f} MB"


def _print_pairs(rows: Mapping[str, str], console: Console) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        # Plain text, for a path may hold brackets; and unwrapped, for it may be copied.
        console.print(Text(f"{name:<{width}}  {value}"), soft_wrap=True)
