"""An answer that has ended, however it ended, holds no memory: no reference cycle waits for the garbage collector."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from starlette.requests import Request

from edgevlm import VLM, EdgeVLMError, GenerationConfig
from edgevlm.inputs.image import Picture
from edgevlm.inputs.prompt import Prompt
from edgevlm.inputs.vision_cache import PreprocessedImage
from edgevlm.interrupt import Interrupted, interruptible
from edgevlm.runtime.kv_session import Session
from edgevlm.server.engine import Job
from edgevlm.server.errors import AbandonedError, ApiError, ClientGoneError, FailedError
from edgevlm.server.messages import Conversation
from edgevlm.server.ollama import OllamaGenerate
from edgevlm.server.plan import Plan
from edgevlm.server.responses import ResponsesRequest
from edgevlm.server.run import Server
from edgevlm.server.schemas import ChatRequest
from tests.conftest import F32
from tests.helpers.serving import QUESTION, SCHEMA, Braked, ask, data_url, raw, request, serving, shown, wait_until

RED = data_url(Image.new("RGB", (90, 70), (200, 30, 30)))
LARGE = (
    Session, Prompt, PreprocessedImage, Picture, Plan, Job, Conversation,
    ChatRequest, ResponsesRequest, OllamaGenerate, Request,
)  # fmt: skip
ERRORS = (EdgeVLMError, ApiError, AbandonedError, ClientGoneError, FailedError, Interrupted)


def held() -> Counter[str]:
    """Count what holds pictures, KV caches or request bodies, and the errors whose frames may hold them."""
    kinds = [type(each) for each in gc.get_objects()]
    return Counter(kind.__name__ for kind in kinds if issubclass(kind, (*LARGE, *ERRORS)))


def grown(before: Counter[str]) -> dict[str, int]:
    """Return what is held beyond what was held before."""
    return dict(held() - before)


@pytest.fixture
def model(exported: Path) -> Iterator[Braked]:
    """A model whose two idle sessions and vision cache are as full as they get."""
    vlm = VLM(exported, F32)
    for question in ("One?", "Quite another question, is it not?"):
        vlm.generate(Image.new("RGB", (90, 70), (200, 30, 30)), question, max_new_tokens=1)
    model = Braked(vlm)
    yield model
    model.release()


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Keep the garbage collector from finding what only it would find."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def hang_up(server: Server, model: Braked, token: int, *, stream: bool) -> None:
    """Ask about a picture, and go away before a token of the answer."""
    model.stop_at = token
    fields = {"messages": shown(RED), "max_tokens": 200, "stream": stream}
    connection = raw(server, fields)
    wait_until(lambda: model.holding)
    [job] = server.worker.current
    connection.close()
    wait_until(job.abandoned.is_set)
    model.release()
    wait_until(lambda: not server.worker.running)
    model._go.clear()
    model.tokens.clear()


def read_stream(server: Server) -> None:
    """Ask for a stream and read all of it."""
    with raw(server, {"messages": shown(RED), "stream": True}) as connection, connection.makefile("rb") as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def answered(server: Server, **fields: object) -> None:
    assert ask(server, messages=shown(RED), **fields)[0] == 200


def refused(server: Server, status: int, **fields: object) -> None:
    assert ask(server, **fields)[0] == status


def respond(server: Server, url: str, status: int, **fields: object) -> None:
    """Ask through OpenAI's Responses API."""
    parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": QUESTION}]
    body = {"input": [{"role": "user", "content": parts}], "max_output_tokens": 8, **fields}
    assert request(server, "POST", "/v1/responses", body)[0] == status


def generate(server: Server, url: str, status: int, **fields: object) -> None:
    """Ask through Ollama's API."""
    body = {"prompt": QUESTION, "images": [url.partition(",")[2]], "options": {"num_predict": 8}, **fields}
    assert request(server, "POST", "/api/generate", body)[0] == status


