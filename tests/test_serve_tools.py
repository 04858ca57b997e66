"""Functions that may be called, alone and beside a form of the answer: a call, or what has the form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import jsonschema_rs
import openai
import pydantic
import pytest

from edgevlm import VLM, GenerationConfig
from edgevlm.server.run import Server
from edgevlm.server.tools import read_call
from edgevlm.strict_json import read_json
from tests.helpers.serving import (
    KIND,
    LOOK,
    OBJECT,
    QUESTION,
    SCHEMA,
    choice_of,
    events,
    refused,
    request,
    serving,
    tool,
)

SET = tool("set", value={"type": "number"})


@pytest.fixture(scope="module")
def server(vlm: VLM) -> Iterator[Server]:
    with serving(vlm) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def streamed(server: Server, **fields: Any) -> tuple[str, list[dict[str, Any]], str]:
    """Ask for a stream, and return its text, the functions that it calls and how it ended."""
    asked = {"messages": [{"role": "user", "content": QUESTION}], "stream": True, **fields}
    status, _, answer = request(server, "POST", "/v1/chat/completions", asked)
    assert status == 200, answer
    choices = [choice for chunk in events(answer) for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    calls = [call["function"] for choice in choices for call in choice["delta"].get("tool_calls", ())]
    return text, calls, choices[-1]["finish_reason"]


@pytest.mark.parametrize("response_format", [OBJECT, SCHEMA, OBJECT | {"schema": KIND}], ids=["any", "schema", "both"])
def test_with_tools_and_a_form_the_answer_is_a_call_or_has_the_form(server: Server, response_format: Any) -> None:
    ends = set()
    for seed in range(12):
        fields = {"tools": [LOOK], "response_format": response_format, "temperature": 2.0, "seed": seed}
        choice = choice_of(server, **fields, max_tokens=200)
        ends.add(choice["finish_reason"])
        message = choice["message"]
        if choice["finish_reason"] == "tool_calls":
            assert message["content"] is None
            [call] = message["tool_calls"]
            jsonschema_rs.validate(LOOK["function"]["parameters"], json.loads(call["function"]["arguments"]))
        elif choice["finish_reason"] == "stop":
            jsonschema_rs.validate(
                {"type": "object"} if response_format is OBJECT else KIND, json.loads(message["content"])
            )
        text, calls, end = streamed(server, **fields, max_tokens=200)
        assert (text, end) == (message["content"] or "", choice["finish_reason"])
        assert calls == [call["function"] for call in message.get("tool_calls", ())]
    assert "tool_calls" in ends
    assert ends & ({"stop", "length"} if response_format is OBJECT else {"stop"})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_that_must_be_is_one_whatever_form_is_asked_for(server: Server, choice: object) -> None:
    fields = {"tools": [LOOK], "tool_choice": choice, "response_format": SCHEMA, "max_tokens": 200}
    assert choice_of(server, **fields)["finish_reason"] == "tool_calls"
    text, [call], end = streamed(server, **fields)
    assert (text, call["name"], end) == ("", "look", "tool_calls")


def test_a_form_without_a_call_is_the_form_alone(server: Server) -> None:
    alone = choice_of(server, response_format=SCHEMA, max_tokens=100)["message"]["content"]
    jsonschema_rs.validate(KIND, json.loads(alone))
    for nothing in ({"tools": [LOOK], "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}, {"tools": None}):
        assert choice_of(server, response_format=SCHEMA, max_tokens=100, **nothing)["message"]["content"] == alone
    llama_cpp = {"type": "json_object", "schema": KIND}
    assert choice_of(server, response_format=llama_cpp, max_tokens=100)["message"]["content"] == alone


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own, for a message sent back
def test_openai_s_client_parses_what_comes_and_may_send_it_back(client: openai.OpenAI) -> None:
    class Kind(pydantic.BaseModel):
        kind: Literal["circle", "square"]

    class Look(pydantic.BaseModel):
        side: Literal["left", "right"]

    asked: list[Any] = [{"role": "user", "content": QUESTION}]
    seen = set()
    for seed in range(12):
        message = client.chat.completions.parse(
            model="tiny", messages=asked, response_format=Kind, tools=[openai.pydantic_function_tool(Look)],
            temperature=2.0, seed=seed, max_tokens=200,
        ).choices[0].message  # fmt: skip
        if message.tool_calls:
            assert isinstance(message.tool_calls[0].function.parsed_arguments, Look)
            rest = [{"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Nothing there."}]
        else:
            assert isinstance(message.parsed, Kind)
            rest = [{"role": "user", "content": "Are you sure?"}]
        if bool(message.tool_calls) not in seen:
            again = client.chat.completions.create(model="tiny", messages=[*asked, message, *rest], max_tokens=1)
            assert again.usage.completion_tokens == 1
        seen.add(bool(message.tool_calls))
    assert seen == {True, False}


def test_the_arguments_of_a_call_are_what_the_model_wrote(server: Server) -> None:
    for seed in range(60):
        fields = {"tools": [SET], "tool_choice": "required", "temperature": 2.0, "seed": seed, "max_tokens": 120}
        choice = choice_of(server, **fields, logprobs=True)
        if choice["finish_reason"] == "length":  # a number may go on for long
            continue
        told = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"]).decode().lstrip()
        [call] = choice["message"]["tool_calls"]
        arguments = call["function"]["arguments"]
        assert told == f'<tool_call>{{"name": "set", "arguments": {arguments}}}</tool_call>'
        assert isinstance(json.loads(arguments)["value"], int | float)
        if arguments != json.dumps(json.loads(arguments)):  # such as 1.50 or 2E3, which Python would write otherwise
            break
    else:
        pytest.fail("no number that Python would write otherwise")


def test_a_number_beyond_all_bounds_stays_as_it_was_written(vlm: VLM) -> None:
    answer = vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=1))
    text = '<tool_call>{"name": "set", "arguments": {"value": 1e999, "text": "}</tool_call>"}}</tool_call>'
    call: Any = read_call(replace(answer, text=text, satisfied=True))
    assert call["function"] == {"name": "set", "arguments": '{"value": 1e999, "text": "}</tool_call>"}'}
    assert read_call(replace(answer, text='<tool_call>{"name": "set", "arguments": {}}', satisfied=False)) is None
    cut = '<tool_call>{"name": "set", "arguments": {"text": "}</tool_call>'  # a stop text came here
    assert read_call(replace(answer, text=cut, satisfied=False)) is None


@pytest.mark.parametrize("huge", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize("place", ["response_format.json_schema.schema", "tools.0.function.parameters"])
def test_a_schema_with_a_number_that_is_not_finite_is_refused(server: Server, huge: str, place: str) -> None:
    schema = {"type": "object", "properties": {"value": {"maximum": "HUGE"}}}
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}]}
    if place.startswith("tools"):
        fields["tools"] = [{"type": "function", "function": {"name": "set", "parameters": schema}}]
    else:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = json.dumps(fields).replace('"HUGE"', huge).encode()
    status, _, answer = request(server, "POST", "/v1/chat/completions", body)
    assert status == 400
    assert read_json(answer)["error"]["message"] == f"{place}: holds a number that is not finite"


def test_a_schema_that_cannot_be_is_named(server: Server) -> None:
    bad = {"type": "object", "properties": {"a": {"type": 5}}}
    code, param, message = refused(
        server, tools=[LOOK, {"type": "function", "function": {"name": "b", "parameters": bad}}]
    )
    assert (code, param) == ("invalid_value", "tools")
    assert message.startswith("the parameters of b: the JSON schema cannot be used: ")
    wanted = {"type": "json_schema", "json_schema": {"schema": bad}}
    code, param, message = refused(server, response_format=wanted, tools=[LOOK])
    assert (code, param) == ("invalid_value", "response_format")
    assert message.startswith("response_format: the JSON schema cannot be used: ")
