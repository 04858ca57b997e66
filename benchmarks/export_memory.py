"""How much memory an INT4 export takes as the model grows, by route.

    python -m benchmarks.export_memory --like CHECKPOINT --scratch DIR [--layers 4 12 24] [--routes native optimum]
        [--hidden 2048] [--options="--no-scale-estimation"] [--output FILE.json] [--plot FILE.png]
    python -m benchmarks.export_memory --checkpoint CHECKPOINT --scratch DIR [--routes native] [--output FILE.json]
        [--curve FILE.png]

For each number of layers a seeded checkpoint is written under DIR: SmolVLM-2.2B's widths (text 2048 wide, 8192 in the
MLP; vision 1152 wide, 27 layers), BF16, in shards, with CHECKPOINT's tokenizer and preprocessing. Each route exports
it in a process of its own. With `--checkpoint` that one is exported as it is, and the exports stay in DIR. Memory is
the process tree's, sampled every 0.1 s: `anonymous` is what was allocated, `resident` also counts pages of mapped
files, which the system takes back whenever it needs them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import psutil

from benchmarks.results import write_result

_LONG = ("export", "curve")
SEED = 2
STD = 0.02
MIDDLES = {"*norm*weight": 1, "*layer_scalar": 1, "*_min": -8, "*_max": 8}
"""What the noise is about where it is not 0: factors, and the bounds of what a linear layer takes and gives."""
IMAGE, PATCH, FACTOR = 384, 14, 3
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def config(like: Path, layers: int, hidden: int) -> dict[str, Any]:
    """Return config.json of a SmolVLM-2.2B-like model with as many text layers."""
    found: dict[str, Any] = json.loads((like / "config.json").read_text(encoding="utf-8"))
    text = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "head_dim": 64}
    text |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "tie_word_embeddings": False}
    found["text_config"] |= text
    found["vision_config"] |= VISION | {"image_size": IMAGE, "patch_size": PATCH}
    return found | {"scale_factor": FACTOR, "tie_word_embeddings": False}


def make_checkpoint(folder: Path, like: Path, layers: int, hidden: int) -> int:
    """Write a seeded checkpoint; return its number of weights."""
    from edgevlm_export.families import architecture
    from edgevlm_export.source.checkpoint import Checkpoint

    folder.mkdir(parents=True)
    for path in like.iterdir():
        if path.suffix in {".json", ".jinja", ".txt"} and path.name != "model.safetensors.index.json":
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config(like, layers, hidden)), encoding="utf-8")
    preprocessor = {"size": {"longest_edge": 4 * IMAGE}, "max_image_size": {"longest_edge": IMAGE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    processor = {"image_seq_len": (IMAGE // PATCH) ** 2 // FACTOR**2, "processor_class": "Idefics3Processor"}
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    checkpoint = Checkpoint(folder, folder.name, None, config(like, layers, hidden))
    shapes = architecture(checkpoint, {"preprocessing": {"tile": IMAGE}}, ("lm_head.weight",)).shapes
    return write_shards(folder, shapes)


def write_shards(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Write seeded weights in BF16, a shard for each gigabyte, and their index; return their number."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED)
    weight_map: dict[str, str] = {}
    shard: dict[str, Any] = {}
    for name, shape in shapes.items():
        noise = torch.empty(shape, dtype=torch.bfloat16).normal_(0, STD, generator=generator)
        shard[name] = noise + next((middle for pattern, middle in MIDDLES.items() if fnmatchcase(name, pattern)), 0)
        if sum(each.numel() for each in shard.values()) > 2**29 or name == list(shapes)[-1]:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def command(route: str, checkpoint: Path, output: Path, options: list[str]) -> list[str]:
    """Return the command line of a route; without torch in reach where it needs none."""
    hidden = "for name in ('torch', 'transformers', 'optimum'): sys.modules[name] = None\n" if route == "native" else ""
    code = f"import sys\n{hidden}from edgevlm.cli.main import main\nmain()"
    arguments = ["export", str(checkpoint), "--int4", "--via", route, "-o", str(output), "--force", "--json", *options]
    return [sys.executable, "-c", code, *arguments]


def processes(child: psutil.Process) -> Iterator[psutil.Process]:
    """Yield a process and all below it."""
    try:
        yield child
        yield from child.children(recursive=True)
    except psutil.Error:
        return


def measure(line: list[str]) -> dict[str, Any]:
    """Run a command; return its time, peak memory in bytes, what it printed, and memory over time as `curve`."""
    started = perf_counter()
    peak = {"anonymous": 0, "resident": 0}
    curve: list[tuple[float, int, int]] = []
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as child:

        def watch() -> None:
            while child.poll() is None:
                anonymous = resident = 0
                for process in processes(psutil.Process(child.pid)):
                    try:
                        memory = process.memory_info()
                    except psutil.Error:  # it ended meanwhile
                        continue
                    resident += memory.rss
                    anonymous += memory.rss - getattr(memory, "shared", 0)
                peak["anonymous"], peak["resident"] = max(peak["anonymous"], anonymous), max(peak["resident"], resident)
                curve.append((perf_counter() - started, anonymous, resident))
                sleep(0.1)

        thread = threading.Thread(target=watch)
        thread.start()
        out, errors = child.communicate()
        thread.join()
    seconds = perf_counter() - started
    if child.returncode:
        last = errors.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        return {"seconds": round(seconds, 1), **peak, "failed": last[0][:300]}
    return {"seconds": round(seconds, 1), **peak, "export": json.loads(out), "curve": curve}


def plot_curve(curve: Sequence[tuple[float, float, float]], title: str, path: Path) -> None:
    """Draw memory in bytes over seconds: what was allocated, and with mapped files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    seconds, anonymous, resident = np.array(curve).T
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(seconds / 60, resident / 1e9, color="0.7", label="with mapped files")
    axes.plot(seconds / 60, anonymous / 1e9, label="allocated")
    axes.set(xlabel="minutes", ylabel="memory, GB", title=title, ylim=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw peak memory over the number of weights, a line for each route."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for route in dict.fromkeys(row["route"] for row in rows):
        points = sorted((row["weights"], row["anonymous"], row["resident"]) for row in rows if row["route"] == route)
        weights = [each[0] / 1e9 for each in points]
        axes.plot(weights, [each[1] / 1e9 for each in points], "o-", label=f"{route}: allocated")
        axes.plot(weights, [each[2] / 1e9 for each in points], ".--", label=f"{route}: with mapped files")
    axes.set(xlabel="weights, billions", ylabel="peak memory, GB", title="edgevlm export --int4", ylim=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--like", type=Path, help="a checkpoint whose tokenizer is used")
    source.add_argument("--checkpoint", type=Path, help="a checkpoint to export as it is")
    parser.add_argument("--scratch", type=Path, required=True, help="where checkpoints and exports are made")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 24])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--routes", nargs="+", default=["native", "optimum"])
    parser.add_argument("--options", default="--no-verify", help="further options of edgevlm export")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--curve", type=Path, help="draw the memory of an export of --checkpoint over its time")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def export(checkpoint: Path, output: Path, route: str, **size: int) -> None:
        found = measure(command(route, checkpoint, output, arguments.options.split()))
        rows.append({**size, "route": route, "options": arguments.options, **found})
        print(json.dumps({name: value for name, value in rows[-1].items() if name not in _LONG}), flush=True)

    if arguments.checkpoint:
        for route in arguments.routes:
            export(arguments.checkpoint, arguments.scratch / f"{arguments.checkpoint.name}-{route}", route)
    for layers in arguments.layers if arguments.like else ():
        checkpoint, output = arguments.scratch / f"seeded-{layers}", arguments.scratch / "export"
        weights = make_checkpoint(checkpoint, arguments.like, layers, arguments.hidden)
        for route in arguments.routes:
            export(checkpoint, output, route, layers=layers, weights=weights)
            shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(checkpoint)
    kept = [{name: value for name, value in row.items() if name not in _LONG} for row in rows]
    write_result(arguments.output, {"benchmark": "export_memory", "rows": kept})
    if arguments.curve and arguments.checkpoint and "curve" in rows[0]:
        plot_curve(rows[0]["curve"], f"edgevlm export {arguments.checkpoint.name} --int4", arguments.curve)
    if arguments.plot and arguments.like:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
