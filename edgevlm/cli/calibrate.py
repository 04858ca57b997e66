"""`edgevlm calibrate`: probabilities that are as sure as they are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.help import Command, group
from edgevlm.cli.options import (
    LONG_RUNNING_DEFAULTS,
    chosen_model,
    image_budget,
    image_options,
    model_options,
    read_choices,
    runtime_config,
)
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from edgevlm.evals.calibration import Fitted


@click.command(cls=Command, context_settings=LONG_RUNNING_DEFAULTS)
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--question", help="Asked where a row has no question of its own.")
@click.option("--choices", help="Offered where a row has none of its own, separated by commas.")
@click.option("--no-save", "--dry-run", "no_save", is_flag=True, help="Only look: leave the model as it is.")
@model_options
@image_options
@group(
    "Output",
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        help="JSON Lines file of the scores; run again, it goes on.  [default: ROWS.MODEL.scores.jsonl, beside ROWS]",
    ),
    click.option("--report", type=click.Path(path_type=Path), help="Also draw reliability diagrams: .html or .svg."),
    click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object."),
)
def calibrate(
    rows: Path,
    question: str | None,
    choices: str | None,
    no_save: bool,
    output: Path | None,
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit a calibration temperature to your own labelled ROWS, and save it with the model.

    A row is {"image": "a.png", "question": "…", "choices": ["red", "green"], "label": "red"}, as `batch` has it, with
    what is right. A label of true or false is of two choices, yes and no if left out; a list is of choices that do not
    exclude each other, each judged on its own. 50 decisions are the fewest, 200 are a good beginning.

    The model's log-likelihoods are divided by the one temperature that makes the right choices likeliest (Guo et al.
    2017). No order of choices changes, only how sure it is. The figures after it are of rows held out, in five folds.
    A temperature that is no better on them is not saved. Killed or run again, it goes on where it was.

    \b
    edgevlm calibrate rows.jsonl -m my-model --report calibration.html
    edgevlm calibrate rows.jsonl -m my-model --question "Is the door open?" --no-save
    """
    from edgevlm.cli.output import Bar
    from edgevlm.decoding.output_format import OutputFormat
    from edgevlm.evals.calibration import fit, save, score_rows
    from edgevlm.evals.reliability import check_target, write_report
    from edgevlm.jobs.labelled import LabelledBatch
    from edgevlm.jobs.spec import Defaults
    from edgevlm.model_store import find_model

    if report:
        check_target(report)
    folder = find_model(chosen_model(options["model"]))
    given = OutputFormat.of(choices=read_choices(choices) if choices is not None else None)
    defaults = Defaults(question, given, image_budget=image_budget(options))
    target = output or rows.with_name(f"{rows.stem}.{folder.resolve().name}.scores.jsonl")
    with Bar() as bar:
        decisions = score_rows(
            LabelledBatch(rows, target, str(folder), runtime_config(options), defaults), bar.row, bar.progress
        )
    fitted = fit(decisions)
    saved = save(folder, fitted) if fitted.is_better and not no_save else None
    lines = [*fitted.lines, _about_saving(folder, saved, no_save=no_save)]
    if report:
        write_report(report, folder.name, fitted, lines)
    if as_json:
        click.echo(write_json({"model": folder.name, **fitted.to_dict(), "saved": saved and str(saved)}))
    else:
        _show(fitted, lines)


def _about_saving(folder: Path, saved: Path | None, *, no_save: bool) -> str:
    from edgevlm.calibration import CALIBRATION
    from edgevlm.model_store import is_there

    if saved:
        return f"saved: {saved}"
    before = f"; {folder / CALIBRATION} stays as it is" if is_there(folder / CALIBRATION) else ""
    return f"not saved{'' if no_save else ': it is no better'}{before}"


def _show(fitted: Fitted, lines: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgevlm.evals.reliability import table

    console, shown = Console(), Table(f"{fitted.decisions} decisions", "before", "after, held out")
    for row in table(fitted):
        shown.add_row(*row)
    console.print(shown)
    for line in lines:
        console.print(Text(line), soft_wrap=True)
