"""edgevlm beside its peers: same checkpoint, picture, question, tokens and threads, systems alternating in one run.

    python -m benchmarks.make_checkpoint build/smolvlm-shape
    python -m benchmarks.side_by_side build/smolvlm-shape -o build/side_by_side.jsonl [--rounds 4] [--only NAME ...]

Each round starts every system once, in a process of its own, which loads, answers once to warm up and then is
measured. Exports that are not there yet are made first, optimum's with optimum-cli. A system that cannot run here is
left out, with the reason. Runs with other `--tiles` or `--context` are cases of their own and may go to the same file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks import gguf, peer_models
from benchmarks.peers import COLUMNS
from benchmarks.rounds import System, reference, run, table
from edgevlm.bench.measure import FILLER, QUESTION, sample_picture

OPTIMUM = {
    "optimum FP32": ["--weight-format", "fp32"],
    "optimum INT8": ["--weight-format", "int8"],
    "optimum INT4": ["--weight-format", "int4", "--group-size", "64"],
}
EDGEVLM = {
    "edgevlm FP32": ["--fp32"],
    "edgevlm INT8": ["--int8", "--vision-precision", "int8"],
    "edgevlm INT8 + W8A8": ["--int8"],
    "edgevlm INT4": ["--int4", "--vision-precision", "int8"],
    "edgevlm INT4 + W8A8": ["--int4"],
}
PARTS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "llama.cpp Q4_0, F16 vision": ("llama.cpp", gguf.write),
    "OpenVINO GenAI INT4, text part alone": ("genai-text", peer_models.openvino_text),
    "ONNX Runtime GenAI INT4, text part alone": ("onnx-text", peer_models.onnx_text),
    "ONNX Runtime FP32, vision part alone": ("onnx-vision", peer_models.onnx_vision),
}
"""Peers whose files are made here: their system in `peers`, and what makes them of the checkpoint or its text part."""
PROMPT_TOKENS = {1: 82, 5: 348, 13: 877}
"""Tokens of SmolVLM's prompt for the question and a picture of so many tiles."""
SHORT_QUESTION = 6
"""Of them those of the question."""
REFERENCE = "optimum INT4"
"""The system that ratios are taken to, where it is among those measured."""


def _asked(name: str, only: Sequence[str]) -> bool:
    """Tell whether `only` asks for what is called `name`, or for a way to use it: all, where it is empty."""
    return not only or any(each.split(",")[0] == name for each in only)


def exports(checkpoint: Path, folder: Path, only: Sequence[str] = ()) -> dict[str, Path]:
    """Make every export that is asked for and missing, and return their folders by name."""
    scripts = Path(sys.executable).parent
    made = {}
    for name, options in {**OPTIMUM, **EDGEVLM}.items():
        if not _asked(name, only):
            continue
        made[name] = folder / name.lower().replace(" ", "-").replace("+-", "")
        if made[name].is_dir():
            continue
        print(f"exporting {name}", file=sys.stderr, flush=True)
        command = [str(scripts / "optimum-cli"), "export", "openvino", "-m", str(checkpoint)]
        command += ["--task", "image-text-to-text", *options, str(made[name])]
        if name in EDGEVLM:
            command = [str(scripts / "edgevlm"), "export", str(checkpoint), *options, "-o", str(made[name])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return made


def peer_files(checkpoint: Path, folder: Path, only: Sequence[str] = ()) -> tuple[dict[str, Path], dict[str, str]]:
    """Make the files of the other peers that are asked for and return their folders by name, and why one is missing."""
    made, left_out = {}, {}
    for name, (system, build) in PARTS.items():
        if only and name not in only:
            continue
        source = checkpoint
        try:
            if system.endswith("-text"):
                source = peer_models.make(folder / "text", partial(peer_models.text_checkpoint, checkpoint))
            made[name] = peer_models.make(folder / system, partial(build, source))
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            left_out[name] = f"its files cannot be made: {str(error).splitlines()[0]}"
    return made, left_out


def systems(checkpoint: Path, made: dict[str, Path]) -> dict[str, tuple[str, Path]]:
    """Return name -> (system of `peers`, model folder)."""
    found = {"PyTorch FP32": ("torch-fp32", checkpoint), "PyTorch BF16": ("torch-bf16", checkpoint)}
    found |= {name: ("optimum", made[name]) for name in OPTIMUM if name in made}
    found |= {name: (system, made[name]) for name, (system, _) in PARTS.items() if name in made}
    found |= {name: ("edgevlm", made[name]) for name in EDGEVLM if name in made}
    ways = {"detail auto": "edgevlm-auto", "one tile": "edgevlm-low"}
    quickest = [name for name in ("edgevlm INT4", "edgevlm INT4 + W8A8") if name in made]
    found |= {f"{name}, {way}": (system, made[name]) for way, system in ways.items() for name in quickest}
    if "optimum INT4" in made:
        found["optimum INT4, one tile"] = ("optimum-low", made["optimum INT4"])
    return found


def long_question(checkpoint: Path, tokens: int) -> str:
    """Return a question of at least as many tokens."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    short, longer = (len(tokenizer.encode(FILLER * count + QUESTION).ids) for count in (0, 10))
    return FILLER * max(0, -(-10 * (tokens - short) // (longer - short))) + QUESTION


def case_options(checkpoint: Path, tiles: int, context: int | None) -> list[str]:
    """Return the options of `peers` for so many tiles, with the prompt filled up to `context` tokens."""
    tokens = PROMPT_TOKENS[tiles]
    name = "picture" if tiles == max(COLUMNS) else f"picture, {tiles} tile{'s' * (tiles > 1)}"
    options = ["--tiles", str(tiles), "--prompt-tokens", str(max(tokens, context or 0))]
    if context:
        name += f", context {context}"
        options += ["--question", long_question(checkpoint, context - tokens + SHORT_QUESTION)]
    return [*options, "--case", name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--exports", type=Path, default=Path("build/side_by_side"))
    parser.add_argument("--picture", type=Path, help="default: a drawn one of 1600x1200")
    parser.add_argument("--rounds", type=int, default=4, help="even, so that each order comes as often")
    parser.add_argument("--tiles", type=int, default=13, choices=COLUMNS, help="of the picture of 1600x1200")
    parser.add_argument("--context", type=int, help="fill the prompt up to about as many tokens, for decoding after it")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout-s", type=float, default=1800, help="of a system in a round")
    parser.add_argument("--only", action="append", default=[], help="a system's name; again for several")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON Lines, added to")
    arguments = parser.parse_args()
    options = ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
    only, checkpoint, folder = arguments.only, arguments.checkpoint, arguments.exports
    made, left_out = peer_files(checkpoint, folder, only)
    found = systems(checkpoint, exports(checkpoint, folder, only) | made)
    with tempfile.TemporaryDirectory() as scratch:
        picture = arguments.picture or sample_picture(Path(scratch))
        every = [*options, *case_options(checkpoint, arguments.tiles, arguments.context)]
        asked = [
            System(name, [sys.executable, "-m", "benchmarks.peers", system, str(model), str(picture), *every])
            for name, (system, model) in found.items()
            if not only or name in only
        ]
        head = {"options": options, "left_out": left_out}
        rows = run(asked, arguments.rounds, arguments.output, head, arguments.timeout_s)
    print("\n".join(table(rows, reference(rows, REFERENCE))))
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")


if __name__ == "__main__":
    main()
