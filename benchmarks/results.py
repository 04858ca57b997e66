"""Where a benchmark's figures go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgevlm.bench import describe_machine


def write_result(output: Path | None, result: dict[str, Any]) -> None:
    """Write `result` with the machine's description as JSON, where a file was asked for."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": describe_machine(), **result}, indent=1, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")
