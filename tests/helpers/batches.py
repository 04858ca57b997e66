"""Jobs files, answers, and `edgevlm batch` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from edgevlm import GenerationConfig
from edgevlm.families.base import ImageBudget
from tests.helpers.command import COMMAND

QUESTION = "What is in this picture?"


SHORT = GenerationConfig(max_new_tokens=8)


LOW = ImageBudget("low")


OPTIONS = ["--device", "CPU", "--inference-precision", "f32", "--no-cache", "--max-new-tokens", "8", "--detail", "low"]


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows, JSON or bytes as they are, as lines."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(count: int) -> list[dict[str, Any]]:
    return [{"id": n, "image": f"{n % 12}.png", "question": f"{QUESTION} Number {n}."} for n in range(count)]


def start(folder: Path, exported: Path, *options: str) -> subprocess.Popen[bytes]:
    arguments = ["batch", "jobs.jsonl", "-o", "out.jsonl", "-m", str(exported), *OPTIONS, *options]
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition: Any, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.005)
