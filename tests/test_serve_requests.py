"""What a request may say: nothing in it is dropped without a word, and what is refused is named with what to use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

import openai
import pytest
from openai.types.chat import completion_create_params
from PIL import Image

from edgevlm import VLM
from edgevlm.server.run import Server
from edgevlm.strict_json import read_json
from tests.helpers.serving import (
    KIND,
    LOOK,
    OBJECT,
    QUESTION,
    SCHEMA,
    ask,
    choice_of,
    data_url,
    refused,
    request,
    serving,
    shown,
)

RED = data_url(Image.new("RGB", (64, 48), (200, 30, 30)))


@pytest.fixture(scope="module")
def server(vlm: VLM) -> Iterator[Server]:
    with serving(vlm) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# Where something is wrong, and what is taken


def user(*parts: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": QUESTION}, *parts]}]


def image(**fields: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": RED, **fields}}


PART = "messages.0.content.1"
CHOICES = 'must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}'
PARTS = "must be a text or a list of parts"
KINDS = "is not known; use 'text', 'image_url' or 'video_url'"
FORMATS = "is not known; use 'text', 'json_object' or 'json_schema'"
NO_SCHEMA = "is missing; the JSON schema itself goes there"


def form(value: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": value}}


WORDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": user({"type": "input_image", "image_url": RED})}, f"{PART}.type: 'input_image' {KINDS}"),
    ({"messages": user({"type": "x" * 99})}, f"{PART}.type: '{'x' * 40}' {KINDS}"),
    ({"messages": user({"text": "hi"})}, f"{PART}.type: is missing"),
    ({"messages": user({"type": "text"})}, f"{PART}.text: is missing"),
    ({"messages": user({"type": "text", "text": 5})}, f"{PART}.text: Input should be a valid string"),
    ({"messages": user("hi")}, f"{PART}: must be a JSON object"),
    ({"messages": user({"type": "image_url"})}, f"{PART}.image_url: is missing"),
    ({"messages": user({"type": "image_url", "image_url": None})},
     f'{PART}.image_url: must be {{"url": "..."}} or a text'),
    ({"messages": user({"type": "image_url", "image_url": {"detail": "low"}})}, f"{PART}.image_url.url: is missing"),
    ({"messages": user(image(detail="original"))}, f"{PART}.image_url.detail: Input should be 'auto', 'low' or 'high'"),
    ({"messages": [{"role": "user", "content": 5}]}, f"messages.0.content: {PARTS}"),
    ({"messages": [{"role": "user", "content": {"type": "text"}}]}, f"messages.0.content: {PARTS}"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role: is missing"),
    ({"messages": ["hi"]}, "messages.0: must be a JSON object"),
    ({"messages": "hi"}, "messages: Input should be a valid list"),
    ({"tools": [LOOK], "tool_choice": {"type": "auto"}}, f"tool_choice: {CHOICES}"),
    ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "look"}}, f"tool_choice: {CHOICES}"),
    ({"tools": [LOOK], "tool_choice": 5}, f"tool_choice: {CHOICES}"),
    ({"tools": [LOOK], "tool_choice": "any"}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
    ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "look"}}, "tool_choice.function: is missing"),
    ({"tools": [{"type": "custom"}]}, "tools.0.type: Input should be 'function'"),
    ({"tools": [{"type": "function", "name": "look"}]}, "tools.0.function: is missing"),
    ({"response_format": {"type": "json"}}, f"response_format.type: 'json' {FORMATS}"),
    ({"response_format": "json"}, "response_format: must be a JSON object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: is missing"),
    (form(KIND), f"response_format.json_schema.schema: {NO_SCHEMA}"),
    (form({"name": "x"}), f"response_format.json_schema.schema: {NO_SCHEMA}"),
    (form({"schema": None}), "response_format.json_schema.schema: must be a JSON object"),
    ({"stop": 5}, "stop: Input should be a valid list"),
    ({"stop": [5]}, "stop.0: Input should be a valid string"),
    ({"stream_options": True}, "stream_options: must be a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WORDS, ids=[message[:60] for _, message in WORDS])
def test_what_is_wrong_is_told_with_its_place_and_what_is_taken(
    server: Server, fields: dict[str, Any], message: str
) -> None:
    code, param, told = refused(server, **fields)
    assert (code, param, told) == ("invalid_request", message.partition(":")[0], message)


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("https://shop.example/a.png", "remote_image_refused", "this server fetches no URL; send the picture itself"),
        ("photo.jpg", "file_refused", "must be a data: URL; this server reads no files"),
        ("data:image/png;base64,!", "invalid_image", "the data: URL is not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "invalid_image", "the image is not an image in a format that edgevlm reads"),
    ],
)
def test_a_picture_that_cannot_be_taken_is_told_by_its_place(server: Server, url: str, code: str, message: str) -> None:
    for picture in (url, {"url": url}):
        part = {"type": "image_url", "image_url": picture}
        found, param, told = refused(server, messages=[*shown(RED), *user(image(), part)])
        assert (found, param) == (code, "messages.1.content.2.image_url")
        assert told.startswith(f"{param}: {message}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "the request: must be a JSON object"),
        (b"null", "the request: must be a JSON object"),
        (b'{"messages": [', "the request is not JSON: Expecting value"),
    ],
)
def test_a_body_that_is_no_request(server: Server, body: bytes, message: str) -> None:
    status, _, answer = request(server, "POST", "/v1/chat/completions", body)
    assert (status, read_json(answer)["error"]["message"]) == (400, message)


# Fields that are honoured, taken, or refused by name

AUDIO = {"format": "wav", "voice": "alloy"}
OPENAI: dict[str, tuple[list[Any], list[Any]]] = {
    "messages": ([[{"role": "user", "content": "hi"}]], [[]]),
    "model": (["tiny"], []),
    "audio": ([None], [AUDIO]),
    "frequency_penalty": ([0, 0.0, None], [0.5]),
    "presence_penalty": ([0, None], [-2]),
    "logit_bias": ([{}, None], [{"50256": -100}]),
    "function_call": (["none", "auto"], [{"name": "look"}]),
    "functions": ([[]], [[{"name": "look", "parameters": {}}]]),
    "logprobs": ([True, False, None], ["yes"]),
    "top_logprobs": ([0, None], [2]),
    "max_completion_tokens": ([3, None], [0]),
    "max_tokens": ([3, None], [0]),
    "metadata": ([{"run": "7"}], []),
    "modalities": ([["text"], None], [["text", "audio"]]),
    "moderation": ([None], [{"model": "omni-moderation-latest"}]),
    "n": ([1, None], [2]),
    "parallel_tool_calls": ([True, False], ["no"]),
    "prediction": ([{"type": "content", "content": "A gauge."}, None], []),
    "prompt_cache_key": (["a"], []),
    "prompt_cache_options": ([{"mode": "explicit"}], []),
    "prompt_cache_retention": (["24h"], []),
    "reasoning_effort": (["none", None], ["high"]),
    "response_format": ([{"type": "text"}, OBJECT, SCHEMA], [{"type": "poem"}]),
    "safety_identifier": (["a"], []),
    "seed": ([-5, 2**62, None], ["7"]),
    "service_tier": (["auto", "flex"], []),
    "stop": (["end", ["end", "fin"], None], [[""]]),
    "store": ([True, False, None], []),
    "stream": ([False, None], ["no"]),
    "stream_options": ([{"include_usage": True, "include_obfuscation": False}, None], [{"chunks": 5}]),
    "temperature": ([0, 1.5, None], [3]),
    "tool_choice": (["none", "auto"], ["required"]),
    "tools": ([[LOOK], []], [[{"type": "custom", "custom": {"name": "look"}}]]),
    "top_p": ([0.5, None], [0]),
    "user": (["me"], []),
    "verbosity": (["medium", None], ["low"]),
    "web_search_options": ([None], [{"search_context_size": "low"}]),
}
"""All that OpenAI's client can send: values that are honoured or ask for nothing, and some that are refused."""


