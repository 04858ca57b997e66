"""How many labelled pictures tuning needs: right answers of the bundled model before and after `edgevlm tune`.

    python -m benchmarks.tune_curve FOLDER
    python -m benchmarks.tune_curve FOLDER --factories kiln --labels 100 --rate 1e-3
    python -m benchmarks.tune_curve FOLDER --plot docs/tune_curve.png --table

Pictures are those of `benchmarks.factories`, drawn into FOLDER once. A smaller number of labels takes the first of the
larger one's. The test pictures have another seed, and tuning never sees them. Each run is tuned in a process of its own
and appended to FOLDER/curve.jsonl as soon as it is done; the same command skips it the next time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

import click

from benchmarks.factories import FACTORIES, write
from edgevlm import VLM, GenerationConfig, RuntimeConfig
from edgevlm.bench.conditions import describe_machine
from edgevlm.jobs.jsonl import append_rows, read_rows
from edgevlm.model_store import default_model
from edgevlm_export.tune import Scored, TuneOptions, TuneProgress, tune
from edgevlm_export.tune.learner import RATE
from edgevlm_export.tune.rows import Example, read_examples

LABELLED_SEED, TEST_SEED = 1, 2
"""Seeds of the pictures to learn from, and of those that are asked about before and after."""
Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of `edgevlm tune`, and what tells it from others."""

    factory: str
    labels: int
    minutes: float
    test: int
    rate: float
    """AdamW's highest rate."""
    seed: int

    @property
    def name(self) -> str:
        """The name of its folders."""
        return f"{self.factory}-{self.labels}-{self.minutes:g}min-{self.rate:g}-{self.seed}"

    def is_in(self, row: Row) -> bool:
        """Tell whether a row of the results is this run's."""
        return {name: row.get(name) for name in asdict(self)} == asdict(self)


class Clock:
    """Tells the stages of a run, and measures how long it learned, its checks while it learned included."""

    def __init__(self, name: str) -> None:
        self._name, self._last = name, ""
        self._began = self._ended = 0.0

    def __call__(self, progress: TuneProgress) -> None:
        """Take note of what is being done now."""
        now, is_learning = monotonic(), progress.stage == "learning"
        if is_learning and not self._began:
            self._began = now
        if self._began and not is_learning:
            self._ended = self._ended or now
        stage = progress.stage.partition(":")[0]
        if stage != self._last:
            self._last = stage
            click.echo(f"{self._name}: {stage}", err=True)

    @property
    def learning_s(self) -> float:
        """Seconds from the first step to the export."""
        return self._ended - self._began


def draw(folder: Path, factory: str, pictures: int, seed: int) -> list[str]:
    """Return the rows of a folder that has at least as many pictures, drawn if they are not there yet."""
    path = folder / "rows.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if len(rows) < pictures:
        click.echo(f"drawing {pictures} pictures of {factory} into {folder}", err=True)
        rows = write(folder, factory, pictures, seed).read_text(encoding="utf-8").splitlines()
    return rows


def first_rows(folder: Path, factory: str, pictures: int, seed: int) -> Path:
    """Return the path of the first `pictures` rows of a factory's pictures."""
    rows = draw(folder, factory, pictures, seed)
    path = folder / f"first-{pictures}.jsonl"
    path.write_text("".join(f"{row}\n" for row in rows[:pictures]), encoding="utf-8")
    return path


def score(model: Path, examples: Sequence[Example]) -> Scored:
    """Return how many examples an exported model answers right."""
    vlm, config = VLM(model, RuntimeConfig(cache=False)), GenerationConfig(max_new_tokens=64)
    answers = [vlm.generate(each.picture.pixels, each.question, config).text for each in examples]
    return Scored(sum(each.is_right(text) for each, text in zip(examples, answers, strict=True)), len(examples))


def measure(folder: Path, run: Run) -> Row:
    """Tune once, in this process, and return the row of the results."""
    from edgevlm_export.tune import learner

    learner.RATE = run.rate
    labelled = first_rows(folder / f"{run.factory}-labelled", run.factory, run.labels, LABELLED_SEED)
    test = read_examples(first_rows(folder / f"{run.factory}-test", run.factory, run.test, TEST_SEED))
    before = score(default_model(), test)
    clock, output = Clock(run.name), folder / "models" / run.name
    options = TuneOptions(run.minutes, keep_anyway=True, force=True, seed=run.seed)
    report = tune(labelled, output, options=options, on_progress=clock)
    row = asdict(run) | {"before": told(before), "after": told(score(output, test))}
    row |= {"known_before": told(report.known_before), "known_after": told(report.known_after)}
    row |= {"kept_apart_before": told(report.before), "kept_apart_after": told(report.after)}
    row |= {"learned": report.learned, "steps": report.steps, "learning_s": round(clock.learning_s, 1)}
    row |= {"ended_early": clock.learning_s < 0.98 * run.minutes * 60, "whole_s": round(report.seconds, 1)}
    return row | {"machine": describe_machine()}


def told(scored: Scored) -> Row:
    """Return right answers with their 95 % interval (Wilson)."""
    return asdict(scored) | {"interval": [round(bound, 4) for bound in scored.interval]}


