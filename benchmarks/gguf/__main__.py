"""`python -m benchmarks.gguf`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import gguf
from benchmarks.peer_models import make


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf", description=str(gguf.__doc__).split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--float32", action="store_true", help="quantize nothing")
    arguments = parser.parse_args()
    make(arguments.folder, lambda folder: gguf.write(arguments.checkpoint, folder, arguments.float32))


if __name__ == "__main__":
    main()
