"""OpenAI's Responses API: its own client against a real server on the bundled model, and chat completions beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_type_hints

import openai
import pydantic
import pytest
from openai.types.responses import response_create_params
from PIL import Image

from edgevlm import VLM, GenerationConfig
from edgevlm.server.run import Server
from edgevlm.strict_json import read_json
from tests.helpers.serving import (
    KIND,
    LOOK,
    PATIENCE_S,
    QUESTION,
    Braked,
    choice_of,
    data_url,
    request,
    serving,
    shown,
    wait_until,
)

LIGHT = Path(__file__).parents[1] / "examples" / "light.png"
COLOUR = "What colour is the tower light showing?"
CALL = {"type": "function", **LOOK["function"]}
FORM = {"type": "json_schema", "name": "kind", "schema": KIND}


@pytest.fixture(scope="module")
def server(panel: VLM) -> Iterator[Server]:
    with serving(panel, model_name="panel", max_prompt_chars=5000, max_images=2) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def image(picture: Path | Image.Image, **fields: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": data_url(picture), **fields}


def looked_at(*parts: dict[str, Any], text: str = COLOUR) -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "input_text", "text": text}]}]


def respond(server: Server, **fields: Any) -> tuple[int, Any]:
    """Send a request without the client, and return status and JSON."""
    status, _, answer = request(server, "POST", "/v1/responses", {"input": QUESTION, "max_output_tokens": 4} | fields)
    return status, read_json(answer)


def refused(server: Server, **fields: Any) -> tuple[str, str, str]:
    """Send what is refused, and return code, field and message."""
    status, answer = respond(server, **fields)
    assert (status, set(answer)) == (400, {"error"}), answer
    return answer["error"]["code"], answer["error"]["param"], answer["error"]["message"]


# Answers


def test_the_answer_is_that_of_chat_completions(server: Server, client: openai.OpenAI) -> None:
    found = client.responses.create(model="panel", input=looked_at(image(LIGHT, detail="auto")))
    assert found.output_text == choice_of(server, messages=shown(data_url(LIGHT), text=COLOUR))["message"]["content"]
    assert found.output_text == "green"
    assert (found.status, found.incomplete_details, found.error) == ("completed", None, None)
    assert found.id.startswith("resp_")
    [message] = found.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert found.model == "panel"
    assert found.completed_at >= found.created_at


def test_a_text_alone_and_instructions(vlm: VLM) -> None:
    """On the tests' own model in float32: only there a seed gives one answer, however much is cached."""
    config = GenerationConfig(max_new_tokens=6, temperature=1.5, top_p=0.9, seed=11)
    wanted = vlm.generate(None, QUESTION, config).text
    fields: dict[str, Any] = {"model": "tiny", "max_output_tokens": 6, "temperature": 1.5, "top_p": 0.9}
    with serving(vlm) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        plain = client.responses.create(input=QUESTION, **fields, extra_body={"seed": 11})
        assert plain.output_text == wanted
        told = client.responses.create(input=QUESTION, instructions="Be brief.", **fields)
        assert told.usage.input_tokens > plain.usage.input_tokens
        assert (told.instructions, told.temperature, told.top_p) == ("Be brief.", 1.5, 0.9)
        system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
        assert client.responses.create(input=system, **fields).usage.input_tokens == told.usage.input_tokens


def test_usage_tells_cached_tokens_and_those_of_pictures(client: openai.OpenAI, panel: VLM) -> None:
    picture = Image.effect_noise((90, 70), 80).convert("RGB")
    wanted = panel.generate(picture, COLOUR, GenerationConfig(max_new_tokens=1))
    first, again = (
        client.responses.create(model="panel", input=looked_at(image(picture)), max_output_tokens=1).usage
        for _ in range(2)
    )
    assert (first.input_tokens, first.output_tokens) == (wanted.prompt_tokens, 1)
    assert first.total_tokens == wanted.prompt_tokens + 1
    assert first.input_tokens_details.image_tokens == wanted.image_tokens
    assert first.output_tokens_details.reasoning_tokens == 0
    assert first.input_tokens_details.cached_tokens < wanted.image_tokens
    assert again.input_tokens_details.cached_tokens > wanted.image_tokens


def test_an_answer_cut_short_is_incomplete(client: openai.OpenAI) -> None:
    found = client.responses.create(model="panel", input=QUESTION, max_output_tokens=1)
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    assert (found.output[0].status, found.max_output_tokens) == ("incomplete", 1)


def test_a_model_of_pydantic_is_parsed(client: openai.OpenAI) -> None:
    class Light(pydantic.BaseModel):
        colour: Literal["red", "green"]

    found = client.responses.parse(model="panel", input=looked_at(image(LIGHT)), text_format=Light)
    assert isinstance(found.output_parsed, Light)
    assert (found.text.format.type, found.text.format.name) == ("json_schema", "Light")
    any_json = client.responses.create(
        model="panel", input=QUESTION, text={"format": {"type": "json_object"}}, max_output_tokens=40
    )
    assert any_json.output_text.startswith("{")


