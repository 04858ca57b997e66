"""`POST /v1/responses`: OpenAI's Responses API, its requests as chat completions have them.

Nothing is kept between requests: what would need it (`previous_response_id`, `store`, `background`) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from edgevlm.server import refusals
from edgevlm.server.schemas import (
    FUNCTION_NAME,
    AnyJson,
    Asked,
    ChatRequest,
    Effort,
    Function,
    FunctionName,
    Generation,
    JsonSchema,
    NamedTool,
    Part,
    PlainText,
    ResponseFormat,
    SchemaJson,
    SchemaObject,
    Shape,
    Tool,
    kind_of_choice,
)
from edgevlm.server.turns import Turns, image_part, text_part, tool_call

_ITEM_HINTS = frozenset({"id", "status", "phase", "name", "caller", "namespace", "parsed_arguments"})
"""What a client sends back of an answer's items."""
LOGPROBS = "message.output_text.logprobs"


class InputText(Shape):
    """Text within a message; `output_text` is that of an earlier answer."""

    hints = refusals.PART_HINTS | {"annotations", "logprobs", "parsed"}
    type: Literal["input_text", "output_text"]
    text: str


class InputImage(Shape):
    """A picture within a message: a `data:` URL, or, where the server allows it, a file."""

    hints = refusals.PART_HINTS
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] | None = None


def _as_texts(value: object) -> object:
    if not isinstance(value, str | list):
        raise PydanticCustomError("content_type", "must be a text or a list of parts")
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


InputPart: TypeAlias = Annotated[InputText | InputImage, Field(discriminator="type")]
InputParts: TypeAlias = Annotated[
    list[InputPart], BeforeValidator(_as_texts, json_schema_input_type=str | list[InputPart])
]


class InputMessage(Shape):
    """One turn of the conversation."""

    hints = _ITEM_HINTS
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: InputParts


class InputCall(Shape):
    """A call that an earlier answer asked for."""

    hints = _ITEM_HINTS - {"name"} | {"call_id"}
    type: Literal["function_call"]
    name: str
    arguments: str
    """JSON in a string."""


class InputCallOutput(Shape):
    """What came of a call."""

    hints = _ITEM_HINTS | {"call_id"}
    type: Literal["function_call_output"]
    output: Annotated[list[InputText], BeforeValidator(_as_texts, json_schema_input_type=str | list[InputText])]


class ReasoningText(Shape):
    """A thought."""

    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Shape):
    """The thought before an earlier answer, of which the model's chat template keeps what it will."""

    hints = _ITEM_HINTS | {"summary", "encrypted_content"}
    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None

    @property
    def text(self) -> str:
        """The thought."""
        return "".join(part.text for part in self.content or ())


