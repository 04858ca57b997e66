"""Ollama's API: its own client against a real server on the bundled model, asking as Frigate and Home Assistant do."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import ollama
import pytest

from edgevlm import VLM, GenerationConfig, __version__
from edgevlm.server.deltas import End
from edgevlm.server.ollama import OllamaChat
from edgevlm.server.ollama_reply import OllamaReply
from edgevlm.server.run import Server
from edgevlm.strict_json import read_json
from tests.helpers.serving import (
    KIND,
    LOOK,
    QUESTION,
    SCHEMA,
    Braked,
    ask,
    choice_of,
    data_url,
    request,
    serving,
    shown,
    wait_until,
)

LIGHT = Path(__file__).parents[1] / "examples" / "light.png"
COLOUR = "What colour is the tower light showing?"
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def server(panel: VLM) -> Iterator[Server]:
    with serving(panel, model_name="panel", max_prompt_chars=5000, max_images=2) as server:
        yield server


@contextmanager
def ollama_client(server: Server, **headers: str) -> Iterator[ollama.Client]:
    """Lend a client whose connections end with the block."""
    client = ollama.Client(host=server.url, headers=headers)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[ollama.Client]:
    with ollama_client(server) as client:
        yield client


@pytest.fixture(scope="module")
def exact(vlm: VLM) -> Iterator[Server]:
    """A server for the tests' own model in float32: only there a seed gives one answer, however much is cached."""
    with serving(vlm) as server:
        yield server


def user(text: str = QUESTION, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text, **fields}]


def post(server: Server, path: str, body: object, **headers: str) -> tuple[int, Any]:
    """Send a request without the client, and return status and JSON."""
    status, _, answer = request(server, "POST", path, body, headers)
    return status, read_json(answer)


# Answers


def test_a_question_about_a_picture(server: Server, client: ollama.Client) -> None:
    wanted = choice_of(server, messages=shown(data_url(LIGHT), text=COLOUR))["message"]["content"]
    found = client.generate("panel", COLOUR, images=[LIGHT.read_bytes()])
    assert found.response == wanted == "green"
    assert (found.model, found.done, found.done_reason) == ("panel", True, "stop")
    chatted = client.chat("panel:latest", user(COLOUR, images=[str(LIGHT)]))
    assert (chatted.message.role, chatted.message.content) == ("assistant", wanted)
    assert chatted.model == "panel:latest"


