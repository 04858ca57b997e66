"""Ten thousand mutated requests, and how long they keep another client waiting that asks a small honest one.

    python -m benchmarks.serve_mutations [MODEL] [--requests 10000] [-o benchmarks/results/serve_mutations.json]

Bodies, headers, chunkings, pictures and forms are mutations of valid requests to every API; one request in ten is made
by schemathesis from the server's own OpenAPI document. `--seed S --only NUMBER` sends one mutation again. The server is
a process of its own. Exits with 1 if it answers any of them with a 5xx other than 503, dies, or tells the honest client
something else than before.
"""

from __future__ import annotations

import argparse
import base64
import copy
import http.client
import json
import math
import random
import socket
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from PIL import Image

from benchmarks.results import write_result
from benchmarks.serve_costs import KEYS, QUESTION, Other
from benchmarks.serve_soak import SCHEMA, server
from edgevlm.model_store import default_model

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")
ALONE_S = 5.0
FROM_DOCUMENT = 0.1
"""Share of the requests that schemathesis makes."""
PATIENT_S, HASTY_S = 60.0, 0.25
"""How long an answer is waited for; the latter where the server may rightly wait for more of the request."""
TOKENS = {"max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict"}


def deep(depth: int) -> Any:
    """Return a list in a list in a list …"""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, -0.0, 0.5, 1e308, math.nan, math.inf, -math.inf, 2**31, 2**63, 2**64, 10**400,
    "", " ", "\0", "\ud800", "\u202e", "🙂" * 50, "x" * 50_000, "<image>", "<|im_end|>", "{{ 7 * 7 }}", "%s%n", "null",
    "data:", "data:image/png;base64,", "data:;base64,!", "file:///etc/passwd", "../../etc/passwd", "http://127.0.0.1/",
    [], {}, [[]], [None], {"": ""}, {"type": None}, {"$ref": "#"}, {"pattern": "(a*)*b"}, {"type": "object"}, deep(300),
)  # fmt: skip
TOKENS_OF_BYTES = (b"\0", b"\xff\xfe", b"\\u", b'"', b"1e999", b"NaN", b"[" * 2000, b"{}" * 100, b"\r\n\r\n", b"%00")
HEADERS = (
    b"Content-Length: -1", b"Content-Length: 0", b"Content-Length: 99999999999999999999", b"Content-Length: 1e3",
    b"Content-Length: 5, 6", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Upgrade: websocket",
    b"Content-Type: text/plain", b"Content-Type: application/json; charset=utf-16", b"Transfer-Encoding: x",
    b"Origin: null", b"Content-Encoding: gzip", b"Expect: 100-continue", b"Connection: upgrade", b"TE: trailers",
    b"Host: example.com", b"Host: localhost:99999999", b"Host: [::1", b"Host:", b"Origin: http://[",
    b"Sec-Fetch-Site: cross-site", b"Authorization: Basic eA==", b"Authorization: Bearer \xff\xfe", b"Authorization:",
    b"X-Forwarded-For: 1.2.3.4", b"Range: bytes=0-0", b"Cookie: " + b"a=b; " * 500, b"X-Long: " + b"x" * 70_000,
    b"No-Colon", b": no name", b" folded", b"X-Null: \0", b"Accept: */*;q=nan", b"Accept-Encoding: identity;q=0",
)  # fmt: skip
TARGETS = (
    b"/v1/models/%00", b"/v1/models/%ff%fe", b"/v1/models/" + b"x" * 5000, b"/v1/models/../../etc", b"//v1//models",
    b"http://example.com/v1/models", b"/metrics?x=%", b"/openapi.json", b"/api/tags", b"/api/ps", b"/docs", b"/%2e%2e/",
    b"", b"*",
)  # fmt: skip
METHODS = (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH", b"post", b"CONNECT", b"PRI", b"\xff")


# Valid requests


def encoded(chance: random.Random, name: str) -> bytes:
    """Return a small picture never seen before, as a file."""
    width, height = chance.randint(2, 30), chance.randint(2, 30)
    image = Image.frombytes("RGB", (width, height), chance.randbytes(3 * width * height))
    image.resize((4 * width, 4 * height)).save(buffer := BytesIO(), name)
    return buffer.getvalue()


def requests(picture: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return a valid request to each API, and those with what else chat completions take."""
    small = base64.b64encode(picture).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{small}", "detail": "low"}}
    text = {"type": "text", "text": QUESTION}
    tool = {"type": "function", "function": {"name": "count", "description": "Counts.", "parameters": SCHEMA}}
    shown = {"messages": [{"role": "user", "content": [part, text]}], "max_tokens": 4}
    turns = [{"role": role, "content": QUESTION} for role in ("system", "user", "assistant", "user")]
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    sampled = {
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 20,
        "seed": 5,
        "stop": ["!"],
        "logprobs": True,
        "top_logprobs": 2,
    }
    options = {"num_predict": 4, "temperature": 1.0, "num_ctx": 2048}
    ollama = {"role": "user", "content": QUESTION, "images": [small]}
    source = {"kind": "file", "base64_string": small, "filename": "page.png"}
    items = [{"role": "user", "content": [{"type": "input_image", "image_url": part["image_url"]["url"]}]}]
    return [
        ("/v1/chat/completions", shown),
        ("/v1/chat/completions", {**shown, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"messages": turns, "max_tokens": 4, **sampled}),
        ("/v1/chat/completions", {"messages": turns, "max_tokens": 16, "response_format": form}),
        ("/v1/chat/completions", {"messages": turns, "max_tokens": 16, "tools": [tool], "tool_choice": "required"}),
        ("/v1/responses", {"input": items, "instructions": "Be brief.", "max_output_tokens": 4, "stream": True}),
        ("/v1/locate", {"image": part, "phrase": "the red valve", "max_locations": 1}),
        ("/v1/score", {"messages": shown["messages"], "choices": ["5", "no grid"], "max_tiles": 4}),
        ("/v1/score", {"messages": turns, "type": "score", "minimum": 1, "maximum": 5}),
        ("/v1/convert/source", {"sources": [source], "options": {"to_formats": ["md", "html"], "max_tokens": 4}}),
        ("/api/chat", {"messages": [ollama], "options": options, "keep_alive": "5m"}),
        (
            "/api/generate",
            {"prompt": QUESTION, "images": [small], "options": options, "stream": False, "format": SCHEMA},
        ),
        ("/api/show", {"verbose": True}),
    ]


# Mutations


def keep_short(body: Any) -> None:
    """Let a request ask for a few tokens at most, whichever API it is of."""
    if not isinstance(body, dict):
        return
    for name in TOKENS & body.keys():
        if type(body[name]) is int:
            body[name] = 4 if name == "num_predict" and body[name] in (0, -1, -2) else min(body[name], 4)
    keep_short(body.get("options"))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the containers within a JSON value, with each key that leads on."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate_json(chance: random.Random, body: dict[str, Any]) -> None:
    """Replace, take out, wrap, double or rename one to three values of a body."""
    for _ in range(chance.randint(1, 3)):
        body.setdefault("model")
        container, key = chance.choice(list(places(body)))
        other = copy.deepcopy(chance.choice(ODD))
        match chance.randrange(6):
            case 0:
                del container[key]
            case 1:
                container[key] = [container[key]]
            case 2 if isinstance(container, list):
                container[key:key] = [copy.deepcopy(container[key])] * chance.choice((1, 20))
            case 3 if isinstance(container, dict):
                renamed = chance.choice(("", "type", "x" * 300, key.upper(), "\ud800"))
                container[renamed] = container.pop(key)
            case _:
                container[key] = other
    keep_short(body)


def mutate_bytes(chance: random.Random, data: bytes) -> bytes:
    """Overwrite, take out, double, insert or cut off some bytes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 12)):
        at = chance.randrange(len(changed) + 1)
        end = at + min(chance.choice((1, 1, 2, 8, 64)), len(changed) - at)
        match chance.randrange(12):
            case 0:
                del changed[at:end]
            case 1:
                changed[at:at] = changed[at:end] * chance.choice((1, 50))
            case 2:
                changed[at:at] = chance.choice(TOKENS_OF_BYTES)
            case 3 if chance.random() < 0.3:
                del changed[at:]
            case _:
                changed[at:end] = chance.randbytes(end - at)
    return bytes(changed)


