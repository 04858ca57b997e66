"""Servers on real sockets, in a thread of the test's own process, and what the tests ask them."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from edgevlm import VLM
from edgevlm.answer import Event, Progress
from edgevlm.decoding.stream import Step
from edgevlm.server.models import Source
from edgevlm.server.run import Server
from edgevlm.server.settings import ServeConfig
from edgevlm.strict_json import read_json

QUESTION = "What is the size of the grid?"
"""The bundled model answers it with several tokens, with a picture or without."""
PATIENCE_S = 30.0


KIND = {
    "type": "object",
    "properties": {"kind": {"enum": ["circle", "square"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
OBJECT, SCHEMA = {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "kind", "schema": KIND}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """Return a function that needs these arguments."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": {**parameters, "additionalProperties": False}}}


LOOK = tool("look", side={"enum": ["left", "right"]})


@contextmanager
def serving(vlm: VLM, *others: Source, model_name: str = "tiny", **options: Any) -> Iterator[Server]:
    """Run a server for `vlm`, and for others that are loaded when they are used, until the block ends."""
    server = Server([Source(model_name, lambda: vlm), *others], ServeConfig(port=0, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.worker.ready)
        yield server
    finally:
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], object], give_up_after_s: float = PATIENCE_S) -> None:
    """Wait for what must come soon."""
    deadline = time.monotonic() + give_up_after_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def request(
    server: Server, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send one request and return status, headers and body; `body` is JSON unless it is bytes."""
    connection = http.client.HTTPConnection(*server.socket.getsockname()[:2], timeout=PATIENCE_S)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} if data is not None else {}
    try:
        connection.request(method, path, data, sent | (headers or {}))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def ask(server: Server, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, Any]:
    """Send a chat completion request and return status and JSON."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, **fields}
    status, _, answer = request(server, "POST", "/v1/chat/completions", body, headers)
    return status, read_json(answer)


def choice_of(server: Server, **fields: Any) -> dict[str, Any]:
    """Ask, and return the answer's only choice."""
    status, answer = ask(server, **fields)
    assert status == 200, answer
    return answer["choices"][0]


def refused(server: Server, **fields: Any) -> tuple[str, str, str]:
    """Ask what is refused, and return code, field and message."""
    status, answer = ask(server, **fields)
    assert status == 400, answer
    return answer["error"]["code"], answer["error"]["param"], answer["error"]["message"]


def ask_error(server: Server, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, str]:
    """Send a request that is refused and return status and code."""
    status, answer = ask(server, headers, **fields)
    assert set(answer) == {"error"}, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
    return status, answer["error"]["code"]


def events(body: bytes) -> list[Any]:
    """Return the JSON of a stream's events, the closing [DONE] taken off."""
    *chunks, last, rest = body.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [read_json(chunk.removeprefix("data: ")) for chunk in chunks]


def data_url(image: Image.Image | bytes | Path) -> str:
    """Return a picture as a data: URL."""
    if isinstance(image, Path):
        image = image.read_bytes()
    if isinstance(image, Image.Image):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def shown(*urls: str, text: str = QUESTION, **detail: str) -> list[dict[str, Any]]:
    """Return a conversation of one question about pictures."""
    content: list[Any] = [{"type": "image_url", "image_url": {"url": url, **detail}} for url in urls]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def raw(server: Server, fields: dict[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
    """Open a connection, send a request on it and return it."""
    body = json.dumps(fields).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    connection = socket.create_connection(server.socket.getsockname()[:2], timeout=PATIENCE_S)
    connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
    return connection


class Braked:
    """A model that stops before a token until the test lets it go on: nothing of the answer is changed."""

    def __init__(self, vlm: VLM) -> None:
        self._vlm = vlm
        self._go = threading.Event()
        self.stop_at = 3
        self.tokens: list[int] = []
        """Tokens made of each answer so far."""
        self.callers: list[str] = []
        """Who asked for each answer, in the order in which they were begun."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlm, name)

    @property
    def holding(self) -> bool:
        """Whether an answer is being held at its brake."""
        return bool(self.tokens) and self.tokens[-1] == self.stop_at and not self._go.is_set()

    def release(self) -> None:
        """Let this answer and all others go on."""
        self._go.set()

    def steps(self, *request: Any) -> Generator[Event | Step, None, None]:
        self.tokens.append(0)
        self.callers.append(request[-1])
        with closing(self._vlm.steps(*request)) as events:
            for event in events:
                if isinstance(event, Progress) and event.stage == "decode":
                    self.tokens[-1] = event.done
                    if event.done == self.stop_at:
                        assert self._go.wait(PATIENCE_S)
                yield event
