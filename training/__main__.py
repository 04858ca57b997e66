"""`python -m training …`: look at pictures, train, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

SOME = click.IntRange(1)
SHARE, MINUTES = click.FloatRange(0, 1, min_open=True), click.FloatRange(0, min_open=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Make the default model: draw pictures, train on them, evaluate."""


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seed", default=99)
@click.option("--count", default=24, help="Pictures on the sheet.")
@click.option("--only", help="One kind of scene.")
@click.option("--taught", is_flag=True, help="Scenes to learn from, in their wider world.")
def show(output: Path, seed: int, count: int, only: str | None, taught: bool) -> None:
    """Draw a contact sheet of scenes with their questions into OUTPUT.

    \b
    python -m training show sheet.png --only gauge
    """
    from training.sheet import contact_sheet

    contact_sheet(seed, count, only, taught).save(output)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--pictures", type=SOME, help="Pictures in the whole run.  [default: 1000000, any with --minutes]")
@click.option("--batch", default=48)
@click.option("--workers", default=1, help="Processes that draw.")
@click.option("--seed", default=1)
@click.option("--rate", default=4e-3, help="AdamW's.")
@click.option("--muon-rate", default=0.05)
@click.option("--guide", default=1.0, help="The guide's weight at first.")
@click.option("--decay", type=SHARE, default=0.3, help="Last share of the run, over which the rates fall to zero.")
@click.option("--start", type=click.Path(path_type=Path, exists=True), help="A checkpoint to begin with.")
@click.option("--sheets", is_flag=True, help="Teach the vision tower alone, on sheets crowded with signs.")
@click.option("--float32", is_flag=True, help="Not in BF16: faster on Intel's CPUs without AMX.")
@click.option("--warmup", type=SOME, default=4000, help="Pictures over which the rates rise.")
@click.option("--minutes", type=MINUTES, help="The run's length in time, if its pictures take longer.")
@click.option("--stop-minutes", type=float, help="Save and end after this time; the same command goes on from there.")
@click.option("--save-minutes", default=5.0, help="How often the run's state is saved.")
def train(
    folder: Path,
    pictures: int | None,
    minutes: float | None,
    stop_minutes: float | None,
    start: Path | None,
    sheets: bool,
    **options: Any,
) -> None:
    """Train in FOLDER, or go on with what is there.

    \b
    python -m training train runs/panel --sheets --pictures 100000
    python -m training train runs/panel --minutes 60 --workers 14 --batch 384  # on a GPU
    """
    from training.settings import Settings
    from training.train import train as run

    limits = {"minutes": minutes, "stop_minutes": stop_minutes}
    options |= {name: limit for name, limit in limits.items() if limit is not None}
    run(Settings(folder, pictures or (10**8 if minutes else 10**6), start=start, **options), sheets)


@main.command()
@click.argument("old", type=click.Path(path_type=Path, exists=True))
@click.argument("new", type=click.Path(path_type=Path))
def enlarge(old: Path, new: Path) -> None:
    """Write the checkpoint OLD, which looks at smaller pictures, to NEW for pictures of today's size.

    \b
    python -m training enlarge runs/patches/checkpoint runs/larger/checkpoint
    """
    from training.enlarge import enlarge as run

    run(old, new)


@main.command()
@click.argument("old", type=click.Path(path_type=Path, exists=True))
@click.argument("new", type=click.Path(path_type=Path))
def deepen(old: Path, new: Path) -> None:
    """Write the checkpoint OLD, which has fewer layers, to NEW with as many as today's, which add nothing yet.

    \b
    python -m training deepen runs/ships/checkpoint runs/deeper/checkpoint
    """
    from training.deepen import deepen as run

    run(old, new)


@main.command()
@click.argument("one", type=click.Path(path_type=Path, exists=True))
@click.argument("other", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--share", default=0.5, help="How far the way goes from ONE to OTHER: 0 is ONE, 1 is OTHER.")
def average(one: Path, other: Path, output: Path, share: float) -> None:
    """Write the mean of the checkpoints ONE and OTHER, which one run began with and ended with, to OUTPUT.

    \b
    python -m training average runs/fine/checkpoint runs/scales/checkpoint runs/mean/checkpoint
    """
    from training.average import average as run

    run(one, other, output, share)


@main.command()
@click.argument("exports", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--pictures", default=300, help="Pictures of each kind.")
@click.option("--processes", default=2, help="Processes that ask, one thread each.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the figures as JSON lines.")
def evaluate(exports: tuple[Path, ...], pictures: int, processes: int, output: Path | None) -> None:
    """Print how often the EXPORTS answer right, by task, on photographs, held-out pictures and two other renderers'.

    \b
    python -m training evaluate build/panel-fp32 build/panel-int8 build/panel-int4
    """
    from training.evaluate import run

    run(list(exports), pictures, processes, output)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("examples"))
def examples(folder: Path) -> None:
    """Draw the example pictures and their questions into FOLDER: those that the bundled model reads."""
    from edgevlm import VLM
    from training.examples import write_examples

    write_examples(folder, VLM("panel"))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("export/edgevlm_export/calibration"))
def calibration(folder: Path) -> None:
    """Draw the pictures into FOLDER that the exporter calibrates the vision part on, beside those that are there."""
    from training.examples import write_calibration

    write_calibration(folder)


@main.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("export/edgevlm_export/tune/replay.zip"))
def replay(path: Path) -> None:
    """Draw the scenes into PATH that `edgevlm tune` learns again beside a user's pictures."""
    from training.examples import write_replay

    write_replay(path)


if __name__ == "__main__":
    main()
