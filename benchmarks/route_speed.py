"""How fast two exports of one model run, side by side: vision, prefill, decoding.

    python -m benchmarks.route_speed FIRST SECOND [--rounds 9] [--context 900] [--output FILE.json]
    python -m benchmarks.route_speed MERGED PLAIN --threads 1 --cpu-time --rounds 25

The two take turns within each round; the figures are medians of each and of the ratio FIRST / SECOND of their times.
`--cpu-time` counts the process's CPU time, which other load on the machine moves less than the wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeAlias

import numpy as np

from benchmarks.results import write_result
from edgevlm import VLM, RuntimeConfig
from edgevlm_export.samples import pixel_views

Clock: TypeAlias = Callable[[], float]


def timed(work: Callable[[], object], clock: Clock) -> float:
    """Return the seconds that `work` takes."""
    started = clock()
    work()
    return clock() - started


def times(vlm: VLM, context: int, clock: Clock, tokens: int = 48) -> dict[str, float]:
    """Return the seconds of one tile, of a prefill of `context` tokens, and of a token after it."""
    session = vlm.language_model.session()
    embeds = session.embed(np.arange(context) % min(1000, vlm.manifest.vocab_size - 100) + 100)
    height, width = vlm.processor.family.view_size or (512, 512)
    views = pixel_views(np.random.default_rng(0).normal(size=(1, 3, height, width)).astype(np.float32))

    def decode() -> None:
        for token in range(tokens):
            session.step([100 + token])

    return {
        "vision_tile": timed(lambda: list(vlm.vision.encode(views)), clock),
        "prefill": timed(lambda: session.prefill(embeds), clock),
        "decode": timed(decode, clock) / tokens,
    }


def compare(first: VLM, second: VLM, context: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """Return medians of both and of their ratio, the order turning from round to round."""
    for vlm in (first, second):
        times(vlm, context, clock)
    pairs = []
    for number in range(rounds):
        order = (first, second) if number % 2 == 0 else (second, first)
        found = {id(vlm): times(vlm, context, clock) for vlm in order}
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
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config = RuntimeConfig(device="CPU", cache=False, threads=arguments.threads)
    clock = process_time if arguments.cpu_time else perf_counter
    models = VLM(arguments.first, config), VLM(arguments.second, config)
    result = {
        "benchmark": "route_speed",
        "context": arguments.context,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "clock": clock.__name__,
        "exports": {name: dict(vlm.manifest.export_options) for name, vlm in zip("ab", models, strict=True)},
        "times": compare(*models, arguments.context, arguments.rounds, clock),
    }
    print(json.dumps(result, indent=1))
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
