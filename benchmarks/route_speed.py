"""How fast two exports of one model run, side by side: vision, prefill, decoding.

    python -m benchmarks.route_speed FIRST SECOND [--rounds 9] [--context 900] [--output FILE.json]

The two take turns within each round; the figures are medians of each and of the ratio FIRST / SECOND of their times.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.results import write_result
from edgevlm import VLM, RuntimeConfig
from edgevlm_export.samples import pixel_views


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    started = perf_counter()
    work()
    return perf_counter() - started


def times(vlm: VLM, context: int, tokens: int = 48) -> dict[str, float]:
    """Return the seconds of one tile, of a prefill of `context` tokens, and of a token after it."""
    session = vlm.language_model.session()
    embeds = session.embed(np.arange(context) % 1000 + 100)
    height, width = vlm.processor.family.view_size or (512, 512)
    views = pixel_views(np.random.default_rng(0).normal(size=(1, 3, height, width)).astype(np.float32))

    def decode() -> None:
        for token in range(tokens):
            session.step([100 + token])

    return {
        "vision_tile": timed(lambda: list(vlm.vision.encode(views))),
        "prefill": timed(lambda: session.prefill(embeds)),
        "decode": timed(decode) / tokens,
    }


def compare(first: VLM, second: VLM, context: int, rounds: int) -> dict[str, Any]:
    """Return medians of both and of their ratio, the order turning from round to round."""
    for vlm in (first, second):
        times(vlm, context)
    pairs = []
    for number in range(rounds):
        order = (first, second) if number % 2 == 0 else (second, first)
        found = {id(vlm): times(vlm, context) for vlm in order}
        pairs.append((found[id(first)], found[id(second)]))
    return {
        name: {
            "first_ms": round(1000 * statistics.median(one[name] for one, _ in pairs), 2),
            "second_ms": round(1000 * statistics.median(two[name] for _, two in pairs), 2),
            "ratio": round(statistics.median(one[name] / two[name] for one, two in pairs), 3),
        }
        for name in pairs[0][0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--context", type=int, default=900)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config = RuntimeConfig(device="CPU", cache=False)
    models = VLM(arguments.first, config), VLM(arguments.second, config)
    result = {
        "benchmark": "route_speed",
        "context": arguments.context,
        "rounds": arguments.rounds,
        "exports": {name: dict(vlm.manifest.export_options) for name, vlm in zip("ab", models, strict=True)},
        "times": compare(*models, arguments.context, arguments.rounds),
    }
    print(json.dumps(result, indent=1))
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
