"""How the figures grow with tiles, context, threads, and with questions about one picture.

python -m benchmarks.scaling build/side_by_side/edgevlm-int4 [-n 3] [-o benchmarks/results/scaling.json]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.results import write_result
from edgevlm import VLM, GenerationConfig
from edgevlm.bench.measure import Sweep, bench, perturb, sample_picture
from edgevlm.families.base import RGB
from edgevlm.inputs.image import load_image

VIEWS = (1, 5, 13, 17)
CONTEXTS = (100, 900, 2000, 6000)
QUESTIONS = (1, 2, 4)


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
    parser.add_argument("-n", "--repetitions", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    threads = tuple(range(1, (os.cpu_count() or 1) + 1))
    tokens = VLM(arguments.model).processor.family.tokens_per_view
    limits = tuple(views * tokens for views in VIEWS)
    sweeps = {
        "tiles": Sweep(details=("high",), max_image_tokens=limits, new_tokens=8, repetitions=arguments.repetitions),
        "context": Sweep(details=("low",), prompt_tokens=CONTEXTS, new_tokens=16, repetitions=arguments.repetitions),
        "threads": Sweep(details=("low",), threads=threads, new_tokens=16, repetitions=arguments.repetitions),
    }
    found: dict[str, Any] = {"model": arguments.model.name}
    with tempfile.TemporaryDirectory() as scratch:
        picture = sample_picture(Path(scratch))
        image = load_image(picture)[:, :1200]  # square: up to 4 x 4 tiles and the global view
        for name, sweep in sweeps.items():
            found[name] = [point.to_dict() for point in bench(arguments.model, image, picture, sweep, print).points]
        found["questions"] = questions(arguments.model, image, arguments.repetitions)
    for name in sweeps:
        for point in found[name]:
            figures = {key: round(each["median"], 4) for key, each in point["figures"].items()}
            print(name, point["views"], "views", point["prompt_tokens"], "tokens", point["threads"], "threads", figures)
    print(*found["questions"], sep="\n")
    write_result(arguments.output, found)


if __name__ == "__main__":
    main()
