"""Qwen-VL on edgevlm beside its peers as the image tokens grow, all in one alternating run.

    python -m benchmarks.make_qwen_checkpoint build/qwen3-vl-2b
    edgevlm export build/qwen3-vl-2b --int4 --vision-precision int8 -o build/edgevlm
    optimum-cli export openvino -m build/qwen3-vl-2b --task image-text-to-text --weight-format int4 --group-size 64 \
        build/optimum
    python -m benchmarks.image_tokens FILE.jsonl --system optimum build/optimum PYTHON \
        --system genai build/optimum PYTHON --system edgevlm build/edgevlm PYTHON [--rounds 3]

PYTHON is the interpreter of the environment that the system is installed in. Pictures are square and of `--unit`
pixels for each image token, so that all systems make the same number of tokens of them; `prompt_tokens` tells. Each
round starts every system once, in a process of its own (`benchmarks.image_token_peers`), in turned order every other
round. When a system ends, its lines go to FILE.jsonl, where rounds are added to those in it; one that fails has a line
that says why. At the end, or alone with `--rounds 0`, the medians are printed, and in brackets the median
of each round's ratio to the first system named in the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from benchmarks.image_token_peers import SYSTEMS
from edgevlm.bench.measure import describe_machine, sample_picture
from edgevlm.jobs.jsonl import append_rows, read_rows

COLUMNS = {
    "ttft_s": "TTFT s",
    "second_ttft_s": "second question s",
    "tokens_per_s": "tokens/s",
    "start_to_first_token_s": "start s",
    "peak_rss_bytes": "peak RSS MB",
    "anonymous_bytes": "allocated MB",
}


class System(NamedTuple):
    """What is run: a name of `SYSTEMS`, its model's folder, and its environment's interpreter."""

    name: str
    model: str
    python: str


def pictures(folder: Path, sizes: Sequence[int], unit: int) -> dict[int, str]:
    """Write two pictures for each number of image tokens, a square; return their paths as `image_token_peers` reads."""
    with Image.open(sample_picture(folder)) as opened:
        sample = opened.convert("RGB")
    pairs = {}
    for tokens in sizes:
        side = math.isqrt(tokens) * unit
        paths = []
        for name, image in (("warm-up", ImageOps.mirror(sample)), ("picture", sample)):
            paths.append(folder / f"{name}-{tokens}.png")
            image.resize((side, side), Image.Resampling.BICUBIC).save(paths[-1])
        pairs[tokens] = ",".join(map(str, paths))
    return pairs


def lines(system: System, pairs: dict[int, str], options: Sequence[str], limit_s: float) -> Iterator[dict[str, Any]]:
    """Run a system once; yield its start, then its figures for each number of image tokens.

    Raises `RuntimeError` with its last line of error, `TimeoutExpired` after `limit_s`.
    """
    module = ["-m", "benchmarks.image_token_peers", system.name, system.model]
    started = time.time()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        child = subprocess.Popen(
            [system.python, *module, *options, *pairs.values()], stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
        try:
            out, _ = child.communicate(timeout=limit_s)
        finally:
            child.kill()
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        for number, line in zip([0, *pairs], found, strict=False):
            start = {} if number else {"start_to_first_token_s": line.pop("first_token_at") - started}
            yield {"image_tokens": number, **start, **line}
        if child.returncode:
            errors.seek(0)
            raise RuntimeError((errors.read().strip() or f"exit code {child.returncode}").splitlines()[-1])


def measure(system: System, number: int, pairs: dict[int, str], options: Sequence[str], limit_s: float) -> list[Any]:
    """Return the lines of a system in a round, the failure last if it failed."""
    name = {"round": number, "system": f"{system.name} {Path(system.model).name}"}
    found: list[dict[str, Any]] = []
    try:
        found += ({**name, **line} for line in lines(system, pairs, options, limit_s))
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        found.append({**name, "failed": str(error)[:300]})
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return medians and ratios as Markdown."""
    rows = [row for row in rows if "system" in row]
    measured = [row for row in rows if "failed" not in row]
    names = list(dict.fromkeys(row["system"] for row in rows))
    text = ["| image tokens | system | prompt tokens | " + " | ".join(COLUMNS.values()) + " |"]
    text.append("|" + "---|" * (3 + len(COLUMNS)))
    for tokens in sorted({row["image_tokens"] for row in measured}):
        by_round = {
            name: {row["round"]: row for row in measured if (row["system"], row["image_tokens"]) == (name, tokens)}
            for name in names
        }
        for name, own in by_round.items():
            if own:
                cells = (_cell(own, by_round[names[0]], column) for column in COLUMNS)
                prompt = next(iter(own.values())).get("prompt_tokens", "")
                text.append(f"| {tokens or 'start'} | {name} | {prompt} | " + " | ".join(cells) + " |")
    text += [f"failed: round {row['round']} {row['system']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join(text)


def _cell(own: dict[int, Any], base: dict[int, Any], column: str) -> str:
    values = [row[column] for row in own.values() if column in row]
    if not values:
        return ""
    value = median(values) / (1e6 if column.endswith("_bytes") else 1)
    ratios = [row[column] / base[number][column] for number, row in own.items() if number in base and column in row]
    return f"{value:.4g}" + (f" ({median(ratios):.2f}x)" if ratios else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="JSON Lines, added to")
    parser.add_argument("--system", nargs=3, action="append", default=[], metavar=("NAME", "MODEL", "PYTHON"))
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[64, 256, 576, 1024], help="squares of integers")
    parser.add_argument("--unit", type=int, default=32, help="side of an image token in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout-s", type=float, default=1800, help="of a system in a round")
    arguments = parser.parse_args()
    if wrong := [each for each in arguments.image_tokens if math.isqrt(each) ** 2 != each]:
        parser.error(f"--image-tokens takes squares of integers, not {wrong[0]}")
    if wrong := [name for name, *_ in arguments.system if name not in SYSTEMS]:
        parser.error(f"--system {wrong[0]}: there are {', '.join(SYSTEMS)}")
    systems = [System(*each) for each in arguments.system]
    rows = [row for row, _ in read_rows(arguments.output)]
    done = max((row.get("round", 0) for row in rows), default=0)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    options = [str(arguments.tokens), str(arguments.threads)]
    with tempfile.TemporaryDirectory() as scratch:
        if not rows:
            append_rows(arguments.output, [{"machine": describe_machine(), "options": options}])
        pairs = pictures(Path(scratch), arguments.image_tokens, arguments.unit)
        for number in range(done + 1, done + arguments.rounds + 1):
            for system in systems if number % 2 else reversed(systems):
                for row in measure(system, number, pairs, options, arguments.timeout_s):
                    rows.append(row)
                    append_rows(arguments.output, [row])
                    print(json.dumps(row), file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
