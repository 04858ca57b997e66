"""`edgevlm batch`: a file of questions to a file of answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from edgevlm.cli.help import Command, group
from edgevlm.cli.options import (
    chosen_model,
    generation_options,
    model_options,
    output_options,
    row_defaults,
    runtime_config,
    video_options,
)
from edgevlm.strict_json import write_json


@click.command(cls=Command)
@click.argument("jobs", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON Lines file of answers.")
@click.option("--question", help="Asked where a row has no question of its own.")
@click.option("--workers", default=1, show_default=True, help="Processes, each with a model of its own.")
@click.option("--ray", metavar="ADDRESS", help="Run the workers on a Ray cluster; local starts one on this machine.")
@model_options
@generation_options
@video_options
@output_options
@group(
    "Output",
    click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object."),
)
def batch(
    jobs: Path, output: Path, question: str | None, workers: int, ray: str | None, as_json: bool, **options: Any
) -> None:
    """Answer the JOBS, a JSON Lines file, into another, in the same order.

    A row is {"image": "a.png", "question": "…"}, where image may also be a list or left out; it may have an id, schema
    (an object or a file), choices or regex, max_new_tokens, and a crop [x0, y0, x1, y1] of its one image, in pixels of
    the upright picture, to be asked about in its place. In place of image it may have a video, a file or a folder of
    its frames, with fps or frames, which win over --fps and --frames. Paths are relative to the file of jobs.

    Killed or run again, it goes on where it was: nothing is lost and nothing answered twice. Run it several times at
    once, also on machines that share the folder, and they share the work. --ray puts the workers on a Ray cluster (pip
    install 'edgevlm[ray]'), where the model, the pictures and the videos must be at the same paths. A row that cannot
    be answered has an error in place of its answer, and the exit code is then 1.

    \b
    edgevlm batch jobs.jsonl -o answers.jsonl
    edgevlm batch jobs.jsonl -o answers.jsonl --workers 4 --schema reading.json
    edgevlm batch jobs.jsonl -o answers.jsonl --workers 16 --ray 10.0.0.5:6379
    """
    from edgevlm.cli.output import Bar
    from edgevlm.jobs.batch import Batch, run_batch

    defaults = row_defaults(question, options)
    what = Batch(jobs, output, str(chosen_model(options["model"])), runtime_config(options), defaults, workers)
    with Bar() as bar:
        executor = None
        if ray:
            from edgevlm.jobs.ray import work_on_ray

            executor = partial(work_on_ray, ray)
        summary = run_batch(what, bar.row, bar.progress, executor)
    if as_json:
        click.echo(write_json(summary.to_dict()))
    else:
        resumed = f" ({summary.resumed} of them before)" if summary.resumed else ""
        click.echo(f"{summary.jobs - summary.failed} of {summary.jobs} rows answered{resumed}: {output}", err=True)
    if summary.failed:
        click.get_current_context().exit(1)
