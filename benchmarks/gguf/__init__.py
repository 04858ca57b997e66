"""A checkpoint as llama.cpp reads it: `text.gguf`, `mmproj.gguf` and the chat template in one folder.

    python -m benchmarks.gguf CHECKPOINT OUT_DIR [--float32]

The matrices of the text part become Q4_0, its embedding table and head Q8_0, the vision part F16; with `--float32` all
stays as it is, to compare answers with transformers. Keys and names are those of llama.cpp's own converter. Tensors are
written one at a time. Needs `gguf`, torch and transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gguf.conversion import Conversion
from benchmarks.gguf.idefics3 import Idefics3
from benchmarks.gguf.lfm2_vl import Lfm2Vl
from benchmarks.gguf.paddleocr_vl import PaddleOcrVl
from benchmarks.gguf.qwen import Qwen3Vl, Qwen35

FAMILIES: dict[str, type[Conversion]] = {
    "idefics3": Idefics3,
    "lfm2_vl": Lfm2Vl,
    "paddleocr_vl": PaddleOcrVl,
    "qwen3_vl": Qwen3Vl,
    "qwen3_5": Qwen35,
}
"""By the `model_type` of config.json."""


def write(checkpoint: Path, folder: Path, float32: bool = False) -> None:
    """Write both parts and the chat template."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    FAMILIES[config["model_type"]](checkpoint, config, float32).write(folder)
