"""How long one request keeps another waiting: schemas, prompts, pictures and bodies that are made to be slow.

    python -m benchmarks.serve_costs MODEL [--only WORD] [-o benchmarks/results/serve_costs.json]

The server is a process of its own. While each request is answered or refused, another caller asks a plain question over
and over; printed is the longest that it waited, beside what the request itself came to.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.results import write_result
from benchmarks.serve_soak import server

KEYS = ("a-key-of-the-costly-caller", "a-key-of-the-other-caller")
QUESTION = "What is the size of the grid?"
SIDE = 7000
"""Pixels of a side of a picture that is just allowed."""


def question(text: str = QUESTION, **fields: Any) -> bytes:
    """Return a chat request's body."""
    return json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 64, **fields}).encode()


def schema(value: dict[str, Any]) -> bytes:
    """Return a request for JSON of a schema."""
    return question(response_format={"type": "json_schema", "json_schema": {"name": "slow", "schema": value}})


def properties(count: int, make: Callable[[int], Any], *, required: bool = True) -> dict[str, Any]:
    """Return the schema of an object with so many properties."""
    named = {f"p{number}": make(number) for number in range(count)}
    closed = {"type": "object", "properties": named, "additionalProperties": False}
    return closed | ({"required": list(named)} if required else {})


def pattern(text: str) -> dict[str, Any]:
    """Return the schema of a text that matches a regular expression."""
    return {"type": "string", "pattern": text}


def chain(count: int, make: Callable[[str], Any], end: Any) -> dict[str, Any]:
    """Return a schema of definitions, each of which leads to the next."""
    defs = {f"d{number}": make(f"#/$defs/d{number + 1}") for number in range(count)}
    return {"$defs": {**defs, f"d{count}": end}, "$ref": "#/$defs/d0"}


def nested(depth: int) -> dict[str, Any]:
    """Return arrays of arrays, each of ten thousand."""
    inner: dict[str, Any] = {"const": 1}
    for _ in range(depth):
        inner = {"type": "array", "items": inner, "minItems": 10_000}
    return inner


def picture(make: Callable[[], bytes]) -> Callable[[], bytes]:
    """Return what makes a request about a picture."""

    def body() -> bytes:
        url = f"data:image/png;base64,{base64.b64encode(make()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 8}).encode()

    return body


def saved(format: str, side: int = SIDE, **options: Any) -> bytes:  # noqa: A002 - Pillow's word
    """Return a grey picture as a file."""
    Image.new("L", (side, side), 128).save(buffer := BytesIO(), format, **options)
    return buffer.getvalue()


