"""What the server adds over the Python API: the same questions by turns in one run, the server a process of its own.

    python -m benchmarks.serve_latency build/smolvlm-int4 [--rounds 30] [-o benchmarks/results/serve_latency.json]

Each round asks about a picture never seen before and once more about the same picture, each by the API and through
HTTP with a stream, each with pictures of its own: JPEGs of 1600x1200, as a camera gives them.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import statistics
import tempfile
import time
from collections import defaultdict
from io import BytesIO
from pathlib import Path

from PIL import Image

from benchmarks.results import write_result
from benchmarks.serve_soak import server
from edgevlm import VLM, GenerationConfig, RuntimeConfig
from edgevlm.bench.measure import QUESTION, perturb, sample_picture
from edgevlm.inputs.image import load_image

TOKENS = 16


def by_api(vlm: VLM, picture: bytes, question: str) -> tuple[float, float]:
    """Return seconds to the first piece and to the end."""
    started, first = time.perf_counter(), 0.0
    for _ in vlm.stream(picture, question, GenerationConfig(max_new_tokens=TOKENS)):
        first = first or time.perf_counter() - started
    return first, time.perf_counter() - started


def by_http(url: str, picture: bytes, question: str) -> tuple[float, float]:
    """Return the same for a stream, the request's JSON being ready."""
    shown = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": shown}}, {"type": "text", "text": question}]
    fields = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "stream": True}
    body = json.dumps(fields)
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    started, first = time.perf_counter(), 0.0
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while line := answer.readline():
        if b'"content"' in line and b'"content":""' not in line:
            first = first or time.perf_counter() - started
    connection.close()
    return first, time.perf_counter() - started


def measure(model: Path, rounds: int) -> dict[str, list[float]]:
    """Return each case's times, in seconds."""
    vlm = VLM(model, RuntimeConfig(device="CPU"))
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        base = load_image(sample_picture(Path(scratch)))
    with server(model) as (url, _):
        for number in range(rounds + 1):
            for place, way in enumerate(("api", "http") if number % 2 else ("http", "api")):
                Image.fromarray(perturb(base, 2 * number + place)).save(buffer := BytesIO(), "JPEG", quality=90)
                for case, question in (("new picture", QUESTION), ("next question", "How many are there?")):
                    if way == "api":
                        first, total = by_api(vlm, buffer.getvalue(), question)
                    else:
                        first, total = by_http(url, buffer.getvalue(), question)
                    if number:  # the first round warms up
                        found[f"{case}, {way}, first piece"].append(first)
                        found[f"{case}, {way}, end"].append(total)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.rounds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        print(f"{name:36} {value * 1000:9.1f} ms")
    for case in ("new picture", "next question"):
        for point in ("first piece", "end"):
            pairs = zip(found[f"{case}, http, {point}"], found[f"{case}, api, {point}"], strict=True)
            added = statistics.median(over - alone for over, alone in pairs)
            ratio = medians[f"{case}, http, {point}"] / medians[f"{case}, api, {point}"]
            print(f"{case}, {point}: HTTP adds {added * 1000:.1f} ms, {ratio:.3f} times the API's")
    write_result(arguments.output, {"model": arguments.model.name, "seconds": found})


if __name__ == "__main__":
    main()
