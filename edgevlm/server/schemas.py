"""The requests that the server takes: OpenAI's shapes, as far as one local model can honour them.

What else a request may say, and what it may not, is in `refusals`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from edgevlm.decoding.scoring import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from edgevlm.server import refusals
from edgevlm.strict_json import write_json

MAX_STOPS = 16
MAX_CHOICES = 100
FUNCTION_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]


class Shape(BaseModel):
    """A JSON object whose values are of the type they are said to be: no number in a string.

    A field that it does not have is an error unless it asks for nothing: it is null, neutral, or one of the `hints`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra={"additionalProperties": {"type": "null"}})
    hints: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _take_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in data.items() if name in known or not cls._asks_nothing(name, value)}

    @classmethod
    def _asks_nothing(cls, name: str, value: object) -> bool:
        return value is None or name in cls.hints or value in refusals.NEUTRAL.get(name, ())


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        write_json(schema)
    except ValueError:
        raise PydanticCustomError("not_finite", "holds a number that is not finite") from None
    return schema


SchemaObject: TypeAlias = Annotated[dict[str, Any], AfterValidator(_finite)]
"""A JSON schema."""


class TextPart(Shape):
    """Text within a message."""

    hints = refusals.PART_HINTS
    type: Literal["text"]
    text: str


class ImageUrl(Shape):
    """A picture: a `data:` URL, or, where the server allows it, a file."""

    hints = refusals.IMAGE_HINTS
    url: str
    detail: Literal["auto", "low", "high"] | None = None


def _as_image(value: object) -> object:
    if not isinstance(value, str | dict):
        raise PydanticCustomError("image_type", 'must be {"url": "..."} or a text')
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Shape):
    """A picture within a message."""

    hints = refusals.PART_HINTS
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_image, json_schema_input_type=ImageUrl | str)]


class VideoUrl(Shape):
    """A video: a `data:` URL, or, where the server allows it, a file. `fps` and `frames` are not vLLM's."""

    hints = refusals.IMAGE_HINTS
    url: str
    fps: float | None = Field(None, gt=0, le=1000)
    frames: int | None = Field(None, ge=1, le=2**20)


class VideoPart(Shape):
    """A video within a message: not OpenAI's but vLLM's."""

    hints = refusals.PART_HINTS
    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(_as_image, json_schema_input_type=VideoUrl | str)]


Part: TypeAlias = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


def _as_parts(value: object) -> object:
    if not isinstance(value, str | list | None):
        raise PydanticCustomError("content_type", "must be a text or a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Parts: TypeAlias = Annotated[
    list[Part] | None, BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None)
]
"""A message's content; a text is its only part."""


class CalledFunction(Shape):
    """What an assistant asked to be called."""

    hints = refusals.CALL_HINTS
    name: str
    arguments: str
    """JSON in a string."""


class ToolCall(Shape):
    """A call that an earlier answer asked for."""

    hints = refusals.CALL_HINTS
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(Shape):
    """One turn of the conversation."""

    hints = refusals.MESSAGE_HINTS
    role: Role
    content: Parts = None
    reasoning_content: str | None = None
    """The thought of an earlier answer, of which the model's chat template keeps what it will."""
    tool_calls: list[ToolCall] | None = None


class JsonSchema(Shape):
    """A JSON schema that the answer must fulfil."""

    name: str | None = None
    description: str | None = None
    schema_: SchemaObject = Field(alias="schema")
    strict: bool | None = None


class PlainText(Shape):
    """Any text."""

    type: Literal["text"]


class AnyJson(Shape):
    """Any JSON object, or, as llama.cpp has it, JSON of a given schema."""

    type: Literal["json_object"]
    schema_: SchemaObject | None = Field(None, alias="schema")


class SchemaJson(Shape):
    """JSON of a given schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat: TypeAlias = Annotated[PlainText | AnyJson | SchemaJson, Field(discriminator="type")]


class Function(Shape):
    """A function that the model may ask to be called."""

    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: SchemaObject | None = None
    strict: bool | None = None


class Tool(Shape):
    """A tool; functions are the only kind."""

    hints = refusals.TOOL_HINTS
    type: Literal["function"]
    function: Function


class FunctionName(Shape):
    """Names a function."""

    name: str


class NamedTool(Shape):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


def kind_of_choice(value: object) -> str | None:
    """Return the tag of a `tool_choice`."""
    if isinstance(value, str):
        return "word"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "named" if kind == "function" else None


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[NamedTool, Tag("named")],
    Discriminator(
        kind_of_choice,
        custom_error_type="tool_choice",
        custom_error_message=(
            'must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}'
        ),
    ),
]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stops: TypeAlias = Annotated[
    Annotated[list[str], Field(max_length=MAX_STOPS)] | None,
    BeforeValidator(_as_list, json_schema_input_type=str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None),
]
"""Texts that end an answer; one may stand alone."""


Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""How much the model thinks: not at all, or what its chat template makes of the word."""


class StreamOptions(Shape):
    """What a stream holds beside the answer."""

    hints = refusals.STREAM_HINTS
    include_usage: bool | None = None