def jpeg_of_scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan comes so many times."""
    data = saved("JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def png_of_chunks(count: int) -> bytes:
    """Return a PNG with so many chunks that mean nothing."""
    data, kind = saved("PNG", 64), b"prVt"
    chunk = bytes(4) + kind + zlib.crc32(kind).to_bytes(4)
    return data[:33] + chunk * count + data[33:]


CASES: dict[str, Callable[[], bytes]] = {
    "a multiple": lambda: schema({"type": "integer", "multipleOf": 999_983}),
    "a large multiple": lambda: schema({"type": "integer", "multipleOf": 99_999_989}),
    "the largest multiple taken": lambda: schema({"type": "integer", "multipleOf": 9973}),
    "a long decimal multiple": lambda: schema({"type": "number", "multipleOf": 0.00000123457}),
    "a multiple of many places": lambda: schema({"type": "number", "multipleOf": 1e-300}),
    "many multiples": lambda: schema(properties(100, lambda number: {"type": "integer", "multipleOf": 9000 + number})),
    "a common multiple": lambda: schema({"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 43}]}),
    "many bounds": lambda: schema(
        properties(900, lambda at: {"type": "integer", "minimum": -(10**14) - at, "maximum": 10**15 + 7 * at})
    ),
    "many bounds of fractions": lambda: schema(
        properties(900, lambda number: {"minimum": -(0.1 ** (number % 300)), "maximum": 0.123456789 + number})
    ),
    "sixty thousand texts": lambda: schema({"enum": [f"text number {number}" for number in range(60_000)]}),
    "six thousand texts": lambda: schema({"enum": [f"text {number}" for number in range(6_000)]}),
    "many optional properties": lambda: schema(properties(2_000, lambda _: {"type": "null"}, required=False)),
    "many objects of one kind": lambda: schema(
        {"anyOf": [properties(8, lambda at, number=number: {"const": at * number}) for number in range(200)]}
    ),
    "a chain of references": lambda: schema(chain(2_000, lambda name: {"$ref": name}, {"type": "null"})),
    "a chain of objects": lambda: schema(
        chain(1_200, lambda name: {"properties": {"a": {"$ref": name}}, "required": ["a"]}, {"type": "null"})
    ),
    "two chains together": lambda: schema(
        {"allOf": [{"$ref": "#/$defs/d0"}, {"$ref": "#/$defs/d1"}]}
        | {"$defs": chain(1_200, lambda name: {"properties": {"a": {"$ref": name}}}, {})["$defs"]}
    ),
    "a tree of references": lambda: schema(
        chain(40, lambda name: properties(2, lambda _: {"$ref": name}), {"type": "null"})
    ),
    "arrays of arrays": lambda: schema(nested(3)),
    "ten thousand items": lambda: schema(nested(1)),
    "ten thousand long items": lambda: schema({"type": "array", "items": {"const": "x" * 9_000}, "minItems": 10_000}),
    "a long text": lambda: schema({"const": "x" * 90_000}),
    "a text of a million letters": lambda: schema({"type": "string", "minLength": 1_000_000}),
    "an automaton of a million states": lambda: schema(pattern("^(a|b)*a(a|b){20}$")),
    "a product of automata": lambda: schema(
        {"allOf": [pattern(f"^(?:.{{{prime}}})*$") for prime in (7, 11, 13, 17, 19, 23)]}
    ),
    "optional letters": lambda: schema(pattern("^(a?){500}a{500}$")),
    "counts of counts": lambda: schema(pattern("^((a{1,100}){1,100}){1,100}$")),
    "a long count of any letter": lambda: schema(pattern(r"^[\s\S]{0,10000}\p{L}{1000}$")),
    "many patterns": lambda: schema(properties(500, lambda at: pattern(rf"^(\p{{L}}|{at}){{3,{at + 9}}}x$"))),
    "many formats": lambda: schema(properties(900, lambda _: {"type": "string", "format": "email"})),
    "many names by pattern": lambda: schema(
        {"anyOf": [{"type": "object", "patternProperties": {f"^(a|b)*{number}$": {}}} for number in range(900)]}
    ),
    "white space by a pattern": lambda: schema(
        {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": "(a|b)*a(a|b){20}"}, "type": "object"}
    ),
    "many tools": lambda: question(
        tools=[
            {"type": "function", "function": {"name": f"t{at}", "parameters": properties(9, lambda _: pattern("a{9}"))}}
            for at in range(128)
        ]
    ),
    "a tool that is described at length": lambda: question(
        tools=[{"type": "function", "function": {"name": "t", "description": "word " * 1_000_000}}]
    ),
    "one word": lambda: question("a" * 199_000),
    "many words": lambda: question("word " * 39_000),
    "many letters of many scripts": lambda: question("".join(map(chr, range(0x4E00, 0x9FFF))) * 9),
    "many placeholders": lambda: question("<image>" * 28_000),
    "long stop texts": lambda: question(stop=["a" * 1_000_000 + str(number) for number in range(16)]),
    "many messages": lambda: json.dumps({"messages": [{"role": "user", "content": "a"}] * 20_000}).encode(),
    "many parts": lambda: json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 50_000}], "max_tokens": 8}
    ).encode(),
    "many empty values": lambda: b'{"messages": [' + b"[]," * 8_000_000 + b"[]]}",
    "a deep value": lambda: b'{"messages": [], "metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
    "a picture in escapes": lambda: question().replace(
        b'"content": ',
        b'"content": [{"type": "image_url", "image_url": "data:,' + b"%41" * 8_000_000 + b'"}], "name": ',
    ),
    "a picture of many scans": picture(lambda: jpeg_of_scans(4_000)),
    "a picture of many chunks": picture(lambda: png_of_chunks(1_500_000)),
    "a large PNG": picture(lambda: saved("PNG")),
    "a large progressive JPEG": picture(lambda: saved("JPEG", progressive=True)),
    "a large WebP": picture(lambda: saved("WEBP", lossless=True)),
    "a large JPEG 2000": picture(lambda: saved("JPEG2000")),
    "a large AVIF": picture(lambda: saved("AVIF", speed=10)),
    "a large TIFF": picture(lambda: saved("TIFF", compression="tiff_lzw")),
    "a large GIF": picture(lambda: saved("GIF")),
}
"""Bodies of requests by what is slow about them."""


def ask(url: str, key: str, body: bytes, timeout_s: float) -> tuple[int, Any]:
    """Send a request; return its status, and its answer's text or its error's code."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    asked = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)  # noqa: S310
    try:
        with urllib.request.urlopen(asked, timeout=timeout_s) as answer:  # noqa: S310
            return int(answer.status), json.load(answer)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]["code"]
    except OSError as error:
        return 0, type(error).__name__


