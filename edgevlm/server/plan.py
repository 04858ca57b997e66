"""A request of chat completions, understood: the conversation, how to answer it, and what it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.structured import Constraint
from edgevlm.families.base import ImageBudget
from edgevlm.server.engine import ScoreTask
from edgevlm.server.errors import ApiError, blaming
from edgevlm.server.messages import Conversation
from edgevlm.server.schemas import AnyJson, ChatRequest, JsonSchema, SchemaJson
from edgevlm.server.settings import ServeConfig
from edgevlm.server.tools import Tools, choose_tools
from edgevlm.strict_json import write_json


@dataclass(frozen=True)
class Plan:
    """A request, understood."""

    conversation: Conversation
    config: GenerationConfig
    image_budget: ImageBudget
    tools: Tools | None
    caller: str
    scored: ScoreTask | None = None
    """Answers to be scored, where none is to be generated."""
    has_place: bool = False
    """Whether its request holds a place in the queue already: it is a page of a document."""


def make_plan(request: ChatRequest, config: ServeConfig, caller: str) -> Plan:
    """Understand a request, its pictures' headers included. Raises `ApiError` and edgevlm's own errors.

    Callers share no cache: neither timing nor `cached_tokens` may tell one what another has shown.
    """
    conversation = Conversation(request.messages, config)
    _check_schemas(request, config.max_schema_chars)
    content = _constraint(request)
    tools = choose_tools(request, content)
    if tools:
        conversation.add_system(tools.instructions)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "invalid_value", "top_logprobs needs logprobs to be true", param="top_logprobs")
    return Plan(
        conversation,
        GenerationConfig(
            max_new_tokens=min(
                filter(None, (request.max_completion_tokens, request.max_tokens)), default=config.max_tokens
            ),
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            seed=None if request.seed is None else request.seed % 2**64,
            stop=tuple(request.stop or ()),
            constraint=tools.constraint if tools else content,
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            skip_special_tokens=request.skip_special_tokens is not False,
            chat_template_kwargs={**_effort(request), **conversation.variables(request.chat_template_kwargs)},
            think=request.thinks,
            thinking_budget=request.thinking_budget,
        ),
        ImageBudget(conversation.detail, request.max_image_tokens, request.max_tiles),
        tools,
        caller,
    )


def _effort(request: ChatRequest) -> dict[str, Any]:
    """Return the template variable that says how much the model thinks; most chat templates have no such variable."""
    effort = request.reasoning_effort
    return {} if effort in (None, "none") else {"reasoning_effort": effort}


def _check_schemas(request: ChatRequest, limit: int) -> None:
    """Raise `ApiError` where the schemas of a request are longer than `limit` characters, all together."""
    left = limit
    schemas: list[tuple[str, Any]] = [("tools", tool.function.parameters) for tool in request.tools or ()]
    match request.response_format:
        case AnyJson(schema_=schema) | SchemaJson(json_schema=JsonSchema(schema_=schema)):
            schemas.append(("response_format", schema))
    for param, schema in schemas:
        left -= len(write_json(schema, compact=True))
        if left < 0:
            message = f"the JSON schemas have more than {limit:,} characters"
            raise ApiError(413, "schema_too_long", message, param=param)


def _constraint(request: ChatRequest) -> Constraint | None:
    """Return the form of an answer in text."""
    match request.response_format:
        case AnyJson(schema_=schema) | SchemaJson(json_schema=JsonSchema(schema_=schema)):
            with blaming("response_format"):
                return Constraint.json() if schema is None else Constraint.json_schema(schema)
    return None
