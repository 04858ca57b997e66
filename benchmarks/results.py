"""Where a benchmark's figures go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from edgevlm.bench.conditions import describe_machine


def write_result(output: Path | None, result: dict[str, Any]) -> None:
    """Write `result` with the machine's description as JSON, where a file was asked for."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": describe_machine(), **result}, indent=1, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")


def tell_spreads(model: Path, found: Mapping[str, Sequence[float]], output: Path | None, **setting: str) -> None:
    """Print median and range of each figure, and write them all, and their setting, where a file was asked for."""
    for name, values in found.items():
        print(f"{name:47} {median(values):8.3f}   {min(values):8.3f} to {max(values):8.3f}")
    write_result(output, {"model": model.name, **setting, "figures": found})
