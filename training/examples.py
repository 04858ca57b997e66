"""The pictures under `examples/`: held-out ones, each with a question and what is true about it."""

from __future__ import annotations

import json
from pathlib import Path

from training.evaluate import held_out

CHOSEN = {
    "display": 2,
    "gauge": 2,
    "light": 3,
    "count": 1,
    "missing": 5,
    "label": 4,
    "chart": 0,
    "shape": 2,
}
"""Kind of scene and number of the held-out picture."""


def write_examples(folder: Path) -> None:
    """Write one picture of each kind, and `questions.jsonl` with image, question and answer a line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, index in CHOSEN.items():
        scene = held_out(name, index)
        scene.image.save(folder / f"{name}.png", optimize=True)
        lines += [
            {"image": f"{name}.png", "question": pair.question, "answer": pair.answer, "tolerance": pair.tolerance}
            for pair in scene.pairs
        ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