def test_the_list_of_openai_s_fields_is_whole() -> None:
    kinds = (
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    )
    assert {name for kind in kinds for name in get_type_hints(kind)} == OPENAI.keys()


@pytest.mark.parametrize("name", OPENAI)
def test_every_field_of_openai_s_client_is_taken_or_refused_by_name(client: openai.OpenAI, name: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}
    taken, refused_ones = OPENAI[name]
    for value in taken:
        assert client.chat.completions.create(**(asked | {name: value})).choices
    for value in refused_ones:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**(asked | {name: value}))
        assert name in str(raised.value)


OTHERS: dict[str, tuple[Any, str]] = {
    "guided_json": (KIND, "json_schema"),
    "guided_regex": ("[0-9]+", "pattern"),
    "guided_choice": (["yes", "no"], "enum"),
    "guided_grammar": ("root ::= 'a'", "json_schema"),
    "structured_outputs": ({"json": KIND}, "json_schema"),
    "format": (KIND, "json_schema"),
    "grammar": ("root ::= 'a'", "json_schema"),
    "json_schema": (KIND, "json_schema"),
    "images": (["iVBORw0KGgo="], "image_url"),
    "options": ({"temperature": 1}, "at the top level"),
    "num_predict": (5, "max_tokens"),
    "prompt": ("Why?", "messages"),
    "system": ("Be brief.", 'role "system"'),
    "min_p": (0.1, "but as 0; leave it out"),
    "repetition_penalty": (1.1, "but as 1; leave it out"),
    "ignore_eos": (True, "but as false; leave it out"),
    "continue_final_message": (True, "but as false; leave it out"),
    "add_generation_prompt": (False, "but as true; leave it out"),
    "enable_thinking": (True, "use think"),
    "reasoning": ({"effort": "high"}, "use reasoning_effort"),
    "reponse_format": (SCHEMA, "is not known here; leave it out"),
}
"""Other servers' fields, and a slip: a value that would change the answer, and what a caller is told of it."""


