"""Throughput of the server before and after: answers and tokens a second, and how long a client waits, by turns.

    python -m benchmarks.serve_throughput MODEL [--before TREE] [--rounds 3] [--seconds 8] [-o result.json]

Clients ask all the time, each its next question as soon as the last one is answered: about one picture that all of them
show, or each time about one never seen before; for a short answer, or for one of 128 tokens. `--before` names a working
tree with another edgevlm; without it, "before" is the same server with `--max-running 1`, which decodes one answer at a
time. A ratio is that of a round, in which both have their turn, and the median over the rounds is printed.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
from PIL import Image

from benchmarks.results import write_result
from benchmarks.serve_soak import server

QUESTION = "What does the display read?"
CLIENTS = (1, 4, 16)
PICTURES = ("same", "different")
LONG = 128
"""Tokens of a long answer."""
POOL = 300
"""Pictures never seen before: more than the server keeps, so that none is known when its turn comes again."""
FIGURES = ("answers/s", "tokens/s", "p50 s", "p95 s", "first token p50 s", "CPU s/answer")
TEXT = {"type": "json_schema", "json_schema": {"name": "text", "schema": {"type": "string", "minLength": 2000}}}
ANSWERS: dict[str, dict[str, Any]] = {
    "short": {"max_tokens": 16},
    "long": {"max_tokens": LONG, "response_format": TEXT},
}


def picture() -> str:
    """Return a JPEG of 640x480 as a data: URL, another one at each call."""
    image = Image.effect_noise((40, 30), 90).resize((640, 480)).convert("RGB")
    image.save(buffer := BytesIO(), "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def body(url: str, answer: str) -> bytes:
    """Return a request about a picture."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return json.dumps({"messages": [{"role": "user", "content": content}], **ANSWERS[answer]}).encode()


@dataclass
class Load:
    """Clients that ask until their time is up."""

    address: str
    bodies: Iterator[bytes]
    until: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: list[tuple[float, float, int]] = field(default_factory=list)
    """Seconds to the end and to the first token, and tokens, of each answer."""

    def ask(self) -> None:
        """Ask again and again, on one connection."""
        connection = http.client.HTTPConnection(self.address, timeout=300)
        while time.perf_counter() < self.until:
            with self.lock:
                data = next(self.bodies)
            started = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            told = json.loads(reply.read())
            if reply.status != 200:
                raise RuntimeError(f"the server said {reply.status}: {told}")
            times = told["timings"]
            took = time.perf_counter() - started
            self.answers.append((took, times["queue_s"] + times["ttft_s"], told["usage"]["completion_tokens"]))
        connection.close()


def measure(
    url: str, process: psutil.Process, clients: int, bodies: Iterator[bytes], seconds: float
) -> dict[str, float]:
    """Return the figures of one case."""
    began, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
    load = Load(url.removeprefix("http://"), bodies, began + seconds)
    threads = [threading.Thread(target=load.ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    ends, firsts, tokens = (list(each) for each in zip(*load.answers, strict=True))
    values = (
        len(ends) / took,
        sum(tokens) / took,
        median(ends),
        quantiles([*ends, max(ends)], n=20, method="inclusive")[-1],
        median(firsts),
        (sum(process.cpu_times()[:2]) - cpu) / len(ends),
    )
    return dict(zip(FIGURES, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--before", type=Path, metavar="TREE", help="working tree with the edgevlm to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="of each case")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=PICTURES)
    parser.add_argument("--answers", nargs="+", choices=tuple(ANSWERS), default=tuple(ANSWERS))
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    model = arguments.model.resolve() if arguments.model.exists() else arguments.model
    before = {"tree": arguments.before.resolve()} if arguments.before else {}
    systems = {"before": ([] if before else ["--max-running", "1"], before), "after": ([], {})}
    urls = [picture() for _ in range(POOL)]
    new = {answer: itertools.cycle([body(url, answer) for url in urls]) for answer in arguments.answers}
    known = {answer: itertools.repeat(body(picture(), answer)) for answer in arguments.answers}
    cases = arguments.answers, arguments.pictures, arguments.clients
    found: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for number in range(arguments.rounds):
        for name in ("before", "after") if number % 2 == 0 else ("after", "before"):
            options, where = systems[name]
            with server(model, *options, **where) as (url, process):
                for answer, shown, clients in itertools.product(*cases):
                    bodies = (known if shown == "same" else new)[answer]
                    measure(url, process, clients, bodies, 1)  # the first second warms up
                    figures = measure(url, process, clients, bodies, arguments.seconds)
                    found[f"{answer}, {shown}, {clients} clients"][name].append(figures)
    print(f"{'case':32}" + "".join(f"{figure:>30}" for figure in FIGURES))
    for case, sides in found.items():
        columns = []
        for figure in FIGURES:
            old, now = ([each[figure] for each in sides[name]] for name in ("before", "after"))
            ratio = median(after / before for before, after in zip(old, now, strict=True))
            columns.append(f"{median(old):9.3f} -> {median(now):8.3f} ({ratio:4.2f})")
        print(f"{case:32}" + "".join(f"{column:>30}" for column in columns))
    write_result(arguments.output, {"model": model.name, "seconds": arguments.seconds, "figures": found})


if __name__ == "__main__":
    main()
