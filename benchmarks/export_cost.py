"""Wall time and peak memory of an INT4 export, edgevlm beside optimum-cli, alternating in one run.

    python -m benchmarks.export_cost CHECKPOINT [--repeat 3]

edgevlm's own route runs without torch in reach, as `pip install 'edgevlm[export]'` leaves it. Memory is the resident
size of the whole process tree, sampled alike for all. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.export_memory import command as edgevlm_command
from edgevlm_export.memory import PeakMemory

WEIGHTS_ALONE = ["--vision-precision", "int8"]
"""What compresses weights alone, as optimum-cli does."""
SAME_WORK = [*WEIGHTS_ALONE, "--no-scale-estimation", "--no-verify"]
"""What leaves out all that optimum-cli does not do: it compresses without data, and compares nothing."""


def commands(checkpoint: Path, output: Path) -> dict[str, list[str]]:
    """Return the command line of each system."""
    scripts = Path(sys.executable).parent
    optimum = [str(scripts / "optimum-cli"), "export", "openvino", "-m", str(checkpoint)]
    optimum += ["--task", "image-text-to-text", "--weight-format", "int4", "--group-size", "64", str(output)]
    return {
        "optimum-cli": optimum,
        "edgevlm": edgevlm_command("native", checkpoint, output, []),
        "edgevlm --vision-precision int8": edgevlm_command("native", checkpoint, output, WEIGHTS_ALONE),
        "the same, --no-verify": edgevlm_command("native", checkpoint, output, [*WEIGHTS_ALONE, "--no-verify"]),
        "edgevlm, no more than optimum-cli does": edgevlm_command("native", checkpoint, output, SAME_WORK),
        "edgevlm --via optimum": edgevlm_command("optimum", checkpoint, output, []),
    }


def measure(command: list[str]) -> tuple[float, int]:
    """Return the wall time in seconds and the tree's peak memory in bytes, this process excluded."""
    started = perf_counter()
    with PeakMemory(include_self=False) as memory:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return perf_counter() - started, memory.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    runs: dict[str, list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        for _ in range(arguments.repeat):
            for name, command in commands(arguments.checkpoint, output).items():
                runs.setdefault(name, []).append(measure(command))
                shutil.rmtree(output)
                seconds, peak = runs[name][-1]
                print(f"{name:32} {seconds:6.1f} s {peak / 1e9:6.2f} GB", flush=True)
    medians = {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _ in each), 1),
            "peak_gb": round(statistics.median(peak for _, peak in each) / 1e9, 2),
        }
        for name, each in runs.items()
    }
    base = medians["optimum-cli"]
    for each in medians.values():
        each["time_ratio"] = round(each["seconds"] / base["seconds"], 2)
        each["memory_ratio"] = round(each["peak_gb"] / base["peak_gb"], 2)
    print(json.dumps({"benchmark": "export_cost", "repeat": arguments.repeat, "medians": medians}))


if __name__ == "__main__":
    main()