class EasyMessage(Shape):
    """A message that does not say that it is one."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]


def _as_item(value: object) -> object:
    return {**value, "type": "message"} if isinstance(value, dict) and value.get("type") is None else value


_Typed: TypeAlias = InputMessage | InputReasoning | InputCall | InputCallOutput
InputItem: TypeAlias = Annotated[
    Annotated[_Typed, Field(discriminator="type")],
    BeforeValidator(_as_item, json_schema_input_type=EasyMessage | _Typed),
]


def _as_items(value: object) -> object:
    if not isinstance(value, str | list):
        raise PydanticCustomError("input_type", "must be a text or a list of items")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _with_message(items: list[Any]) -> list[Any]:
    if all(isinstance(item, InputReasoning) for item in items):
        raise PydanticCustomError("no_message", "must hold more than reasoning")
    return items


class ReasoningConfig(Shape):
    """Whether the model thinks before it answers, or how much. What it thinks is told whole, and never summarised."""

    hints = frozenset({"summary", "generate_summary"})
    effort: Effort | None = None


class FlatSchema(Shape):
    """JSON of a given schema."""

    type: Literal["json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: SchemaObject = Field(alias="schema")
    strict: bool | None = None


class TextConfig(Shape):
    """The form of the answer."""

    format: Annotated[PlainText | AnyJson | FlatSchema, Field(discriminator="type")] | None = None


class FunctionTool(Shape):
    """A tool; functions are the only kind, for nothing is run on the server."""

    hints = refusals.TOOL_HINTS
    type: Literal["function"]
    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: SchemaObject | None = None
    strict: bool | None = None


class NamedFunction(Shape):
    """The one function that must be called."""

    type: Literal["function"]
    name: str


FunctionChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[NamedFunction, Tag("named")],
    Discriminator(
        kind_of_choice,
        custom_error_type="tool_choice",
        custom_error_message='must be "none", "auto", "required" or {"type": "function", "name": "..."}',
    ),
]


class ResponseStreamOptions(Shape):
    """What a stream holds beside the answer: nothing that could be chosen."""

    hints = refusals.STREAM_HINTS


class ResponsesRequest(Generation):
    """A conversation to be continued."""

    hints = refusals.REQUEST_HINTS - {"store", "metadata"} | {"max_tool_calls"}
    model: str | None = None
    input: Annotated[
        Annotated[list[InputItem], Field(min_length=1), AfterValidator(_with_message)],
        BeforeValidator(_as_items, json_schema_input_type=str | Annotated[list[InputItem], Field(min_length=1)]),
    ]
    instructions: str | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """The latter asks for nothing here: no thought is encrypted."""
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: FunctionChoice | None = None
    metadata: dict[str, str] | None = None
    """Sent back with the answer."""

    @property
    def logprobs(self) -> bool:
        """Whether the answer has the log-probabilities of its tokens."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def asked(self) -> Asked:
        """Return the request as chat completions have it."""
        turns = Turns("input")
        if self.instructions is not None:
            turns.add("instructions", "system", [("instructions", text_part(self.instructions))])
        thought = ""
        for number, item in enumerate(self.input):
            if not isinstance(item, InputReasoning):
                _add(turns, f"input.{number}", item, thought)
            thought = item.text if isinstance(item, InputReasoning) else ""
        chat = ChatRequest(
            **{name: getattr(self, name) for name in Generation.model_fields},
            model=self.model,
            messages=turns.messages,
            stream=self.stream,
            max_tokens=self.max_output_tokens,
            logprobs=self.logprobs,
            response_format=self._response_format(),
            tools=self._tools(),
            tool_choice=self._tool_choice(),
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
        )
        asking = {} if self.think is not None else {"think": "reasoning.effort"}
        return Asked(chat, {**turns.places, **asking, "response_format": "text.format"})

    def _response_format(self) -> ResponseFormat | None:
        form = self.text.format if self.text else None
        if not isinstance(form, FlatSchema):
            return form
        schema = JsonSchema.model_validate({"schema": form.schema_, "name": form.name})
        return SchemaJson(type="json_schema", json_schema=schema)

    def _tools(self) -> list[Tool] | None:
        def as_tool(tool: FunctionTool) -> Tool:
            return Tool(type="function", function=Function(**tool.model_dump(include={*Function.model_fields})))

        return None if self.tools is None else [as_tool(tool) for tool in self.tools]

    def _tool_choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, NamedFunction):
            return choice
        return NamedTool(type="function", function=FunctionName(name=choice.name))


def _add(turns: Turns, place: str, item: InputMessage | InputCall | InputCallOutput, thought: str) -> None:
    """Add an item; `thought` is that before an answer."""
    match item:
        case InputMessage():
            turns.add(place, item.role, _parts(place, item), (), thought if item.role == "assistant" else None)
        case InputCall():
            turns.add(place, "assistant", (), [tool_call(item.name, item.arguments)], thought)
        case InputCallOutput():
            turns.add(place, "tool", [(place, text_part(part.text)) for part in item.output])


def _parts(place: str, message: InputMessage) -> Iterator[tuple[str, Part]]:
    for number, part in enumerate(message.content):
        at = f"{place}.content.{number}"
        if isinstance(part, InputText):
            yield at, text_part(part.text)
        else:
            yield f"{at}.image_url", image_part(part.image_url, part.detail)