def test_counts_and_durations(client: ollama.Client, panel: VLM) -> None:
    wanted = panel.generate(LIGHT, COLOUR)
    found = client.generate("panel", COLOUR, images=[LIGHT])
    assert (found.prompt_eval_count, found.eval_count) == (wanted.prompt_tokens, wanted.generated_tokens)
    parts = (found.load_duration, found.prompt_eval_duration, found.eval_duration)
    assert all(isinstance(part, int) and part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(found.total_duration, abs=2)
    assert found.prompt_eval_duration > 10_000  # nanoseconds: in no unit above them is a prefill so many


@pytest.mark.parametrize("ask", ["chat", "generate"])
def test_a_stream_is_lines_of_json(server: Server, client: ollama.Client, ask: str) -> None:
    asked = {"messages": user()} if ask == "chat" else {"prompt": QUESTION}
    path = f"/api/{ask}"
    options = {"num_predict": 12}
    status, headers, body = request(server, "POST", path, asked | {"options": options})  # a stream unless it says no
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    lines = [read_json(line) for line in body.splitlines()]
    _, whole = post(server, path, asked | {"options": options, "stream": False})

    def text(line: dict[str, Any]) -> str:
        return line["message"]["content"] if ask == "chat" else line["response"]

    assert "".join(map(text, lines)) == text(whole)
    assert len(lines) > 3
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert whole.keys() - {"message", "response"} == lines[-1].keys() - {"message", "response"}
    assert (lines[-1]["done_reason"], lines[-1]["eval_count"]) == (whole["done_reason"], whole["eval_count"])
    call = getattr(client, ask)
    streamed = list(call("panel", **asked, options=options, stream=True))
    assert "".join(text(part.model_dump()) for part in streamed) == text(whole)


def test_options_reach_the_model(exact: Server, client: ollama.Client, vlm: VLM) -> None:
    config = GenerationConfig(max_new_tokens=12, temperature=1.5, top_p=0.9, top_k=50, seed=11)
    wanted = vlm.generate(None, QUESTION, config).text
    options: dict[str, Any] = {"num_predict": 12, "temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 11}
    with ollama_client(exact) as sampling:
        assert sampling.generate("tiny", QUESTION, options=options).response == wanted
    whole = client.generate("panel", QUESTION, options={"num_predict": 8}).response
    assert len(whole) > 4
    for stop in ([whole[2:4]], [whole[2:4], "never in it"]):
        found = client.generate("panel", QUESTION, options={"num_predict": 8, "stop": stop})
        assert (found.response, found.done_reason) == (whole[: whole.index(whole[2:4])], "stop")
    assert client.generate("panel", QUESTION, options={"num_predict": 1}).done_reason == "length"


def test_an_answer_without_end_is_bounded_by_the_context(panel: VLM) -> None:
    """-1 asks for no bound but the context: more than the server's own for a request that does not say."""
    with serving(panel, max_tokens=1) as server:
        counts = [
            post(server, "/api/generate", {"prompt": QUESTION, "stream": False, "options": options})[1]["eval_count"]
            for options in ({}, {"num_predict": -1}, {"num_predict": -2})
        ]
    assert counts[0] == 1
    assert counts[1] == counts[2] > 1


def test_system_and_pictures_come_before_the_question(client: ollama.Client) -> None:
    system = "Be brief."
    chatted = client.chat("panel", [{"role": "system", "content": system}, *user(COLOUR, images=[LIGHT])])
    asked = client.generate("panel", COLOUR, system=system, images=[LIGHT])
    assert asked.prompt_eval_count == chatted.prompt_eval_count
    assert asked.response == chatted.message.content
    assert asked.prompt_eval_count > client.generate("panel", COLOUR, images=[LIGHT]).prompt_eval_count


@pytest.mark.parametrize("stream", [False, True])
def test_json_of_a_schema(client: ollama.Client, stream: bool) -> None:
    found = client.generate("panel", QUESTION, format=KIND, stream=stream)
    text = "".join(part.response for part in found) if stream else found.response
    jsonschema_rs.validate(KIND, json.loads(text))
    any_json = client.chat("panel", user(), format="json", options={"num_predict": 30})
    assert any_json.message.content.startswith("{")
    assert client.generate("panel", QUESTION, format="", options={"num_predict": 1}).response[:1] != "{"


def test_log_probabilities(server: Server) -> None:
    asked = {"prompt": QUESTION, "logprobs": True, "top_logprobs": 2, "options": {"num_predict": 3}}
    _, whole = post(server, "/api/generate", asked | {"stream": False})
    lines = [read_json(line) for line in request(server, "POST", "/api/generate", asked)[2].splitlines()]
    streamed = [token for line in lines for token in line.get("logprobs", ())]
    assert [token["token"] for token in streamed] == [token["token"] for token in whole["logprobs"]]
    assert [len(token["top_logprobs"]) for token in whole["logprobs"]] == [2] * len(whole["logprobs"])


# Tools


def test_a_function_is_called_with_an_object(exact: Server) -> None:
    """Whether a model calls one is its own choice here: between a call and JSON, over some seeds, this one does."""
    calls = 0
    for seed in range(12):
        sampled = {"seed": seed, "temperature": 2.0}
        wanted = choice_of(exact, tools=[LOOK], response_format=SCHEMA, max_tokens=200, **sampled)
        options = {**sampled, "num_predict": 200}
        asked = {"messages": user(), "tools": [LOOK], "format": KIND, "options": options}
        _, whole = post(exact, "/api/chat", asked | {"stream": False})
        lines = [read_json(line) for line in request(exact, "POST", "/api/chat", asked)[2].splitlines()]
        text = "".join(line["message"]["content"] for line in lines)
        told = [call for line in lines for call in line["message"].get("tool_calls", ())]
        assert text == whole["message"]["content"] == (wanted["message"]["content"] or "")
        assert told == whole["message"].get("tool_calls", [])
        for call, chosen in zip(told, wanted["message"].get("tool_calls", ()), strict=True):
            calls += 1
            assert call["function"]["name"] == "look"
            assert call["function"]["arguments"] == json.loads(chosen["function"]["arguments"])
            assert whole["done_reason"] == "stop"
    assert calls


def test_a_call_and_its_result_go_on(exact: Server) -> None:
    with ollama_client(exact) as client:
        for seed in range(12):
            options = {"seed": seed, "temperature": 2.0, "num_predict": 200}
            found = client.chat("tiny", user(), tools=[LOOK], format=KIND, options=options)
            if found.message.tool_calls:
                break
        [call] = found.message.tool_calls or ()
        assert call.function.arguments["side"] in ("left", "right")
        result = {"role": "tool", "tool_name": "look", "content": "Red."}
        short = {"num_predict": 1}
        after = client.chat("tiny", [*user(), found.message, result], options=short)
        assert after.prompt_eval_count > client.chat("tiny", user(), options=short).prompt_eval_count


def test_arguments_that_no_number_can_hold_are_left_a_text(panel: VLM) -> None:
    answer = panel.generate(None, QUESTION, GenerationConfig(max_new_tokens=1))
    text = '<tool_call>{"name": "set", "arguments": {"value": 1e999}}</tool_call>'
    end = End.of(replace(answer, text=text, satisfied=True), 0.0, tools=True)
    assert end.call
    message = OllamaReply(OllamaChat(), "panel").whole(end)["message"]
    assert message == {"role": "assistant", "content": text}


# What clients ask before they ask


def test_the_model_is_listed_and_shown(server: Server, client: ollama.Client, panel: VLM) -> None:
    [entry] = client.list().models
    assert (entry.model, entry.size, entry.digest) == (
        "panel:latest", panel.manifest.size_bytes, panel.manifest.fingerprint,
    )  # fmt: skip
    [loaded] = client.ps().models
    assert (loaded.model, loaded.size, loaded.size_vram) == (entry.model, entry.size, 0)
    for name in ("panel", "panel:latest", entry.model):
        found = client.show(name)
        assert found.details.family == panel.manifest.family
        assert found.modelinfo[f"{panel.manifest.family}.context_length"] == panel.context_length
        assert "vision" in found.capabilities
    assert post(server, "/api/show", {"name": "panel"})[0] == 200
    with pytest.raises(ollama.ResponseError, match="this server's model is called panel") as raised:
        client.show("llava")
    assert raised.value.status_code == 404
    assert read_json(request(server, "GET", "/api/version")[2]) == {"version": __version__}


@pytest.mark.parametrize("keep_alive", ["5m", -1, 0, None])
def test_a_request_that_asks_nothing_finds_the_model_loaded(client: ollama.Client, keep_alive: Any) -> None:
    for found in (client.generate("panel", keep_alive=keep_alive), client.chat("panel", keep_alive=keep_alive)):
        assert (found.done, found.done_reason, found.eval_count) == (True, "load", None)


def test_frigate_s_and_home_assistant_s_requests_are_taken(server: Server, client: ollama.Client) -> None:
    frigate = {"temperature": 0.5, "repeat_penalty": 1.05, "presence_penalty": 0.3}
    found = client.generate("panel", COLOUR, images=[LIGHT.read_bytes()], options=frigate, keep_alive="1h")
    assert found.response
    asked = {"prompt": QUESTION, "stream": False, "options": {**frigate, "frequency_penalty": 0, "num_predict": 1}}
    assert post(server, "/api/generate", asked)[1]["ignored"] == ["repeat_penalty", "presence_penalty"]
    parts = client.chat(
        "panel", user(COLOUR, images=[ollama.Image(value=LIGHT)]), stream=True, think=False, tools=None, format=None,
        keep_alive="-1s", options={"num_ctx": 8192},
    )  # fmt: skip
    assert "".join(part.message.content for part in parts) == "green"
    assert "ignored" not in post(server, "/api/generate", {"prompt": "hi", "stream": False})[1]


def test_ollama_s_own_program_s_requests_are_taken(server: Server) -> None:
    """Its requests hold every field of its structures, empty ones as well."""
    show = {"model": "panel", "system": "", "template": "", "verbose": False, "options": None, "name": ""}
    assert post(server, "/api/show", show)[0] == 200
    beside = {"options": {}, "keep_alive": None, "_debug_render_only": False, "stream": False}
    generate = {"model": "panel", "prompt": "", "suffix": "", "system": "", "template": "", **beside}
    assert post(server, "/api/generate", generate)[1]["done_reason"] == "load"
    assert post(server, "/api/generate", generate | {"prompt": QUESTION})[1]["response"]
    chat = {"model": "panel", "messages": user(), "think": False, **beside}
    assert post(server, "/api/chat", chat)[1]["message"]["content"]
    assert request(server, "HEAD", "/")[0] == 200


# What is refused, and how it is told

ANY = base64.b64encode(b"hello").decode()


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "llava"}, 404, "this server's model is called panel"),
        ({"messages": user(images=["!"])}, 400, "messages.0.images.0: the data: URL is not valid base64"),
        ({"messages": user(images=[ANY])}, 400, "messages.0.images.0: the image is not an image in a format"),
        ({"messages": user(images=["https://example.com/a.png"])}, 400, "messages.0.images.0: the data: URL is not"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0: a user message has no content"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages.0.role: Input should be"),
        ({"messages": user("word " * 1001)}, 413, "the texts have more than 5,000 characters"),
        ({"messages": user("word " * 999)}, 400, "tokens"),
        ({"format": "yaml"}, 400, 'format: must be "json" or a JSON schema'),
        ({"format": {"type": 5}}, 400, "format: the JSON schema cannot be used"),
        ({"options": {"temperature": 3}}, 400, "options.temperature: Input should be less than or equal to 2"),
        ({"options": {"num_predict": "5"}}, 400, "options.num_predict: Input should be a valid integer"),
        ({"options": {"temprature": 1}}, 400, "options.temprature: is not known here; leave it out"),
        ({"temperature": 1}, 400, "temperature: is not honoured here; use options"),
        ({"think": True}, 400, "think: this model does not think before it answers; leave out what asks it to"),
        ({"think": "very"}, 400, "think: Input should be"),
        ({"prompt": "hi"}, 400, "prompt: is not honoured here; use messages, or POST /api/generate"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools.0.function.name: "),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else None,
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_is_a_text(server: Server, fields: dict[str, Any], status: int, message: str, stream: bool) -> None:
    found, answer = post(server, "/api/chat", {"messages": user(), "stream": stream, **fields})
    assert (found, set(answer)) == (status, {"error"})
    assert message in answer["error"]


@pytest.mark.parametrize("name", ["raw", "template", "suffix", "context"])
def test_what_generate_does_not_honour_is_refused(server: Server, name: str) -> None:
    value = {"raw": True, "template": "{{ .Prompt }}", "suffix": "}", "context": [1, 2]}[name]
    status, answer = post(server, "/api/generate", {"prompt": "hi", "stream": False, name: value})
    assert (status, answer["error"].partition(":")[0]) == (400, name)
    empty = type(value)()
    assert post(server, "/api/generate", {"prompt": "hi", "stream": False, name: empty})[0] == 200


def test_errors_before_a_request_is_read_are_ollama_s_too(panel: VLM) -> None:
    told = {"Authorization": f"Bearer {KEY}"}
    with serving(panel, api_keys=(KEY,), max_body_bytes=2000) as server:
        with ollama_client(server) as stranger, pytest.raises(ollama.ResponseError, match="an API key") as raised:
            stranger.list()
        assert raised.value.status_code == 401
        with ollama_client(server, **told) as client:
            assert client.chat("tiny", user(), options={"num_predict": 1}).done
            with pytest.raises(ollama.ResponseError, match="larger than 2,000 bytes"):
                client.generate("tiny", QUESTION, images=[LIGHT])
        for method, path, status in (("GET", "/api/nonesuch", 404), ("GET", "/api/chat", 405)):
            found, _, body = request(server, method, path, headers=told)
            assert (found, set(read_json(body))) == (status, {"error"})
            assert isinstance(read_json(body)["error"], str)
        assert post(server, "/api/chat", b"{", **told)[1]["error"].startswith("the request is not JSON")


def test_a_stream_whose_time_is_up_ends_with_an_error(panel: VLM) -> None:
    model = Braked(panel)
    model.stop_at = 4
    with serving(model, time_limit_s=3.0) as server, ollama_client(server) as client:
        try:
            with pytest.raises(ollama.ResponseError, match="the answer was not ready within 3 s"):
                list(client.generate("tiny", QUESTION, stream=True))
        finally:
            model.release()
        wait_until(lambda: not server.worker.running)


def test_all_ways_of_asking_wait_in_one_queue(panel: VLM) -> None:
    model = Braked(panel)
    with serving(model, max_queue=1) as server, ThreadPoolExecutor() as pool:
        try:
            first = pool.submit(ask, server)
            wait_until(lambda: model.holding)
            second = pool.submit(post, server, "/api/chat", {"messages": user(), "stream": False})
            wait_until(lambda: server.worker.waiting == 1)
            status, headers, body = request(server, "POST", "/api/generate", {"prompt": QUESTION})
            assert (status, headers["retry-after"]) == (503, "2")
            assert read_json(body) == {"error": "too many requests are waiting; try again in a few seconds"}
            status, answer = post(server, "/v1/responses", {"input": QUESTION})
            assert (status, answer["error"]["code"]) == (503, "queue_full")
        finally:
            model.release()
        assert first.result()[0] == second.result()[0] == 200


def test_all_ways_of_asking_make_one_prompt(server: Server) -> None:
    """What one has put into the KV cache the others continue from, but for the last token."""
    url, small = data_url(LIGHT), base64.b64encode(LIGHT.read_bytes()).decode()
    system = "Be brief, please."
    _, chat = ask(server, messages=[{"role": "system", "content": system}, *shown(url, text=COLOUR)])
    parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": COLOUR}]
    asked = {"instructions": system, "input": [{"role": "user", "content": parts}]}
    used = post(server, "/v1/responses", asked)[1]["usage"]
    assert used["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert used["input_tokens_details"]["cached_tokens"] == used["input_tokens"] - 1
    question = {"prompt": COLOUR, "images": [small], "system": system, "stream": False}
    generated = post(server, "/api/generate", question)[1]
    assert generated["prompt_eval_count"] == used["input_tokens"]


def test_pictures_and_schemas_count_against_the_same_bounds(server: Server) -> None:
    small = base64.b64encode(LIGHT.read_bytes()).decode()
    status, answer = post(server, "/api/chat", {"messages": user(images=[small] * 3)})
    assert (status, answer["error"]) == (413, "a request may have at most 2 pictures")
    long = {"type": "string", "description": "x" * 200_000}
    status, answer = post(server, "/api/generate", {"prompt": QUESTION, "format": long})
    assert (status, answer["error"].partition(" have")[0]) == (413, "the JSON schemas")
