"""How the figures grow with tiles, context, threads, and with questions about one picture.

    python -m benchmarks.scaling build/side_by_side/edgevlm-int4 [-n 3] [-o benchmarks/results/scaling.json]
        [--sweeps tiles context] [--views 1 5 13] [--contexts 100 900 4000]

The picture has 1600x1200 pixels, which tiled families split into 3 x 4 tiles and a global view. One that keeps a
picture's shape gets 64 image tokens for each view asked for. A context is at least that of one view and the question.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.results import write_result
from edgevlm import VLM, GenerationConfig
from edgevlm.bench.measure import Sweep, bench, perturb, sample_picture
from edgevlm.families.base import RGB
from edgevlm.inputs.image import load_image

SWEEPS = ("tiles", "context", "threads")
QUESTIONS = (1, 2, 4)
TOKENS_PER_VIEW = 64
"""Image tokens for a view of a family whose views have any number of them."""


def sweeps(model: Path, views: Sequence[int], contexts: Sequence[int], repetitions: int) -> dict[str, Sweep]:
    """Return the sweeps by name."""
    tokens = getattr(VLM(model).processor.family, "tokens_per_view", TOKENS_PER_VIEW)
    threads = tuple(range(1, (os.cpu_count() or 1) + 1))
    limits = tuple(count * tokens for count in views)
    one_view: dict[str, Any] = {"details": ("low",), "max_image_tokens": (tokens,), "repetitions": repetitions}
    return {
        "tiles": Sweep(details=("high",), max_image_tokens=limits, new_tokens=8, repetitions=repetitions),
        "context": Sweep(prompt_tokens=tuple(contexts), new_tokens=16, **one_view),
        "threads": Sweep(threads=threads, new_tokens=16, **one_view),
    }


def questions(model: Path, image: RGB, repetitions: int) -> list[dict[str, Any]]:
    """Return the seconds for 1 to 4 questions about one picture never seen before, eight tokens each."""
    vlm, options = VLM(model), GenerationConfig(max_new_tokens=8)
    rows = []
    for number in range(repetitions):
        for count in QUESTIONS:
            picture = perturb(image, 10 * number + count)
            started = perf_counter()
            for index in range(count):
                vlm.generate(picture, f"Question {index}: what is shown here?", options)
            rows.append({"questions": count, "seconds": perf_counter() - started})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sweeps", nargs="+", choices=(*SWEEPS, "questions"), default=[*SWEEPS, "questions"])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 5, 13], help="at most, rising")
    parser.add_argument("--contexts", type=int, nargs="+", default=[100, 900, 4000], help="rising")
    parser.add_argument("-n", "--repetitions", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    every = sweeps(arguments.model, arguments.views, arguments.contexts, arguments.repetitions)
    found: dict[str, Any] = {"model": arguments.model.resolve().name, **{name: [] for name in (*every, "questions")}}
    with tempfile.TemporaryDirectory() as scratch:
        picture = sample_picture(Path(scratch))
        image = load_image(picture)
        for name in (name for name in SWEEPS if name in arguments.sweeps):
            report = bench(arguments.model, image, picture, every[name], print)
            found[name] = [point.to_dict() for point in report.points]
        if "questions" in arguments.sweeps:
            found["questions"] = questions(arguments.model, image, arguments.repetitions)
    for name in every:
        for point in found[name]:
            figures = {key: round(each["median"], 4) for key, each in point["figures"].items()}
            print(name, point["views"], "views", point["prompt_tokens"], "tokens", point["threads"], "threads", figures)
    print(*found["questions"], sep="\n")
    write_result(arguments.output, found)


if __name__ == "__main__":
    main()
