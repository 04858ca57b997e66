"""The requests that the server takes: OpenAI's shapes, as far as one local model can honour them.

Fields that OpenAI knows and that change nothing here (`user`, `store`, `metadata`, …) are accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_STOPS = 16


class Shape(BaseModel):
    """A JSON object whose values are of the type they are said to be: no number in a string."""

    model_config = ConfigDict(strict=True)


class TextPart(Shape):
    """Text within a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Shape):
    """A picture: a `data:` URL, or, where the server allows it, a file."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Shape):
    """A picture within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl | str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class CalledFunction(Shape):
    """What an assistant asked to be called."""

    name: str
    arguments: str
    """JSON in a string."""


class ToolCall(Shape):
    """A call that an earlier answer asked for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Shape):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class JsonSchema(Shape):
    """A JSON schema that the answer must fulfil."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class PlainText(Shape):
    """Any text."""

    type: Literal["text"]


class AnyJson(Shape):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaJson(Shape):
    """JSON of a given schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainText | AnyJson | SchemaJson, Field(discriminator="type")]


class Function(Shape):
    """A function that the model may ask to be called."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(Shape):
    """Names a function."""

    name: str


class NamedTool(Shape):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class StreamOptions(Shape):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None


class ChatRequest(Shape):
    """A conversation to be continued."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    n: int | None = Field(None, ge=1, le=1)
    max_tiles: int | None = Field(None, ge=1, le=1024)
    """Not OpenAI's: at most this many tiles for each picture, its global view included."""


class ErrorObject(Shape):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Shape):
    """Every error's body."""

    error: ErrorObject