class Generation(Shape):
    """How an answer is generated, wherever OpenAI's APIs agree on it."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    """0 and -1 are all tokens."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    parallel_tool_calls: bool | None = None
    max_image_tokens: int | None = Field(None, ge=1, le=2**20)
    """Not OpenAI's: at most this many image tokens for each picture."""
    max_tiles: int | None = Field(None, ge=1, le=1024)
    """Not OpenAI's, and from before `max_image_tokens`: at most this many views for each picture."""
    skip_special_tokens: bool | None = None
    """Not OpenAI's but vLLM's: False shows special tokens in the answer's text, the end token excepted."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_finite)] | None = None
    """Not OpenAI's but vLLM's: the chat template's own variables, such as `enable_thinking`."""
    think: bool | None = None
    """Not OpenAI's: whether the model thinks before it answers; None: as its chat template has it."""
    thinking_budget: int | None = Field(None, ge=0, le=2**31)
    """Not OpenAI's: most tokens of the thought."""


class ChatRequest(Generation):
    """A conversation to be continued."""

    hints = refusals.REQUEST_HINTS
    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    reasoning_effort: Effort | None = None
    n: int | None = Field(None, ge=1, le=1)

    @property
    def thinks(self) -> bool | None:
        """Whether the model is to think before it answers; None: as its chat template has it."""
        if self.think is None and self.reasoning_effort is not None:
            return self.reasoning_effort != "none"
        return self.think

    def asked(self) -> Asked:
        """Return the request as the server answers it."""
        return Asked(self, {} if self.think is not None else {"think": "reasoning_effort"})


@dataclass(frozen=True)
class Asked:
    """What a caller asks through any API, as chat completions say it."""

    chat: ChatRequest
    places: Mapping[str, str] = field(default_factory=dict)
    """Places in the caller's own request, by those in `chat`."""


class LocateRequest(Shape):
    """Something to be found in a picture."""

    hints = refusals.REQUEST_HINTS
    model: str | None = None
    image: ImagePart
    phrase: str = Field(min_length=1, max_length=500)
    """What to look for, such as `the red valve`."""
    max_locations: int | None = Field(None, ge=1, le=100)
    max_image_tokens: int | None = Field(None, ge=1, le=2**20)
    """At most this many image tokens for the picture."""


class Place(BaseModel):
    """A place in a picture, as a box or as a point, in pixels."""

    box: list[float] | None
    """Left, top, right and bottom, in the picture turned upright."""
    point: list[float] | None
    """x and y, in the picture turned upright."""
    label: str
    score: float
    """Geometric mean of the probabilities of the tokens that write the coordinates."""
    stored_box: list[float] | None
    """The box in the pixels that the file stores, not turned by its EXIF orientation."""
    stored_point: list[float] | None
    """The point in the pixels that the file stores."""


class LocateAnswer(BaseModel):
    """The places that were found."""

    object: str
    model: str
    phrase: str
    locations: list[Place]
    width: int
    """Of the picture turned upright, in pixels."""
    height: int
    orientation: int
    """EXIF orientation, 1 to 8."""
    dropped: int
    """Places without area in the picture, or named twice."""
    usage: dict[str, Any]
    timings: dict[str, Any]


class ScoreRequest(Shape):
    """Answers to a conversation, to be told how likely they are."""

    hints = refusals.REQUEST_HINTS
    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    type: Literal["choice", "bool", "score", "multi_label"] | None = None
    """`choice`, if left out: one of the `choices`. `bool`: the first or the second of two, `yes` and `no` if left out.
    `score`: an integer from `minimum` to `maximum`. `multi_label`: those of the `choices` that apply, each judged on
    its own by `yes` and `no`."""
    choices: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(min_length=1, max_length=MAX_CHOICES)
        ]
        | None
    ) = None
    minimum: int | None = Field(None, ge=-1000, le=1000)
    maximum: int | None = Field(None, ge=-1000, le=1000)
    threshold: float | None = Field(None, ge=0, le=1)
    """Least probability of a label that applies; 0.5 if left out."""
    calibration_temperature: float | None = Field(None, ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)
    """Divides log-likelihoods before the softmax; if left out, that which is saved with the model, or else 1."""
    max_image_tokens: int | None = Field(None, ge=1, le=2**20)
    """At most this many image tokens for each picture."""
    max_tiles: int | None = Field(None, ge=1, le=1024)
    """At most this many views for each picture."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_finite)] | None = None
    """The chat template's own variables."""


class ScoreAnswer(BaseModel):
    """How likely the model is to answer with each choice."""

    object: str
    model: str
    type: str
    value: str | bool | float | list[str]
    """The likeliest choice; of a bool whether that is the first one; of a score the mean; of labels those that apply.
    """
    probabilities: dict[str, float]
    """Of each choice, given that the model answers with one of them; of each label that it applies."""
    log_likelihoods: dict[str, float] | dict[str, dict[str, float]]
    """Of each choice and the answer's end after it; of `yes` and `no` to each label."""
    total_probability: float | dict[str, float]
    """Of any of the choices, or of `yes` and `no` by label; near 0, the model would answer something else."""
    temperature: float
    """The calibration temperature that the probabilities were scaled by; 1: not scaled."""
    usage: dict[str, Any]
    timings: dict[str, Any]


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorObject
