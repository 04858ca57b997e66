"""JSON files of checkpoints, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
