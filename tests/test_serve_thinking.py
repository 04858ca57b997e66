"""A model that thinks, behind a real server: OpenAI's and Ollama's clients tell its thought from its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import openai
import pytest
from PIL import Image

from edgevlm import VLM
from edgevlm.server.run import Server
from edgevlm.strict_json import read_json
from tests.conftest import noise
from tests.helpers.serving import KIND, LOOK, QUESTION, SCHEMA, ask, choice_of, data_url, request, serving, shown

ASKED: list[Any] = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def server(thinker: VLM) -> Iterator[Server]:
    with serving(thinker) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def ollamas(server: Server) -> Iterator[ollama.Client]:
    client = ollama.Client(host=server.url)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def said(thinker: VLM) -> tuple[str, str]:
    """The thought and the answer."""
    answer = thinker.generate(None, QUESTION)
    assert answer.reasoning_content
    return answer.reasoning_content, answer.text


# Scores


def test_answers_are_scored_without_a_thought(server: Server, thinker: VLM) -> None:
    picture = noise(40, 60)
    body = {"messages": shown(data_url(Image.fromarray(picture))), "choices": ["yes", "no"]}
    status, _, data = request(server, "POST", "/v1/score", body)
    assert status == 200, data
    expected = thinker.score(picture, QUESTION, ["yes", "no"]).log_likelihoods
    assert read_json(data)["log_likelihoods"] == pytest.approx(dict(expected), abs=2e-3)
    assert request(server, "POST", "/v1/score", {**body, "think": True})[0] == 400


# Chat completions


def test_a_message_has_its_thought(client: openai.OpenAI, said: tuple[str, str], thinker: VLM) -> None:
    found = client.chat.completions.create(model="tiny", messages=ASKED)
    message = found.choices[0].message
    assert (message.reasoning_content, message.content) == said
    assert found.choices[0].finish_reason == "stop"
    tokens = thinker.generate(None, QUESTION).reasoning_tokens
    assert found.usage.completion_tokens_details.reasoning_tokens == tokens > 0


def test_a_stream_tells_the_thought_and_then_the_answer(client: openai.OpenAI, said: tuple[str, str]) -> None:
    chunks = client.chat.completions.create(model="tiny", messages=ASKED, stream=True)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    thought = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    text = [delta.content or "" for delta in deltas]
    assert ("".join(thought), "".join(text)) == said
    assert max(n for n, each in enumerate(thought) if each) < min(n for n, each in enumerate(text) if each)
    assert sum(map(bool, thought)) > 3


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"think": False}, False),
        ({"think": False, "reasoning_effort": "high"}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, True),
    ],
)
def test_a_request_may_have_the_model_think_or_not(
    server: Server, said: tuple[str, str], fields: dict[str, Any], thinks: bool
) -> None:
    message = choice_of(server, max_tokens=None, **fields)["message"]
    assert message["content"] == said[1]
    assert message.get("reasoning_content") == (said[0] if thinks else None)


def test_a_budget_and_a_bound(server: Server, said: tuple[str, str]) -> None:
    _, bounded = ask(server, max_tokens=None, thinking_budget=2)
    message = bounded["choices"][0]["message"]
    assert message["content"] == said[1]
    assert said[0].startswith(message["reasoning_content"])
    assert bounded["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    cut = choice_of(server, max_tokens=3)
    assert (cut["message"]["content"], cut["finish_reason"]) == ("", "length")
    assert said[0].startswith(cut["message"]["reasoning_content"])


def test_json_and_calls_come_after_the_thought(server: Server, said: tuple[str, str]) -> None:
    for fields in ({"response_format": SCHEMA}, {"tools": [LOOK], "tool_choice": "required"}):
        choice = choice_of(server, max_tokens=200, **fields)
        assert choice["message"]["reasoning_content"] == said[0]
        if "tools" in fields:
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] is None
        else:
            assert json.loads(choice["message"]["content"])["kind"] in KIND["properties"]["kind"]["enum"]
    body = {"messages": ASKED, "tools": [LOOK], "tool_choice": "required", "stream": True, "max_tokens": 200}
    chunks = request(server, "POST", "/v1/chat/completions", body)[2].decode().split("\n\n")[:-2]
    deltas = [choice["delta"] for chunk in chunks for choice in read_json(chunk.removeprefix("data: "))["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == said[0]
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    assert [len(delta["tool_calls"]) for delta in deltas if "tool_calls" in delta] == [1]


def test_log_probabilities_are_those_of_the_content(server: Server) -> None:
    choice = choice_of(server, max_tokens=None, logprobs=True)
    told = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
    assert told.decode().strip() == choice["message"]["content"]


def test_an_earlier_answer_may_be_sent_back_with_its_thought(client: openai.OpenAI, said: tuple[str, str]) -> None:
    first = client.chat.completions.create(model="tiny", messages=ASKED).choices[0].message
    conversation = [*ASKED, first.to_dict(), {"role": "user", "content": "And now?"}]
    counts = [
        client.chat.completions.create(
            model="tiny", messages=conversation, extra_body={"chat_template_kwargs": {"preserve_thinking": keep}}
        ).usage.prompt_tokens
        for keep in (False, True)
    ]
    assert counts[1] > counts[0] + len(said[0].split())


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_does_not_think_is_not_asked_to(vlm: VLM, stream: bool) -> None:
    with serving(vlm) as plain:
        assert read_json(request(plain, "GET", "/v1/models")[2])["data"][0]["capabilities"]["thinking"] is False
        message = choice_of(plain, reasoning_effort="none", max_tokens=1)["message"]
        assert "reasoning_content" not in message
        for path, fields, param in (
            ("/v1/chat/completions", {"messages": ASKED, "reasoning_effort": "high"}, "reasoning_effort"),
            ("/v1/chat/completions", {"messages": ASKED, "think": True}, "think"),
            ("/v1/responses", {"input": QUESTION, "reasoning": {"effort": "low"}}, "reasoning.effort"),
            ("/api/chat", {"messages": ASKED, "think": True}, None),
        ):
            status, _, body = request(plain, "POST", path, {**fields, "stream": stream})
            error = read_json(body)["error"]
            if param:
                assert (error["param"], error["code"]) == (param, "unsupported_parameter")
            told = error["message"] if param else error
            why = "this model does not think before it answers; leave out what asks it to"
            assert (status, told) == (400, f"{param or 'think'}: {why}")


# Responses


def test_a_response_has_the_thought_as_an_item(client: openai.OpenAI, said: tuple[str, str]) -> None:
    found = client.responses.create(model="tiny", input=QUESTION)
    thought, message = found.output
    assert (thought.type, thought.summary, message.type) == ("reasoning", [], "message")
    assert [(part.type, part.text) for part in thought.content] == [("reasoning_text", said[0])]
    assert found.output_text == said[1]
    assert found.usage.output_tokens_details.reasoning_tokens > 0
    without = client.responses.create(model="tiny", input=QUESTION, reasoning={"effort": "none", "summary": "auto"})
    assert [item.type for item in without.output] == ["message"]
    assert (without.output_text, without.reasoning.effort) == (said[1], "none")
    turns = [{"role": "user", "content": QUESTION}, *found.output, {"role": "user", "content": "And now?"}]
    kwargs = {"chat_template_kwargs": {"preserve_thinking": True}}
    kept, dropped = (client.responses.create(model="tiny", input=turns, extra_body=each) for each in (kwargs, {}))
    assert kept.usage.input_tokens > dropped.usage.input_tokens


def test_a_stream_of_a_response_has_the_events_of_both_items(client: openai.OpenAI, said: tuple[str, str]) -> None:
    with client.responses.stream(model="tiny", input=QUESTION) as stream:
        events = list(stream)
        found = stream.get_final_response()
    kinds: list[tuple[str, int | None]] = []
    for event in events:
        told = (event.type, getattr(event, "output_index", None))
        if told != (kinds or [None])[-1]:
            kinds.append(told)
    item = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    assert kinds == [
        ("response.created", None),
        ("response.in_progress", None),
        *((f"response.{kind.format('reasoning_text')}", 0) for kind in item),
        *((f"response.{kind.format('output_text')}", 1) for kind in item),
        ("response.completed", None),
    ]
    assert "".join(each.delta for each in events if each.type == "response.reasoning_text.delta") == said[0]
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == said[1]
    assert [each.sequence_number for each in events] == list(range(len(events)))
    assert [each.type for each in found.output] == ["reasoning", "message"]
    assert found.output_text == said[1]


def test_a_call_of_a_response_comes_after_the_thought(client: openai.OpenAI, said: tuple[str, str]) -> None:
    fields: dict[str, Any] = {"tools": [{"type": "function", **LOOK["function"]}], "tool_choice": "required"}
    with client.responses.stream(model="tiny", input=QUESTION, max_output_tokens=200, **fields) as stream:
        found = stream.get_final_response()
    assert [each.type for each in found.output] == ["reasoning", "function_call"]
    assert found.output[0].content[0].text == said[0]


def test_a_response_cut_in_the_thought_is_incomplete(client: openai.OpenAI, said: tuple[str, str]) -> None:
    found = client.responses.create(model="tiny", input=QUESTION, max_output_tokens=3)
    assert (found.status, found.output_text, found.output[0].type) == ("incomplete", "", "reasoning")
    assert said[0].startswith(found.output[0].content[0].text)


# Ollama


@pytest.mark.parametrize("think", [None, True, "high"])
def test_ollama_s_client_is_told_the_thought(ollamas: ollama.Client, said: tuple[str, str], think: Any) -> None:
    chatted = ollamas.chat("tiny", ASKED, think=think)
    assert (chatted.message.thinking, chatted.message.content) == said
    asked = ollamas.generate("tiny", QUESTION, think=think)
    assert (asked.thinking, asked.response) == said
    parts = list(ollamas.chat("tiny", ASKED, think=think, stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == said[0]
    assert "".join(part.message.content or "" for part in parts) == said[1]
    parts = list(ollamas.generate("tiny", QUESTION, think=think, stream=True))
    assert ("".join(part.thinking or "" for part in parts), "".join(part.response for part in parts)) == said
    again = ollamas.chat("tiny", [*ASKED, chatted.message, {"role": "user", "content": "And now?"}])
    assert again.message.thinking == said[0]


def test_ollama_s_client_may_do_without(ollamas: ollama.Client, said: tuple[str, str]) -> None:
    assert "thinking" in ollamas.show("tiny").capabilities
    chatted = ollamas.chat("tiny", ASKED, think=False)
    assert (chatted.message.thinking, chatted.message.content) == (None, said[1])
