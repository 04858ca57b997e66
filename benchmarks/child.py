"""What a measured child process prints: a JSON line for its start, then one for each case, read by `benchmarks.rounds`.

Needs psutil and the standard library alone, because a child runs in the environment of the system that it measures.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgevlm import __version__
from edgevlm.bench.conditions import Meter
from edgevlm.metrics import peak_memory

START = "start"
"""The case that is the start of the process up to its first token."""
PACKAGES = {
    "optimum.intel": "optimum-intel",
    "openvino_genai": "openvino-genai",
    "openvino": "openvino",
    "xllamacpp": "xllamacpp",
    "onnxruntime_genai": "onnxruntime-genai",
    "onnxruntime": "onnxruntime",
    "transformers": "transformers",
    "torch": "torch",
}
"""Modules whose versions figures depend on, and the packages that they come in."""


def tell_start(first_token_at: float, meter: Meter) -> None:
    """Print the line of the start; `first_token_at` is the time of day of the first token."""
    tell_case(START, {"first_token_at": first_token_at}, meter)


def tell_case(case: str, figures: Mapping[str, Any], meter: Meter) -> None:
    """Print the line of a case: its figures and the conditions of what was measured."""
    row = {"case": case, **figures, "conditions": meter.conditions.to_dict(), **memory(), "versions": versions()}
    print(json.dumps(row, ensure_ascii=False), flush=True)


def versions() -> dict[str, str]:
    """Return the versions of what this process has imported."""
    found = {"edgevlm": __version__} if "edgevlm.vlm" in sys.modules else {}
    found |= {package: version(package) for module, package in PACKAGES.items() if module in sys.modules}
    return found | {"python": platform.python_version()}


def memory() -> dict[str, int]:
    """Return peak memory in bytes and, on Linux, the resident memory now and how much of it is no mapped file."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {"peak_memory_bytes": peak_memory()}
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
    names = {"rss_bytes": "VmRSS", "anonymous_bytes": "RssAnon"}
    now = {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}
    return {"peak_memory_bytes": peak_memory(), **now}
