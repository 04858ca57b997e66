"""`edgevlm tune`: a user's own labelled pictures to a model that reads them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.help import Command
from edgevlm.errors import TuningError
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from edgevlm_export.tune import Scored, TuneProgress, TuneReport


@click.command(cls=Command)
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make, an export.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Folder of the checkpoint to begin with.  [default: the bundled model's]",
)
@click.option("--question", help="Asked where a row has no question of its own.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="How long it learns; reading, exporting and checking come on top.",
)
@click.option("--keep-anyway", is_flag=True, help="Save a model that is no better than before, too.")
@click.option(
    "--save-checkpoint",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Save the checkpoint, too, to be tuned further.",
)
@click.option("--force", is_flag=True, help="Replace an earlier export, and nothing else.")
@click.option(
    "--seed", default=0, show_default=True, help="Which pictures are kept apart, and the order of the others."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def tune(
    rows: Path,
    output: Path,
    checkpoint: Path | None,
    question: str | None,
    minutes: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Teach a small model your own pictures: the labelled ROWS, on this machine's CPU.

    A row is {"image": "a.png", "question": "…", "answer": "…"}, as `batch` has it, with the right answer, and a
    "tolerance" where a number may be off, or a "crop" [x0, y0, x1, y1] of the picture; ROWS is a .jsonl file, a .csv
    file with such columns, or a folder that holds rows.jsonl or labels.csv. A hundred labelled pictures are
    a good beginning.

    A fifth of the pictures is kept apart, and what is saved is what answers these best; a model that is no better is
    not saved. Ctrl-C keeps the best so far. Of a checkpoint of more than 60 million weights, such as SmolVLM-256M's,
    the text part is tuned by LoRA, which takes more minutes.

    \b
    edgevlm tune rows.jsonl -o my-gauge
    edgevlm tune labels.csv -o my-gauge --question "What does the gauge read?" --minutes 20
    edgevlm run photo.jpg "What does the gauge read?" -m ./my-gauge
    """
    missing = [name for name in ("torch", "transformers", "peft", "nncf", "safetensors") if find_spec(name) is None]
    if missing:
        raise TuningError(f"tuning needs {', '.join(missing)}; install it with: pip install 'edgevlm[tune]'")
    from edgevlm.cli.progress import Progress

    with Progress() as progress:
        progress.stage("starting")
        from edgevlm_export.tune import TuneOptions
        from edgevlm_export.tune import tune as tune_checkpoint

        chosen = TuneOptions(minutes=minutes, question=question, **options)
        report = tune_checkpoint(rows, output, checkpoint, chosen, lambda each: progress.stage(_line(each)))
    if as_json:
        click.echo(write_json(report.to_dict()))
    else:
        print_report(report)


def _line(progress: TuneProgress) -> str:
    """Return what is being done now, in a line."""
    if progress.seconds_left is None:
        return progress.stage
    minutes, seconds = divmod(max(0, round(progress.seconds_left)), 60)
    line = f"{progress.stage}, {minutes}:{seconds:02d} left"
    if progress.now and progress.best:
        line += f", {progress.now.share:.0%} of the pictures kept apart right (best {progress.best.share:.0%})"
    return line


def print_report(report: TuneReport) -> None:
    """Print right answers before and after, with 95 % intervals."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("right answers", "before", "after")
    table.add_row("your pictures kept apart", _cell(report.before), _cell(report.after))
    if report.known_before.asked:
        table.add_row("what it knew", _cell(report.known_before), _cell(report.known_after))
    console.print(table)
    how = "interrupted: the best so far, " if report.interrupted else ""
    console.print(
        f"{how}learned from {report.learned} rows in {report.steps} steps, {report.seconds / 60:.1f} min in all",
        highlight=False,
    )
    console.print(str(report.folder), highlight=False, soft_wrap=True)


def _cell(score: Scored) -> str:
    low, high = score.interval
    return f"{score.right} of {score.asked} ({low:.0%} to {high:.0%})"
