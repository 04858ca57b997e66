"""A checkpoint on edgevlm beside its peers as the image tokens grow, all in one alternating run.

    python -m benchmarks.make_seeded_checkpoint qwen3-vl-2b build/qwen3-vl-2b
    edgevlm export build/qwen3-vl-2b --int4 --vision-precision int8 -o build/edgevlm
    optimum-cli export openvino -m build/qwen3-vl-2b --task image-text-to-text --weight-format int4 --group-size 64 \
        build/optimum
    python -m benchmarks.gguf build/qwen3-vl-2b build/gguf
    python -m benchmarks.image_tokens FILE.jsonl --system optimum build/optimum PYTHON \
        --system genai build/optimum PYTHON --system edgevlm build/edgevlm PYTHON --system llama.cpp build/gguf PYTHON \
        --system torch-bf16 build/qwen3-vl-2b PYTHON [--rounds 4] [--image-tokens 64 256]

PYTHON is the interpreter of the environment that the system is installed in, beside Pillow and psutil. Pictures are
square and of `--unit` pixels for each image token, so that all systems make the same number of tokens of them;
`prompt_tokens` tells. A model that splits pictures into tiles is given their `--sides` in pixels instead. Each round
starts every system once, in a process of its own (`benchmarks.image_token_peers`). Rounds are added to those in
FILE.jsonl; see `benchmarks.rounds` for the order, the ratios, and when there are none. At the end, or alone with
`--rounds 0`, the medians are printed, the ratios being those to the first system in the file.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from benchmarks.image_token_peers import SYSTEMS
from benchmarks.rounds import System, reference, run, table
from edgevlm.bench.measure import sample_picture


def pictures(folder: Path, sides: Mapping[str, int]) -> list[str]:
    """Write two square pictures for each case, given its side in pixels; return them as `image_token_peers` reads."""
    with Image.open(sample_picture(folder)) as opened:
        sample = opened.convert("RGB")
    found = []
    for case, side in sides.items():
        paths = []
        for name, image in (("warm-up", ImageOps.mirror(sample)), ("picture", sample)):
            paths.append(folder / f"{name}-{side}.png")
            image.resize((side, side), Image.Resampling.BICUBIC).save(paths[-1])
        found.append(f"{case}={','.join(map(str, paths))}")
    return found


def add_options(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Add the options of a run, whatever it is of; `tokens` is the usual length of an answer."""
    parser.add_argument("output", type=Path, help="JSON Lines, added to")
    parser.add_argument("--system", nargs=3, action="append", default=[], metavar=("NAME", "MODEL", "PYTHON"))
    parser.add_argument("--rounds", type=int, default=4, help="even, so that each order comes as often")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout-s", type=float, default=1800, help="of a system in a round")


def measure(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    """Run the systems by turns on the cases, and what else is `given` to each child, and print the table."""
    if wrong := [name for name, *_ in arguments.system if name not in SYSTEMS]:
        raise SystemExit(f"--system {wrong[0]}: there are {', '.join(SYSTEMS)}")
    options = [str(arguments.tokens), str(arguments.threads)]
    systems = [
        System(
            f"{name} {Path(model).name}", [python, "-m", "benchmarks.image_token_peers", name, model, *options, *given]
        )
        for name, model, python in arguments.system
    ]
    head = {"options": ["--tokens", options[0], "--threads", options[1]]}
    rows = run(systems, arguments.rounds, arguments.output, head, arguments.timeout_s)
    print("\n".join(table(rows, reference(rows))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add_options(parser, tokens=32)
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[64, 256, 576, 1024], help="squares of integers")
    parser.add_argument("--unit", type=int, default=32, help="side of an image token in pixels")
    parser.add_argument("--sides", type=int, nargs="+", help="of square pictures in pixels, in place of --image-tokens")
    arguments = parser.parse_args()
    if wrong := [each for each in arguments.image_tokens if math.isqrt(each) ** 2 != each]:
        parser.error(f"--image-tokens takes squares of integers, not {wrong[0]}")
    sides = {f"{each} image tokens": math.isqrt(each) * arguments.unit for each in arguments.image_tokens}
    if arguments.sides:
        sides = {f"{each}x{each} pixels": each for each in arguments.sides}
    with tempfile.TemporaryDirectory() as scratch:
        measure(arguments, pictures(Path(scratch), sides))


if __name__ == "__main__":
    main()
