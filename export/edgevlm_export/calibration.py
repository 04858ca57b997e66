"""Pictures and questions to calibrate on: the shipped set, a folder, or a JSONL of a user's own.

A JSONL line is `{"image": "photo.jpg", "question": "...", "answer": "..."}`; the image may be absent, and so may the
answer. A line of an image alone is for the vision submodel only. Paths are relative to the file. A folder holds a
`calibration.jsonl`, or just pictures, which are then asked general questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm.errors import ExportError
from edgevlm.inputs.image import image_suffixes

SHIPPED = Path(__file__).parent / "calibration"
VISION_TILES, VISION_PIXELS, VISION_WIDTH = 8, 1_600_000, 576
"""So many tiles calibrate activations at most, or tiles of so many pixels, whichever is more; a model narrower than
`VISION_WIDTH`, whose tiles cost less, has as many more. On 4 pictures the default model once lost 1.8 points of right
answers, on 24 it loses none; SmolVLM-256M's shape, 576 wide, is as near to its reference on 8 tiles of 512x512 as on 24
(cosine 0.9996, 0.9995), and each takes seconds."""
_JSONL = "calibration.jsonl"
_QUESTIONS = ("Describe this picture.", "What is in this picture?", "What does the text say?", "How many are there?")


@dataclass(frozen=True)
class Pair:
    """A question, with or without picture and answer; without a question, a picture for the vision submodel."""

    question: str
    image: Path | None = None
    answer: str = ""


def load_pairs(source: Path | None = None) -> list[Pair]:
    """Return the pairs of `source`, a folder or JSONL; None is the shipped set. Raises `ExportError`."""
    source = source or SHIPPED
    try:
        pairs = _read(source)
    except OSError as error:
        raise ExportError(f"the calibration set {source} cannot be read: {error.strerror or error}") from None
    if not pairs:
        raise ExportError(f"the calibration set {source} is empty")
    return pairs


def _read(source: Path) -> list[Pair]:
    if source.is_dir() and (source / _JSONL).is_file():
        source = source / _JSONL
    if source.is_file():
        return list(_read_jsonl(source))
    if source.is_dir():
        pictures = sorted(path for path in source.iterdir() if _is_picture(path))
        return [Pair(_QUESTIONS[i % len(_QUESTIONS)], path) for i, path in enumerate(pictures)]
    raise ExportError(f"no calibration set {source}: neither a folder nor a JSONL file")


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes() and not path.name.startswith(".") and path.is_file()


def _read_jsonl(path: Path) -> Iterator[Pair]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ExportError(f"the calibration set {path} is not text in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image = path.parent / row["image"] if row.get("image") else None
            pair = Pair(str(row.get("question", "") if image else row["question"]), image, str(row.get("answer") or ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ExportError(f'{path}, line {number}: not {{"image": ..., "question": ...}}') from None
        if image is not None and not image.is_file():
            raise ExportError(f"{path}, line {number}: no such picture: {image}")
        yield pair


def with_questions(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that the language model can be calibrated on."""
    return [pair for pair in pairs if pair.question]


def verification_pairs(pairs: Sequence[Pair]) -> dict[str, Pair]:
    """Return the first question about a picture, if there is one, and the first without, or one of our own."""
    picture = next((pair for pair in with_questions(pairs) if pair.image), None)
    text = next((pair for pair in pairs if not pair.image), Pair("What is the capital of France?"))
    return {"picture": picture, "text": text} if picture else {"text": text}
