"""The programs that the server is for: OpenAI's client, an agent, and requests made from its own OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import openai
import pydantic
import pytest
from PIL import Image

from benchmarks.serve_mutations import keep_short
from edgevlm import VLM, GenerationConfig
from edgevlm.server.run import Server
from tests.helpers.serving import QUESTION, data_url, request, serving, shown

KEY = "a-key-of-some-length"
EXAMPLES = 25


@pytest.fixture(scope="module")
def server(vlm: VLM) -> Iterator[Server]:
    with serving(vlm, api_keys=(KEY,), max_tokens=64, time_limit_s=30) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_s_client_asks_about_a_picture(client: openai.OpenAI, vlm: VLM, china: Path) -> None:
    wanted = vlm.generate(china, QUESTION, GenerationConfig(max_new_tokens=20))
    found = client.chat.completions.create(
        model="tiny", messages=shown(data_url(china), detail="auto"), max_completion_tokens=20
    )
    assert found.choices[0].message.content == wanted.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == wanted.prompt_tokens
    assert found.usage.prompt_tokens_details.image_tokens == wanted.image_tokens
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "edgevlm"


def test_openai_s_client_streams(client: openai.OpenAI, vlm: VLM) -> None:
    wanted = vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=20)).text
    fields = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20}
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted
    assert chunks[-1].usage.completion_tokens == 20
    stop = wanted[8:10]
    with client.chat.completions.stream(**fields, stop=stop) as stream:  # the client's own accumulator
        assert stream.get_final_completion().choices[0].message.content == wanted[: wanted.index(stop)]


def test_openai_s_client_parses_a_model_of_pydantic(client: openai.OpenAI) -> None:
    class Shape(pydantic.BaseModel):
        kind: Literal["circle", "square"]
        filled: bool

    messages = shown(data_url(Image.new("RGB", (60, 60), "green")))
    found = client.chat.completions.parse(model="tiny", messages=messages, response_format=Shape, max_tokens=100)
    assert isinstance(found.choices[0].message.parsed, Shape)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=messages, response_format=Shape, max_tokens=3)


def test_openai_s_client_calls_a_function(client: openai.OpenAI) -> None:
    class Look(pydantic.BaseModel):
        side: Literal["left", "right"]

    tools = [openai.pydantic_function_tool(Look)]
    messages = [{"role": "user", "content": QUESTION}]
    found = client.chat.completions.parse(
        model="tiny", messages=messages, tools=tools, tool_choice="required", max_tokens=200
    )
    [call] = found.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Look)


def test_openai_s_client_knows_the_errors(server: Server, client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}
    with pytest.raises(openai.NotFoundError, match="this server's model is called tiny"):
        client.chat.completions.create(**(asked | {"model": "gpt-9"}))
    with pytest.raises(openai.NotFoundError, match="this server's model is called tiny"):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**(asked | {"messages": shown("https://example.com/a.png")}))
    assert (raised.value.code, raised.value.param) == ("remote_image_refused", "messages.0.content.0.image_url")
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_an_agent_looks_at_a_picture_and_calls_a_tool(server: Server, vlm: VLM) -> None:
    """The checkpoint is random: that it calls a tool at all, and with what, is the constraint's doing, not its own."""
    smolagents = pytest.importorskip("smolagents")
    asked: list[str] = []

    class Zoom(smolagents.Tool):
        name = "zoom"
        description = "Looks closer at one side of the picture."
        inputs: ClassVar = {"side": {"type": "string", "description": "Which side.", "enum": ["left", "right"]}}
        output_type = "string"

        def forward(self, side: str) -> str:
            asked.append(side)
            return f"The {side} side is red."

    model = smolagents.OpenAIModel(
        "tiny", api_base=f"{server.url}/v1", api_key=KEY, max_tokens=160, client_kwargs={"max_retries": 0}
    )
    agent = smolagents.ToolCallingAgent(
        [Zoom()],
        model,
        max_steps=1,
        verbosity_level=smolagents.LogLevel.OFF,
        instructions="Be brief.",
        prompt_templates=short_prompts(smolagents),
    )
    # An agent of smolagents answers through a tool too; without it, zoom is what is left to call.
    agent.tools.pop("final_answer")
    agent.run("Which side is red?", images=[Image.new("RGB", (60, 60), "red")])
    step = next(step for step in agent.memory.steps if isinstance(step, smolagents.ActionStep))
    assert [call.name for call in step.tool_calls] == ["zoom"]
    assert asked == [step.tool_calls[0].arguments["side"]]
    assert asked[0] in ("left", "right")
    assert step.observations == f"The {asked[0]} side is red."
    assert step.token_usage.input_tokens > 0


def short_prompts(smolagents: Any) -> Any:
    """Return prompts that the tiny checkpoint's context of 512 tokens has room for."""
    return smolagents.PromptTemplates(
        system_prompt="Use a tool.",
        planning={
            "initial_plan": "",
            "update_plan_pre_messages": "",
            "update_plan_post_messages": "",
        },
        managed_agent={"task": "", "report": ""},
        final_answer={"pre_messages": "Answer.", "post_messages": "{{task}}"},
    )


def test_requests_made_from_the_server_s_own_openapi_document(server: Server) -> None:
    """Whatever the document allows or forbids: an answer that it announces, and no failure of the server."""
    schemathesis = pytest.importorskip("schemathesis")
    document = json.loads(request(server, "GET", "/openapi.json", headers={"Authorization": f"Bearer {KEY}"})[2])
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    operations = [found.ok() for found in schema.get_all_operations()]
    paths = {"/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/chat/completions"}
    paths |= {"/v1/responses", "/v1/locate", "/v1/score", "/api/version", "/api/tags", "/api/ps", "/api/show"}
    paths |= {"/api/chat", "/api/generate", "/v1/status/poll/{task_id}", "/v1/result/{task_id}"}
    paths |= {f"/v1/convert/{source}{task}" for source in ("file", "source") for task in ("", "/async")}
    assert {operation.path for operation in operations} == paths
    for operation in operations:
        statuses = exercise(operation, examples=EXAMPLES if operation.method == "post" else 3)
        assert 400 in statuses or operation.method == "get"


def exercise(operation: Any, examples: int) -> set[int]:
    """Send right and wrong requests to one path, check the answers and return their statuses."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    statuses: set[int] = set()

    def send(case: Any, mode: GenerationMode) -> None:
        keep_short(case.body)
        answer = case.call(headers={"Authorization": f"Bearer {KEY}"})
        statuses.add(answer.status_code)
        is_form = case.media_type == "multipart/form-data"  # in which every value is a text
        also = [negative_data_rejection] if mode is GenerationMode.NEGATIVE and not is_form else []
        case.validate_response(answer, checks=[*checks, *also])

    for mode in GenerationMode:
        bounds = settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )

        @bounds
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            send(case, mode)  # noqa: B023 - it is run before the next mode

        with suppress(Unsatisfiable):  # no wrong request can be made to a path that takes nothing
            run()
    return statuses