def test_log_probabilities(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "panel", "input": QUESTION, "max_output_tokens": 3}
    found = client.responses.create(**fields, include=["message.output_text.logprobs"], top_logprobs=2)
    tokens = found.output[0].content[0].logprobs
    assert [len(token.top_logprobs) for token in tokens] == [2] * len(tokens)
    assert 0 < len(tokens) <= 3
    assert all(token.logprob < 0 for token in tokens)
    assert client.responses.create(**fields).output[0].content[0].logprobs == []


# The conversation goes on


def test_an_answer_may_be_sent_back(client: openai.OpenAI) -> None:
    asked = looked_at(image(LIGHT))
    first = client.responses.create(model="panel", input=asked)
    rest = [{"role": "user", "content": "Is the red lamp lit?"}]
    again = client.responses.create(model="panel", input=[*asked, *first.output, *rest])
    assert again.usage.input_tokens_details.cached_tokens > first.usage.input_tokens // 2
    written = [{**item.to_dict(), "id": None} for item in first.output]
    assert client.responses.create(model="panel", input=[*asked, *written, *rest]).output_text == again.output_text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
def test_a_function_is_called_and_its_result_sent_back(client: openai.OpenAI, choice: Any) -> None:
    asked: list[Any] = [{"role": "user", "content": QUESTION}]
    fields: dict[str, Any] = {"model": "panel", "tools": [CALL], "max_output_tokens": 200}
    found = client.responses.create(input=asked, tool_choice=choice, **fields)
    [call] = found.output
    assert (call.type, call.name, call.status) == ("function_call", "look", "completed")
    assert json.loads(call.arguments)["side"] in ("left", "right")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Red."}
    after = client.responses.create(input=[*asked, call, result], tool_choice="none", **fields)
    assert after.output[0].type == "message"
    assert found.tools[0].name == "look"


# Streams


def kinds(events: list[Any]) -> list[str]:
    """Return the types of a stream's events, each run of deltas as one."""
    found: list[str] = []
    for event in events:
        if found[-1:] != [event.type] or not event.type.endswith(".delta"):
            found.append(event.type)
    return found


def test_a_stream_s_events_are_openai_s_in_their_order(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "panel", "input": QUESTION, "max_output_tokens": 12}
    whole = client.responses.create(**fields)
    events = list(client.responses.create(**fields, stream=True))
    assert kinds(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == whole.output_text
    last = events[-1].response
    assert (last.output_text, last.status, last.usage.output_tokens) == (
        whole.output_text, whole.status, whole.usage.output_tokens,
    )  # fmt: skip
    assert {event.response.id for event in events if hasattr(event, "response")} == {last.id}


def test_the_client_s_own_accumulator_reads_a_stream(client: openai.OpenAI) -> None:
    class Light(pydantic.BaseModel):
        colour: Literal["red", "green"]

    with client.responses.stream(model="panel", input=looked_at(image(LIGHT)), text_format=Light) as stream:
        found = stream.get_final_response()
    assert isinstance(found.output_parsed, Light)


def test_a_call_in_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="panel", input=QUESTION, tools=[CALL], tool_choice="required", max_output_tokens=200
    ) as stream:
        events = list(stream)
        found = stream.get_final_response()
    assert kinds(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    [call] = found.output
    assert call.name == "look"
    assert json.loads(call.arguments)["side"] in ("left", "right")


def test_a_stream_whose_time_is_up_fails(panel: VLM) -> None:
    model = Braked(panel)
    model.stop_at = 4
    with serving(model, time_limit_s=3.0) as server:
        try:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_S) as client:
                last = list(client.responses.create(model="tiny", input=QUESTION, stream=True))[-1]
        finally:
            model.release()
        assert last.type == "response.failed"
        assert (last.response.status, last.response.error.code) == ("failed", "time_limit")
        wait_until(lambda: not server.worker.running)


# What is refused, and how it is told