class Other:
    """A caller that asks the same plain question over and over, and notes how long each answer took."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._ask = lambda: ask(url, KEYS[1], question(max_tokens=4), timeout_s)
        self._thread = threading.Thread(target=self._run)
        self._ended = False
        self.asks: list[tuple[float, float, tuple[int, Any]]] = []
        """Beginning, end and answer of each."""

    def __enter__(self) -> Other:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()

    def _run(self) -> None:
        while not self._ended:
            started = time.monotonic()
            answer = self._ask()
            self.asks.append((started, time.monotonic(), answer))
            time.sleep(0.01)

    def waited(self, since: float) -> float:
        """Return the longest that an answer took since then, that of a question that was asked only now included."""
        now = time.monotonic()
        while not self.asks or self.asks[-1][0] < now:
            time.sleep(0.01)
        return max(end - started for started, end, _ in self.asks if end >= since)


def measure(model: Path, only: str, timeout_s: float) -> dict[str, Any]:
    """Return, for each case, what it came to and how long the other waited meanwhile."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (keys := Path(folder) / "keys").write_text("\n".join(KEYS), encoding="utf-8")
        with server(model, "--api-key-file", str(keys)) as (url, process), Other(url, timeout_s) as other:
            time.sleep(3)
            alone = other.waited(0)
            print(f"{'with nobody else':36} {'':24} {'':7} other {alone:7.3f} s", flush=True)
            for name, make in CASES.items():
                if only not in name:
                    continue
                body = make()
                started = time.monotonic()
                status, told = ask(url, KEYS[0], body, timeout_s)
                took = time.monotonic() - started
                waited, memory = other.waited(started), process.memory_info().rss / 2**20
                told = told if status != 200 else ""
                rows.append({"case": name, "status": status, "code": told, "s": took, "other_s": waited, "mib": memory})
                print(
                    f"{name:36} {status:3} {told:20} {took:7.2f} s other {waited:7.3f} s {memory:6.0f} MiB", flush=True
                )
        answers = {answer for _, _, answer in other.asks}
    worst = max(rows, key=lambda row: float(row["other_s"]))
    print(f"the other waited at most {worst['other_s']:.3f} s: {worst['case']}")
    if len(answers) > 1:
        print(f"the other was told different things: {answers}", file=sys.stderr)
    return {"model": model.name, "alone_s": alone, "rows": rows, "answers": len(answers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default="", help="only the cases with this word in their name")
    parser.add_argument("--timeout", type=float, default=120, help="seconds after which a request is given up")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.only, arguments.timeout)
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