DAMAGED = data_url(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x09\0\0\0\x09\x08\x02\0\0\0\xde\xad\xbe\xef" + b"x" * 99)
HUNG_UP: dict[str, Callable[[Server, Braked], None]] = {
    "hung up before a stream's first piece": lambda server, model: hang_up(server, model, 1, stream=True),
    "hung up in a stream": lambda server, model: hang_up(server, model, 3, stream=True),
    "hung up on a whole answer": lambda server, model: hang_up(server, model, 3, stream=False),
}
ENDS: dict[str, Callable[[Server, Braked], None]] = {
    **HUNG_UP,
    "whole": lambda server, _: answered(server),
    "stream": lambda server, _: read_stream(server),
    "schema": lambda server, _: answered(server, response_format=SCHEMA, max_tokens=100),
    "damaged picture": lambda server, _: refused(server, 400, messages=shown(DAMAGED)),
    "picture that ends early": lambda server, _: refused(server, 400, messages=shown(short_picture())),
    "no schema": lambda server, _: refused(
        server, 400, response_format={"type": "json_object", "schema": {"type": "nonesuch"}}
    ),
    "prompt too long": lambda server, _: refused(
        server, 400, messages=[*shown(RED), {"role": "user", "content": "word " * 3000}]
    ),
    "body too large": lambda server, _: refused(server, 413, messages=shown("data:," + "x" * 2**20)),
    "no data": lambda server, _: refused(server, 400, messages=shown("data:image/png;base64,!!!!")),
    "no such file": lambda server, _: refused(server, 400, messages=shown("/nonesuch.png")),
    "response": lambda server, _: respond(server, RED, 200),
    "streamed response": lambda server, _: respond(server, RED, 200, stream=True),
    "response about a damaged picture": lambda server, _: respond(server, DAMAGED, 400),
    "response about a picture that ends early": lambda server, _: respond(server, short_picture(), 400, stream=True),
    "Ollama's answer": lambda server, _: generate(server, RED, 200, stream=False),
    "Ollama's lines": lambda server, _: generate(server, RED, 200),
    "Ollama's answer about a damaged picture": lambda server, _: generate(server, DAMAGED, 400),
    "Ollama's answer about a picture that ends early": lambda server, _: generate(server, short_picture(), 400),
}


def short_picture() -> str:
    """Return a picture whose header is sound, and whose pixels end early."""
    from base64 import b64decode

    whole = data_url(Image.effect_noise((90, 70), 90).convert("RGB"))
    return data_url(b64decode(whole.partition(",")[2])[:2000])


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_that_has_ended_holds_nothing(model: Braked, tmp_path: Path, uncollected: None, end: str) -> None:
    if end not in HUNG_UP:
        model.release()
    with serving(model, max_body_bytes=2**20, image_folder=tmp_path) as server:
        before = held()
        for _ in range(3):
            ENDS[end](server, model)
        wait_until(lambda: not grown(before))


@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_answer_that_takes_too_long_holds_nothing(model: Braked, uncollected: None, stop_at: int) -> None:
    model.stop_at = stop_at
    with serving(model, time_limit_s=0.3) as server:
        before = held()
        assert ask(server, messages=shown(RED))[0] == 504
        model.release()
        wait_until(lambda: not grown(before))


def test_a_damaged_picture_that_waited_holds_nothing(model: Braked, uncollected: None) -> None:
    """It is found to be damaged while another answer is made, and told when its turn has come."""
    with serving(model) as server, ThreadPoolExecutor(2) as pool:
        before = held()
        first = pool.submit(ask, server)
        wait_until(lambda: model.holding)
        second = pool.submit(ask, server, messages=shown(short_picture()))
        wait_until(lambda: (job := server.worker._queue._next()) and job.failure)
        model.release()
        assert (first.result()[0], second.result()[0]) == (200, 400)
        wait_until(lambda: not grown(before))


def test_answers_decoded_together_hold_nothing(exported: Path, uncollected: None) -> None:
    """Nor does one of them whose client has gone away."""
    vlm = VLM(exported, replace(F32, kv_cache="paged"))
    for question in ("One?", "Quite another question, is it not?"):
        vlm.generate(Image.new("RGB", (90, 70), (200, 30, 30)), question, max_new_tokens=1)
    model = Braked(vlm)
    with serving(model) as server, ThreadPoolExecutor(2) as pool:
        before = held()
        gone = raw(server, {"messages": shown(RED), "max_tokens": 200, "stream": True})
        wait_until(lambda: model.holding)
        others = [pool.submit(ask, server, messages=shown(RED), max_tokens=30) for _ in range(2)]
        wait_until(lambda: server.worker.waiting == 2)
        model.release()
        gone.close()
        assert [each.result()[0] for each in others] == [200, 200]
        wait_until(lambda: not server.worker.running)
        wait_until(lambda: not grown(before))


def test_events_closed_early_hold_nothing(model: Braked, uncollected: None) -> None:
    model.release()
    before = held()
    picture = Image.new("RGB", (90, 70), (200, 30, 30))
    for pieces in (0, 1, 3):
        stream = model._vlm.stream(picture, QUESTION, GenerationConfig(max_new_tokens=20))
        for _ in range(pieces):
            next(stream)
        stream.close()
    del stream, picture
    assert grown(before) == {}


def test_events_broken_off_hold_nothing(model: Braked, uncollected: None) -> None:
    before = held()
    asked: list[int] = []

    def at_the_third() -> bool:
        asked.append(1)
        return len(asked) >= 3

    with interruptible(at_the_third), pytest.raises(Interrupted):
        model._vlm.generate([Image.new("RGB", (90, 70))] * 3, QUESTION)
    assert grown(before) == {}


def test_a_conversation_that_is_dropped_holds_nothing(model: Braked, uncollected: None) -> None:
    before = held()
    chat = model._vlm.chat(max_new_tokens=8)
    chat.ask(QUESTION, Image.new("RGB", (90, 70), (200, 30, 30)))
    stream = chat.stream("And now?")
    next(stream)
    stream.close()
    with pytest.raises(EdgeVLMError):
        chat.ask("word " * 3000)
    del chat, stream
    assert grown(before) == {}
