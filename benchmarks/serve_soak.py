"""A server under thousands of mixed requests: does its memory stay flat?

    python -m benchmarks.serve_soak build/smolvlm-int4 [--requests 5000] [-o benchmarks/results/serve_soak.json]

The requests are pictures of many sizes and formats, damaged pictures, text, streams, JSON of a schema, clients that go
away in the middle, and requests that must be refused. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from benchmarks.results import write_result

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
}
SAMPLES = 50


@contextmanager
def server(model: Path, *options: str, tree: Path | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """Start `edgevlm serve` on a free port and yield its URL and process once it is ready.

    `tree` is a working tree whose edgevlm is to be served; None is the one that this process has.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "edgevlm", "serve", str(model), "--port", str(port), "--device", "CPU"]
    command += options
    env = os.environ | ({"PYTHONPATH": str(tree)} if tree else {})
    with (
        Path(os.devnull).open("wb") as nowhere,
        subprocess.Popen(command, stderr=nowhere, cwd=tree, env=env) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            while not is_ready(url):
                if process.poll() is not None:
                    raise RuntimeError("the server ended while it started")
                time.sleep(0.1)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()


def is_ready(url: str) -> bool:
    """Tell whether the server answers."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5):  # noqa: S310
            return True
    except OSError:
        return False


def picture(chance: random.Random) -> bytes:
    """Return a picture never seen before, in any format, sometimes damaged."""
    size = chance.randint(8, 700), chance.randint(8, 700)
    image = Image.effect_noise((size[0] // 4 + 1, size[1] // 4 + 1), chance.uniform(5, 120)).resize(size).convert("RGB")
    image.save(buffer := BytesIO(), chance.choice(FORMATS))
    data = bytearray(buffer.getvalue())
    if chance.random() < 0.4:
        for _ in range(chance.randint(1, 20)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.1:
        del data[chance.randrange(len(data)) :]
    return bytes(data)


def request(chance: random.Random, known: list[bytes]) -> dict[str, Any]:
    """Return one request of the mix; a third of the pictures have been shown before."""
    content: list[dict[str, Any]] = []
    for _ in range(chance.choice((0, 1, 1, 1, 2))):
        data = chance.choice(known) if known and chance.random() < 0.35 else picture(chance)
        known[:] = [*known[-19:], data]
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url, "detail": chance.choice(("low", "auto"))}})
    if len({part["image_url"]["detail"] for part in content}) > 1:
        content = content[:1]
    content.append({"type": "text", "text": f"What is in picture {chance.randrange(1000)}? " * chance.randint(1, 6)})
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "max_tokens": chance.randint(1, 16)}
    if chance.random() < 0.2:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    if chance.random() < 0.3:
        fields |= {"temperature": 1.0, "seed": chance.randrange(1000), "logprobs": True, "top_logprobs": 2}
    if chance.random() < 0.05:
        fields["messages"] = chance.choice(("nonsense", [], [{"role": "user", "content": "<image>"}]))
    return fields | {"stream": chance.random() < 0.4}


def send(url: str, fields: dict[str, Any], hang_up: bool) -> int:
    """Send a request and return its status; 0 for one that was not waited for."""
    body = json.dumps(fields).encode()
    asked = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:  # noqa: S310
            if hang_up and fields["stream"]:
                answer.read(300)
                return 0
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


def soak(model: Path, requests: int, seed: int) -> dict[str, Any]:
    """Return statuses, memory at fifty points, and the growth over the second half."""
    chance, known, statuses = random.Random(seed), [], Counter[int]()  # noqa: S311
    memory: list[list[float]] = []
    with server(model) as (url, process):
        started = time.monotonic()
        for number in range(1, requests + 1):
            statuses[send(url, request(chance, known), chance.random() < 0.1)] += 1
            if number % max(1, requests // SAMPLES) == 0:
                memory.append([number, process.memory_info().rss / 2**20])
                print(f"{number:6} {memory[-1][1]:8.1f} MiB {dict(statuses)}", file=sys.stderr, flush=True)
        took = time.monotonic() - started
        connections, threads = len(process.net_connections()), process.num_threads()
    half = [rss for _, rss in memory[len(memory) // 2 :]]
    slope = statistics.linear_regression(range(len(half)), half).slope if len(half) > 1 else 0.0
    return {
        "requests": requests,
        "seconds": took,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "rss_mib": memory,
        "rss_second_half_mib": [min(half), statistics.median(half), max(half)],
        "growth_mib_per_1000_requests": slope * SAMPLES / requests * 1000,
        "connections_at_the_end": connections,
        "threads_at_the_end": threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    result = soak(arguments.model, arguments.requests, arguments.seed)
    for name, value in result.items():
        if name != "rss_mib":
            print(f"{name:32} {value}")
    write_result(arguments.output, {"model": arguments.model.name, **result})


if __name__ == "__main__":
    main()
