"""Seconds a page: a page of A4 read by a model for documents, on edgevlm beside its peers, in one alternating run.

    python -m benchmarks.make_seeded_checkpoint granite-docling-258m build/checkpoint
    python -m benchmarks.gguf build/checkpoint build/gguf
    edgevlm export build/checkpoint --int4 --no-verify -o build/int4
    python -m benchmarks.pages granite-docling-258m FILE.jsonl --system llama.cpp build/gguf PYTHON
        --system torch-bf16 build/checkpoint PYTHON --system edgevlm build/int4 PYTHON [--rounds 4] [--dpi 144]

Every system reads the same page, as large as `edgevlm convert` rasterizes it, with the question that `edgevlm convert`
asks the family, and makes exactly 500 tokens after the first (`--tokens`). What else there is to know is that of
`benchmarks.image_tokens`; a strip of the page warms up. Weights are noise, and noise repeats itself more than a page
does: `edgevlm` drafts nothing, `edgevlm-drafts` tells what drafts make of it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.image_tokens import add_options, measure
from edgevlm.families.base import DOCTAGS_PROMPTS
from edgevlm.families.paddleocr_vl import PaddleOcrVL
from edgevlm.inputs.pages import DPI

QUESTIONS = {
    "granite-docling-258m": DOCTAGS_PROMPTS["page"],
    "paddleocr-vl-0.9b": PaddleOcrVL.page_prompts["page"],
}
"""What `edgevlm convert` asks each model about a page."""
A4_INCHES = (210 / 25.4, 297 / 25.4)
WORDS = "The quick brown fox jumps over the lazy dog while five wizards box and pack my jug with liquor"


def lines() -> Iterator[str]:
    """Yield the lines of a page without end: paragraphs of seven, each under its heading."""
    words = cycle(WORDS.split())
    for number in range(1, 100):
        yield f"{number}. {' '.join(islice(words, 3)).capitalize()}"
        for _ in range(7):
            yield " ".join(islice(words, 13))
        yield ""


def draw_page(dpi: int) -> Image.Image:
    """Return a page of A4 in print of eleven points, black on white."""
    width, height = (round(side * dpi) for side in A4_INCHES)
    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11 * dpi / 72)
    margin, step = dpi * 3 // 4, dpi * 14 / 72
    places = int((height - 2 * margin) / step)
    for number, line in enumerate(islice(lines(), places)):
        draw.text((margin, margin + number * step), line, "black", font)
    return page


def pictures(folder: Path, dpi: int) -> tuple[Path, Path]:
    """Write the page and, to warm up, its upper eighth; return the paths, the strip's first."""
    page = draw_page(dpi)
    paths = folder / "warm-up.png", folder / "page.png"
    page.crop((0, 0, page.width, page.width // 8)).save(paths[0])
    page.save(paths[1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", choices=QUESTIONS)
    add_options(parser, tokens=501)
    parser.add_argument("--dpi", type=int, default=DPI, help="dots per inch of the page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        warm_up, page = pictures(Path(scratch), arguments.dpi)
        case = f"{arguments.model}, {arguments.dpi} dpi={warm_up},{page}"
        measure(arguments, [case, "--question", QUESTIONS[arguments.model]])


if __name__ == "__main__":
    main()
