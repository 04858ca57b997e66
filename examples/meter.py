"""A picture of a meter to a row in a CSV file.

python -m examples.meter gauge.jpg -m MODEL -o readings.csv
"""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from edgevlm import VLM, Constraint, EdgeVLMError

QUESTION = "Which instrument is this, and what does it read?"
SCHEMA = {
    "type": "object",
    "properties": {
        "instrument": {"enum": ["gauge", "display", "counter", "thermometer"]},
        "reading": {"type": "number", "minimum": -999, "maximum": 99999, "multipleOf": 0.1},
        "unit": {"enum": ["bar", "°C", "V", "A", "kWh", "m3", "none"]},
    },
    "required": ["instrument", "reading", "unit"],
    "additionalProperties": False,
}


def read_meter(vlm: VLM, picture: Path) -> dict[str, Any]:
    """Return what the model reads. Raises `EdgeVLMError`."""
    answer = vlm.generate(picture, QUESTION, constraint=Constraint.json_schema(SCHEMA))
    return dict(json.loads(answer.text))


def append(table: Path, picture: Path, found: dict[str, Any]) -> None:
    """Put a reading at the end of a CSV file, under a heading if it is the first."""
    row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "picture": picture.name} | found
    new = not table.exists()
    with table.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-m", "--model")
@click.option("-o", "--output", default="readings.csv", type=click.Path(path_type=Path))
def main(pictures: tuple[Path, ...], model: str | None, output: Path) -> None:
    """Read the meters in PICTURES."""
    vlm = VLM(model)
    for picture in pictures:
        try:
            found = read_meter(vlm, picture)
        except EdgeVLMError as error:
            click.echo(f"{picture}: {error}", err=True)
            continue
        append(output, picture, found)
        click.echo(f"{picture}: {found['reading']} {found['unit']}")


if __name__ == "__main__":
    main()