@pytest.mark.parametrize("name", OTHERS)
def test_a_field_of_another_server_is_refused_with_what_to_use_instead(server: Server, name: str) -> None:
    value, instead = OTHERS[name]
    code, param, message = refused(server, **{name: value})
    assert (code, param) == ("unsupported_parameter", name)
    assert message.startswith(f"{name}: is not ")
    assert instead in message
    assert choice_of(server, max_tokens=1, **{name: None})


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": QUESTION, "images": ["iVBORw0KGgo="]}]},
        {"messages": [{"role": "assistant", "content": "A", "function_call": {"name": "look", "arguments": "{}"}}]},
        {"messages": [{"role": "assistant", "content": None, "refusal": "I will not."}]},
        {"messages": [{"role": "assistant", "content": "It is", "prefix": True}]},
        {"messages": user({"type": "text", "text": "hi", "style": "bold"})},
        {"messages": user(image(max_pixels=50176))},
        {"messages": user({**image(), "min_pixels": 3136})},
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": ""}, "custom": {}}]}
            ]
        },
        {"response_format": {"type": "text", "strict": True}},
        {"response_format": {"type": "json_object", "grammar": "a"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": KIND, "regex": "a"}}},
        {"tools": [{**LOOK, "strict": True}]},
        {"tools": [{"type": "function", "function": {"name": "look", "schema": {}}}]},
        {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "look", "mode": "any"}}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
    ],
    ids=lambda fields: re.sub(r"[^a-z_]+", " ", str(fields))[-50:],
)
def test_an_unknown_field_is_refused_at_every_level(server: Server, fields: dict[str, Any]) -> None:
    code, param, message = refused(server, **fields)
    assert code == "unsupported_parameter"
    assert message.startswith(f"{param}: is not ")
    at: Any = fields
    for step in param.split("."):  # the place is one that the request has
        at = at[int(step)] if isinstance(at, list) else at[step]


def test_what_real_clients_send_beside_the_question_is_taken(server: Server) -> None:
    nulls = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content", "nonesuch")
    turns = [
        {"role": "user", "name": "me", "content": [{"type": "text", "text": "hi", "cache_control": {"ttl": "5m"}}]},
        {"role": "assistant", "content": "A gauge.", **dict.fromkeys(nulls), "provider_specific_fields": {"a": 1}},
        {"role": "assistant", "content": "", "tool_calls": [
            {"index": 0, "type": "function", "function": {"name": "look", "arguments": '{"side": "left"}'}}]},
        {"role": "tool", "name": "look", "tool_call_id": "call_1", "content": "Red."},
        {"role": "user", "content": [{**image(detail=None, format="image/png"), "uuid": "7"}]},
    ]  # fmt: skip
    penalties = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}}
    beside = {"user": "me", "metadata": {"a": "b"}, "top_k": -1, "n": 1, "keep_alive": "5m", "cache_prompt": True}
    named = {"type": "function", "function": {"name": "look", "arguments": ""}}
    choice = choice_of(server, messages=turns, tools=[LOOK], tool_choice=named, max_tokens=100, **penalties, **beside)
    assert choice["finish_reason"] == "tool_calls"


def test_a_null_detail_is_auto_and_both_bounds_hold(server: Server) -> None:
    answers = [
        choice_of(server, messages=shown(RED, **detail)) for detail in ({}, {"detail": None}, {"detail": "auto"})
    ]
    assert len({json.dumps(each) for each in answers}) == 1
    for bounds in ({"max_tokens": 3, "max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 3}):
        assert ask(server, **bounds)[1]["usage"]["completion_tokens"] == 3
