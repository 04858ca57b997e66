"""Pictures that the bundled model learned from, so that tuning it makes it forget less."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from edgevlm.inputs.image import load_picture
from edgevlm_export.tune.rows import Example

REPLAY = Path(__file__).parent / "replay.zip"
"""Scenes as `python -m training replay` draws them: JPEG files, and `rows.jsonl` as `edgevlm tune` takes it."""
KEPT_APART = 0.2


def replayed() -> tuple[list[Example], list[Example]]:
    """Return the examples to learn again, and those that tell what was forgotten."""
    with zipfile.ZipFile(REPLAY) as archive:
        rows = [json.loads(line) for line in archive.read("rows.jsonl").decode("utf-8").splitlines()]
        pictures = {name: load_picture(archive.read(name)) for name in {row["image"] for row in rows}}
    names = sorted(pictures)
    apart = set(names[: round(len(names) * KEPT_APART)])
    examples = [
        Example(pictures[row["image"]], REPLAY, row["question"], row["answer"], row.get("tolerance") or 0.0)
        for row in rows
    ]
    sides = [row["image"] in apart for row in rows]
    learned = [each for each, is_apart in zip(examples, sides, strict=True) if not is_apart]
    return learned, [each for each, is_apart in zip(examples, sides, strict=True) if is_apart]