OPENAI: dict[str, tuple[list[Any], list[Any]]] = {
    "model": (["panel"], []),
    "input": (["hi", [{"role": "user", "content": "hi"}], [{"type": "message", "role": "user", "content": "hi"}],
               [{"type": None, "role": "user", "content": "hi"}]],
              [[], [{"type": "item_reference", "id": "msg_1"}], [{"role": "user", "content": 5}]]),
    "access_programs": ([None], [{"cyber": "standard"}]),
    "background": ([False, None], [True]),
    "background_options": ([None], [{"completion_window": "2h"}]),
    "context_management": ([None, []], [[{"type": "compaction"}]]),
    "conversation": ([None], ["conv_1"]),
    "image": ([None], [{"context_compression": "enabled"}]),
    "include": ([[], ["message.output_text.logprobs"], ["reasoning.encrypted_content"]],
                [["file_search_call.results"]]),
    "instructions": (["Be brief.", None], []),
    "max_output_tokens": ([3, None], [0]),
    "max_tool_calls": ([3], []),
    "metadata": ([{"run": "7"}], []),
    "moderation": ([None], [{"model": "omni-moderation-latest"}]),
    "parallel_tool_calls": ([True, False], []),
    "previous_response_id": ([None], ["resp_1"]),
    "prompt": ([None], [{"id": "pmpt_1"}]),
    "prompt_cache_key": (["a"], []),
    "prompt_cache_options": ([{"mode": "explicit"}], []),
    "prompt_cache_retention": (["24h"], []),
    "reasoning": ([None, {}, {"effort": "none"}], [{"effort": "high"}]),
    "safety_identifier": (["a"], []),
    "service_tier": (["auto", "flex"], []),
    "store": ([False, None], [True]),
    "stream": ([False, None], []),
    "stream_options": ([{"include_obfuscation": False}, None], [{"include_usage": True}]),
    "temperature": ([0, 1.5, None], [3]),
    "text": ([{"format": {"type": "text"}}, {"format": FORM}, {"verbosity": "medium"}],
             [{"format": {"type": "grammar"}}, {"verbosity": "low"}, {"format": {"type": "json_schema", "name": "a"}}]),
    "tool_choice": (["none", "auto"], ["required", {"type": "web_search"}]),
    "tools": ([[CALL], []], [[{"type": "web_search"}], [{"type": "mcp", "server_label": "a"}]]),
    "top_logprobs": ([0, 2, None], [21]),
    "top_p": ([0.5, None], [0]),
    "truncation": (["disabled", None], ["auto"]),
    "user": (["me"], []),
}  # fmt: skip
"""All that OpenAI's client can send: values that are honoured or ask for nothing, and some that are refused."""


def test_the_list_of_openai_s_fields_is_whole() -> None:
    two = (
        response_create_params.ResponseCreateParamsNonStreaming,
        response_create_params.ResponseCreateParamsStreaming,
    )
    assert {name for kind in two for name in get_type_hints(kind)} == OPENAI.keys()


@pytest.mark.parametrize("name", OPENAI)
def test_every_field_of_openai_s_client_is_taken_or_refused_by_name(client: openai.OpenAI, name: str) -> None:
    asked: dict[str, Any] = {"model": "panel", "input": QUESTION, "max_output_tokens": 2}
    taken, refused_ones = OPENAI[name]
    for value in taken:
        assert client.responses.create(**(asked | {name: value})).output
    for value in refused_ones:
        with pytest.raises(openai.BadRequestError) as raised:
            client.responses.create(**(asked | {name: value}))
        assert name in str(raised.value)
        assert raised.value.param.partition(".")[0] == name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "input with the whole conversation: this server keeps no answer"),
        ({"store": True}, "use false: this server keeps no answer"),
        ({"background": True}, "this server keeps none"),
        ({"messages": []}, "use input"),
        ({"max_tokens": 3}, "use max_output_tokens"),
        ({"response_format": {}}, 'use text {"format": '),
        ({"reponse": 5}, "is not known here; leave it out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_honoured_is_told_with_what_to_use(server: Server, fields: dict[str, Any], message: str) -> None:
    code, param, told = refused(server, **fields)
    assert (code, param) == ("unsupported_parameter", next(iter(fields)))
    assert message in told


FAR = {"type": "input_image", "image_url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": looked_at(FAR)}, "remote_image_refused", "input.0.content.0.image_url"),
        ({"input": looked_at(FAR), "instructions": "Look."}, "remote_image_refused", "input.0.content.0.image_url"),
        ({"input": looked_at({"type": "input_image", "file_id": "file-1"})}, "invalid_request",
         "input.0.content.0.image_url"),
        ({"input": looked_at({"type": "input_file", "file_id": "f"})}, "invalid_request", "input.0.content.0.type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "invalid_request", "input"),
        ({"input": [{"type": "image_generation_call"}]}, "invalid_request", "input.0.type"),
        ({"input": [{"role": "user", "content": []}]}, "empty_message", "input.0"),
        ({"text": {"format": {**FORM, "schema": {"type": 5}}}}, "invalid_value", "text.format"),
        ({"tools": [{"type": "web_search"}]}, "invalid_request", "tools.0.type"),
        ({"tool_choice": "required"}, "no_tools", "tool_choice"),
        ({"input": "word " * 999}, "context_length_exceeded", "input"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_told_by_its_place_in_the_request(
    server: Server, fields: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    assert refused(server, stream=stream, **fields)[:2] == (code, param)


def test_bounds_hold_here_too(server: Server) -> None:
    status, answer = respond(server, input="word " * 1001)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (413, "prompt_too_long", "input")
    pictures = looked_at(*[image(Image.new("RGB", (8, 8)))] * 3)
    status, answer = respond(server, input=pictures)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (413, "too_many_images", "input")
    long = {**FORM, "schema": {"type": "string", "description": "x" * 200_000}}
    status, answer = respond(server, text={"format": long})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (413, "schema_too_long", "text.format")
    status, answer = respond(server, model="gpt-9")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
