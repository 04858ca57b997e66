"""`edgevlm watch`: a folder of pictures and videos, answered as they come."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import click

from edgevlm.cli.help import Command, group
from edgevlm.cli.options import (
    LONG_RUNNING_DEFAULTS,
    chosen_model,
    generation_options,
    model_options,
    output_options,
    row_defaults,
    runtime_config,
    video_options,
)
from edgevlm.strict_json import write_json


@click.command(cls=Command, context_settings=LONG_RUNNING_DEFAULTS)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--question", required=True, help="Question about each picture and video.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON Lines file of answers.")
@click.option("--sqlite", type=click.Path(path_type=Path), help="SQLite database (a local disk): its table `answers`.")
@click.option("--recursive", is_flag=True, help="Look into folders within the folder too.")
@click.option(
    "--settle", default=1.0, show_default=True, help="Seconds that a new file must stay unchanged before it is read."
)
@click.option("--patience", default=30.0, show_default=True, help="Seconds after which an unreadable file is reported.")
@model_options
@generation_options
@video_options
@output_options
@group(
    "Output",
    click.option("--json", "as_json", is_flag=True, help="Also print each row as a line of JSON."),
)
def watch(
    folder: Path,
    question: str,
    output: Path | None,
    sqlite: Path | None,
    recursive: bool,
    settle: float,
    patience: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer --question about each picture and video in FOLDER, and about each that comes, until Ctrl-C or SIGTERM.

    Each file is answered once, also across restarts; a row holds its path, SHA-256, and the answer or the error. A file
    that is still being written is waited for. With --fps or --frames a GIF is a video, too. Of files whose suffix is
    that of no format edgevlm reads, and of videos where the model takes none, the first of each suffix is told on
    stderr, and none is answered. What is in a JSON Lines file is held in memory (some hundred bytes a picture): for
    years of pictures, take --sqlite. Needs pip install 'edgevlm[watch]', for videos also 'edgevlm[video]'.

    \b
    edgevlm watch ./camera --question "Is the door open?" --choices yes,no --sqlite door.db
    edgevlm watch ./gauges --question "Read the gauge." --schema reading.json -o readings.jsonl
    """
    from edgevlm.cli.output import print_row
    from edgevlm.cli.progress import Progress
    from edgevlm.jobs.sinks import JsonlSink, SqliteSink
    from edgevlm.jobs.watch import Watch, Watcher

    if (output is None) == (sqlite is None):
        raise click.UsageError("name one place for the answers: -o FILE or --sqlite DB")
    defaults = row_defaults(question, options)
    runtime = runtime_config(options)
    what = Watch(folder, defaults, recursive, settle, patience)
    with SqliteSink(sqlite) if sqlite else JsonlSink(output) as sink:  # type: ignore[arg-type]
        stop = _until_told()
        chosen = chosen_model(options["model"])
        with Progress() as progress:
            progress.stage("loading the model")
            from edgevlm.vlm import VLM

            vlm = VLM(chosen, runtime)
        show = _print_json if as_json else print_row if sys.stdout.isatty() else _say_nothing
        click.echo(f"watching {folder}", err=True)
        Watcher(what, vlm, sink, show, partial(click.echo, err=True)).run(stop)


def _print_json(row: dict[str, Any]) -> None:
    click.echo(write_json(row))


def _say_nothing(_: dict[str, Any]) -> None:
    """Keep answers out of a service's log."""


def _until_told() -> Event:
    """Return an event that Ctrl-C and SIGTERM set; told a second time, the program ends at once."""
    stop = Event()

    def end(number: int, frame: object) -> None:  # noqa: ARG001
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)
    return stop