def line(row: Row) -> str:
    """Return what a run gave, in a line."""
    ended = f", ended early ({row['minutes'] * 60:.0f} s were given)" if row["ended_early"] else ""
    return (
        f"{row['factory']}, {row['labels']} labels: {cell(row['before'])} before, {cell(row['after'])} after;"
        f" known scenes {cell(row['known_before'])} before, {cell(row['known_after'])} after;"
        f" {row['steps']} steps in {row['learning_s']:.0f} s{ended}"
    )


def cell(scored: Row) -> str:
    """Return right answers and their interval."""
    low, high = scored["interval"]
    return f"{scored['right']} of {scored['asked']} ({low:.0%} to {high:.0%})"


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table of the runs."""
    lines = [
        "| factory | labels | other pictures, before | after | known scenes, before | after | steps | learning, s |",
        "|---" * 8 + "|",
    ]
    names = series_names(rows)
    for name, row in sorted(zip(names, rows, strict=True), key=lambda each: (each[0], each[1]["labels"])):
        cells = [cell(row[each]) for each in ("before", "after", "known_before", "known_after")]
        early = ", ended early" if row["ended_early"] else ""
        lines.append(
            f"| {name} | {row['labels']} | {' | '.join(cells)} | {row['steps']} | {row['learning_s']:.0f}{early} |"
        )
    return "\n".join(lines)


def series_names(rows: Sequence[Row]) -> list[str]:
    """Return each run's factory, and those of its settings that are not the same in all runs."""
    settings: dict[str, Callable[[Any], str]] = {
        "minutes": "{:g} min".format,
        "rate": "rate {:g}".format,
        "seed": "seed {}".format,
        "test": "{} asked".format,
    }
    varied = [name for name in settings if len({row[name] for row in rows}) > 1]
    return [", ".join([row["factory"], *(settings[name](row[name]) for name in varied)]) for row in rows]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw right answers over labelled pictures, a line for each factory; the model as it is stands at 0."""
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for name, row in zip(series_names(rows), rows, strict=True):
        series[name] = series[name] or [(0, row["before"])]
        series[name].append((row["labels"], row["after"]))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ticks = sorted({0, *(row["labels"] for row in rows)})
    for index, (name, points) in enumerate(sorted(series.items())):
        points.sort(key=lambda each: each[0])
        at = [ticks.index(count) + 0.04 * (index - len(series) / 2) for count, _ in points]
        shares = [100 * each["right"] / each["asked"] for _, each in points]
        low = [share - 100 * each["interval"][0] for share, (_, each) in zip(shares, points, strict=True)]
        high = [100 * each["interval"][1] - share for share, (_, each) in zip(shares, points, strict=True)]
        axes.errorbar(at, shares, [low, high], fmt="o-", capsize=3, label=name)
    axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
    axes.set(xlabel="labelled pictures", ylabel="right answers, % (95 % interval)", ylim=(0, 102))
    axes.set_title("edgevlm tune, asked about other pictures")
    axes.legend(frameon=False, loc="best")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def numbers(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    """Return the numbers of a list with commas."""
    try:
        return [int(each) for each in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 30,100,300") from None


def chosen_factories(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    """Return the factories of a list with commas."""
    if unknown := [each for each in value.split(",") if each not in FACTORIES]:
        raise click.BadParameter(f"no such factory: {unknown[0]!r}; there are {', '.join(FACTORIES)}")
    return value.split(",")


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--factories", default="boiler,kiln,press", show_default=True, callback=chosen_factories)
@click.option("--labels", "counts", default="30,100,300", show_default=True, callback=numbers, help="At least 10.")
@click.option("--minutes", default=10.0, show_default=True, help="How long a run learns at most.")
@click.option("--test", default=200, show_default=True, help="Other pictures that are asked about; at least 10.")
@click.option("--rate", default=RATE, show_default=True, help="AdamW's highest rate.")
@click.option("--seed", default=0, show_default=True, help="Of the split and the order of learning.")
@click.option("--results", type=click.Path(path_type=Path), help="A file of rows.  [default: FOLDER/curve.jsonl]")
@click.option("--plot", "plot_to", type=click.Path(path_type=Path), help="Draw the runs that there are; tune nothing.")
@click.option("--table", "as_table", is_flag=True, help="Print the runs that there are as Markdown; tune nothing.")
def main(
    folder: Path,
    factories: list[str],
    counts: list[int],
    minutes: float,
    test: int,
    rate: float,
    seed: int,
    results: Path | None,
    plot_to: Path | None,
    as_table: bool,
) -> None:
    """Tune on few and on many labelled pictures of each factory, and ask about others; all goes into FOLDER."""
    results = results or folder / "curve.jsonl"
    rows = [row for row, _ in read_rows(results)]
    if plot_to or as_table:
        if not rows:
            raise click.ClickException(f"no runs in {results}; run it without --plot and --table first")
        if plot_to:
            plot(rows, plot_to)
        if as_table:
            click.echo(table(rows))
        return
    for factory in factories:
        draw(folder / f"{factory}-labelled", factory, max(counts), LABELLED_SEED)
        draw(folder / f"{factory}-test", factory, test, TEST_SEED)
    results.parent.mkdir(parents=True, exist_ok=True)
    for run in [Run(factory, count, minutes, test, rate, seed) for factory in factories for count in counts]:
        if any(map(run.is_in, rows)):
            click.echo(f"{run.name}: in {results} already", err=True)
            continue
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            row = pool.submit(measure, folder, run).result()
        append_rows(results, [row])
        click.echo(line(row))


if __name__ == "__main__":
    main()