class Mutation(Protocol):
    """A request that is sent once."""

    kind: str

    def send(self, host: str, port: int) -> int:
        """Send it, and return the answer's status; 0 where there was none."""


@dataclass(frozen=True)
class RawMutation:
    """Bytes sent piece by piece."""

    kind: str
    pieces: Sequence[bytes]
    patience_s: float

    def send(self, host: str, port: int) -> int:
        """Send the pieces; hang up when there has been no answer for `patience_s`."""
        status = 0
        with suppress(OSError), socket.create_connection((host, port), timeout=PATIENT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(ConnectionError):  # it was refused before its end, and the answer says why
                for piece in self.pieces:
                    connection.sendall(piece)
            connection.settimeout(self.patience_s)
            method = self.pieces[0].partition(b" ")[0].decode("latin-1")
            response = http.client.HTTPResponse(connection, method=method)
            with closing(response), suppress(http.client.HTTPException):
                response.begin()
                status = int(response.status)
                response.read()
        return status


def head(path: bytes, *lines: bytes) -> list[bytes]:
    """Return the lines of a request's head."""
    usual = (b"Host: localhost", b"Authorization: Bearer " + KEYS[0].encode(), b"Content-Type: application/json")
    return [b"POST " + path + b" HTTP/1.1", *usual, b"Connection: close", *lines]


def joined(lines: Sequence[bytes], body: bytes) -> bytes:
    """Return a request's bytes."""
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def plain(kind: str, path: str, body: bytes) -> RawMutation:
    """Return a request whose framing is sound."""
    lines = head(path.encode(), b"Content-Length: %d" % len(body))
    return RawMutation(kind, [joined(lines, body)], PATIENT_S)


def mutated_value(chance: random.Random) -> RawMutation:
    """Return a request with values of its JSON mutated."""
    path, body = chance.choice(requests(encoded(chance, "PNG")))
    mutate_json(chance, body := copy.deepcopy(body))  # parts of it are shared
    return plain("values", path, json.dumps(body).encode())


def mutated_body(chance: random.Random) -> RawMutation:
    """Return a request with bytes of its JSON mutated."""
    path, body = chance.choice(requests(encoded(chance, "PNG")))
    return plain("bytes", path, mutate_bytes(chance, json.dumps(body).encode()))


def mutated_picture(chance: random.Random) -> RawMutation:
    """Return a request about a picture, of any format, with bytes of its file mutated."""
    picture = mutate_bytes(chance, encoded(chance, chance.choice(FORMATS)))
    path, body = chance.choice([each for each in requests(picture) if base64.b64encode(picture).decode() in str(each)])
    return plain("pictures", path, json.dumps(body).encode())


def mutated_head(chance: random.Random) -> RawMutation:
    """Return a request with lines of its head changed, added, doubled or taken out."""
    path, body = chance.choice(requests(encoded(chance, "PNG")))
    data = json.dumps(body).encode()
    lines = head(path.encode(), b"Content-Length: %d" % len(data))
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(1, len(lines))
        match chance.randrange(7):
            case 0:
                lines[0] = chance.choice(METHODS) + lines[0][lines[0].index(b" ") :]
            case 1:
                lines[0] = (
                    b"GET " + chance.choice(TARGETS) + chance.choice((b" HTTP/1.1", b" HTTP/1.0", b" HTTP/9", b""))
                )
            case 2:
                lines[at] = mutate_bytes(chance, lines[at])
            case 3 if len(lines) > 2:
                del lines[at]
            case 4:
                lines += [lines[at]] * chance.choice((1, 200))
            case _:
                lines[at : at + chance.randrange(2)] = [chance.choice(HEADERS)]
    return RawMutation("heads", [joined(lines, data)], HASTY_S)


def mutated_chunks(chance: random.Random) -> RawMutation:
    """Return a request in chunks, in six of ten with something wrong about them, sent in pieces of any size."""
    path, body = chance.choice(requests(encoded(chance, "PNG")))
    data, chunks = json.dumps(body).encode(), []
    while data:
        size = chance.choice((1, 7, 100, 5000, len(data)))
        chunk, data = data[:size], data[size:]
        chunks.append(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    chunks.append(b"0\r\n\r\n")
    if wrong := chance.random() < 0.6:
        at = chance.randrange(len(chunks))
        odd = (
            b"-1\r\n",
            b"ffffffffffffffff\r\n",
            b"0x5\r\nhello\r\n",
            b"5;a=" + b"b" * 5000 + b"\r\nhello\r\n",
            b"zz\r\n",
        )
        chunks[at] = chance.choice((*odd, b"", b"\r\n", b"0\r\nX: y\r\n\r\n", mutate_bytes(chance, chunks[at])))
    both = [b"Content-Length: 10"] if chance.random() < 0.1 else []
    whole = joined(head(path.encode(), b"Transfer-Encoding: chunked", *both), b"".join(chunks))
    cuts = sorted(chance.sample(range(1, len(whole)), min(chance.choice((0, 1, 5, 40)), len(whole) - 1)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    return RawMutation("chunks", pieces, HASTY_S if wrong or both else PATIENT_S)


def form(file: bytes) -> bytes:
    """Return a form of `/v1/convert/file`."""
    parts = [b'name="files"; filename="page.pdf"\r\nContent-Type: application/octet-stream\r\n\r\n' + file]
    parts += [b'name="%b"\r\n\r\n%b' % pair for pair in ((b"max_tokens", b"4"), (b"to_formats", b"md"))]
    return b"".join(b"--form\r\nContent-Disposition: form-data; %b\r\n" % part for part in parts) + b"--form--\r\n"


def mutated_form(chance: random.Random) -> RawMutation:
    """Return a document in a form, with bytes of its file, or of all, mutated; one in four is a PDF."""
    file = encoded(chance, "PDF" if chance.random() < 0.25 else chance.choice(FORMATS))
    data = form(mutate_bytes(chance, file)) if chance.random() < 0.5 else mutate_bytes(chance, form(file))
    lines = head(b"/v1/convert/file", b"Content-Length: %d" % len(data))
    lines = [each.replace(b"application/json", b"multipart/form-data; boundary=form") for each in lines]
    return RawMutation("forms", [joined(lines, data)], PATIENT_S)


MAKERS: Sequence[Callable[[random.Random], RawMutation]] = (
    mutated_value,
    mutated_body,
    mutated_picture,
    mutated_head,
    mutated_chunks,
    mutated_form,
)


def mutation(seed: int, number: int) -> RawMutation:
    """Return the mutation of this number, the same each time."""
    chance = random.Random(f"{seed} {number}")  # noqa: S311
    return MAKERS[number % len(MAKERS)](chance)


@dataclass(frozen=True)
class GeneratedMutation:
    """A request made by schemathesis."""

    case: Any
    kind: str = "document"

    def send(self, host: str, port: int) -> int:  # noqa: ARG002 - the case knows the server
        """Send it through schemathesis's own client."""
        from requests import RequestException

        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        try:
            answer = self.case.call(headers=headers, timeout=PATIENT_S)
        except (RequestException, ValueError):  # what cannot be put into HTTP
            return 0
        return int(answer.status_code)


def from_document(document: dict[str, Any], url: str, count: int, seed: int) -> list[Mutation]:
    """Return at most so many right and wrong requests that schemathesis makes from an OpenAPI document."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    operations = [found.ok() for found in schema.get_all_operations()]
    operations = [each for each in operations if each.method == "post"]
    each = math.ceil(count / len(operations) / len(GenerationMode))
    bounds = settings(
        max_examples=each,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    made: list[Mutation] = []

    def add(case: Any) -> None:
        keep_short(case.body)
        made.append(GeneratedMutation(case))

    for operation in operations:
        for mode in GenerationMode:
            seeded(seed)(bounds(given(case=operation.as_strategy(generation_mode=mode))(add)))()
    random.Random(seed).shuffle(made)  # noqa: S311
    return made[:count]


# The run


def waits(other: Other, since: float) -> dict[str, Any]:
    """Return how long the honest client waited for the answers to what it has asked since then, in seconds."""
    took = [end - started for started, end, _ in other.asks if started >= since]
    return {"asks": len(took), "median_s": median(took), "worst_s": max(took)}


def chosen(url: str, count: int, seed: int) -> list[tuple[int, Mutation]]:
    """Return the mutations to be sent, with their numbers; those of schemathesis have negative ones."""
    asked = urllib.request.Request(f"{url}/openapi.json", headers={"Authorization": f"Bearer {KEYS[0]}"})  # noqa: S310
    with urllib.request.urlopen(asked, timeout=PATIENT_S) as answer:  # noqa: S310
        generated = from_document(json.load(answer), url, round(count * FROM_DOCUMENT), seed)
    mutations: list[tuple[int, Mutation]] = [(-number, each) for number, each in enumerate(generated, 1)]
    mutations += [(number, mutation(seed, number)) for number in range(count - len(generated))]
    random.Random(seed).shuffle(mutations)  # noqa: S311
    return mutations


def measure(model: Path, count: int, seed: int, only: int | None = None) -> dict[str, Any]:
    """Return the statuses by kind, the failures, and the honest client's waits alone and beside the mutations."""
    statuses: defaultdict[str, Counter[int]] = defaultdict(Counter)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        (keys := Path(folder) / "keys").write_text("\n".join(KEYS), encoding="utf-8")
        with server(model, "--api-key-file", str(keys)) as (url, process):
            host, _, port = url.removeprefix("http://").partition(":")
            mutations = chosen(url, count, seed) if only is None else [(only, mutation(seed, only))]
            with Other(url, PATIENT_S) as other:
                time.sleep(ALONE_S)
                alone, started = waits(other, 0.0), time.monotonic()
                for sent, (number, each) in enumerate(mutations, 1):
                    status = each.send(host, int(port))
                    statuses[each.kind][status] += 1
                    if status >= 500 and status != 503:
                        failures.append({"number": number, "kind": each.kind, "status": status})
                    if sent % 500 == 0:
                        print(f"{sent:6} of {len(mutations)}", file=sys.stderr, flush=True)
                took = time.monotonic() - started
                other.waited(started)  # for the answer to what it has asked by now
                beside = waits(other, started)
            alive, memory = process.is_running(), process.memory_info().rss / 2**20
    return {
        "requests": len(mutations),
        "seed": seed,
        "seconds": took,
        "statuses": {kind: {str(each): found[each] for each in sorted(found)} for kind, found in statuses.items()},
        "failures": failures,
        "alone": alone,
        "beside": beside,
        "honest_answers": sorted({f"{status} {told}" for _, _, (status, told) in other.asks}),
        "alive": alive,
        "rss_mib": memory,
    }


def tell(result: Mapping[str, Any]) -> bool:
    """Print a result, and return whether nothing is wrong with it."""
    for kind, found in result["statuses"].items():
        print(f"{kind:10} {'  '.join(f'{status}: {count}' for status, count in found.items())}")
    busy = sum(found.get("503", 0) for found in result["statuses"].values())
    print(
        f"{result['requests']} requests in {result['seconds']:.0f} s, {len(result['failures'])} 5xx, {busy} busy (503)"
    )
    for each in result["failures"][:20]:
        print(f"  {each['status']} for {each['kind']} number {each['number']}")
    for name, label in (("alone", "alone"), ("beside", "beside them")):
        figures = result[name]
        print(
            f"the honest client waited {label}: median {figures['median_s']:.3f} s, worst {figures['worst_s']:.3f} s"
            f" of {figures['asks']}"
        )
    print(f"it was told {result['honest_answers']}; the server has {result['rss_mib']:.0f} MiB")
    one_answer = len(result["honest_answers"]) == 1 and result["honest_answers"][0].startswith("200 ")
    return bool(result["alive"] and one_answer and not result["failures"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="?", default=default_model())
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="send the mutation of this number alone")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.requests, arguments.seed, arguments.only)
    sound = tell(result)
    write_result(arguments.output, {"model": arguments.model.name, **result})
    sys.exit(not sound)


if __name__ == "__main__":
    main()
