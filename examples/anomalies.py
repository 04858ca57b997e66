"""A time series in a CSV file, plotted to a picture, and judged by looking at it.

python -m examples.anomalies pressure.csv -m MODEL      (needs matplotlib; without a file, a series is made up)
"""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from edgevlm import VLM, Constraint

QUESTION = "This is a measured signal over time. Is there an anomaly in it, of what kind, and where?"
SCHEMA = {
    "type": "object",
    "properties": {
        "anomaly": {"type": "boolean"},
        "kind": {"enum": ["none", "spike", "drop", "step", "drift", "flat line"]},
        "where": {"enum": ["nowhere", "beginning", "middle", "end"]},
    },
    "required": ["anomaly", "kind", "where"],
    "additionalProperties": False,
}
Series = npt.NDArray[np.float64]


def read_series(path: Path) -> Series:
    """Return a CSV file's last column as numbers, without its heading."""
    with path.open(newline="", encoding="utf-8") as file:
        cells = [row[-1] for row in csv.reader(file) if row]
    try:
        float(cells[0])
    except (ValueError, IndexError):
        cells = cells[1:]
    return np.array([float(cell) for cell in cells])


def made_up(spike: bool = True) -> Series:
    """Return a noisy wave, with a spike two thirds of the way along."""
    random = np.random.default_rng(1)
    series = np.sin(np.linspace(0, 18, 300)) + random.normal(0, 0.08, 300)
    if spike:
        series[195:200] += 4
    return np.asarray(series)


def plot(series: Series) -> bytes:
    """Return a plain plot as a PNG: one thick line and few labels, for a small model sees little of more."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.12, 5.12), dpi=100)
    axes = figure.add_subplot()
    axes.plot(series, linewidth=2, color="black")
    axes.set(xlabel="time", ylabel="value")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def judge(vlm: VLM, picture: bytes) -> dict[str, Any]:
    """Return the model's judgement, and how likely it finds an anomaly. Raises `EdgeVLMError`."""
    answer = vlm.generate(picture, QUESTION, constraint=Constraint.json_schema(SCHEMA))
    scores = vlm.score(picture, "Is there an anomaly in this signal?", ["yes", "no"])
    return json.loads(answer.text) | {"probability": round(scores.probabilities["yes"], 3)}


@click.command()
@click.argument("table", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("-m", "--model")
@click.option("--picture", type=click.Path(path_type=Path), help="Also keep the plot here.")
def main(table: Path | None, model: str | None, picture: Path | None) -> None:
    """Judge the series in TABLE."""
    data = plot(read_series(table) if table else made_up())
    if picture:
        picture.write_bytes(data)
    click.echo(json.dumps(judge(VLM(model), data)))


if __name__ == "__main__":
    main()
