"""Ollama's API: its requests as chat completions have them, and what it tells of a model.

What a client sends that an answer does not take into account is named in the answer, as `ignored`: Frigate, for one,
always asks for penalties.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import inf
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from edgevlm.manifest import LANGUAGE, Manifest
from edgevlm.server import refusals
from edgevlm.server.schemas import (
    AnyJson,
    Asked,
    ChatRequest,
    JsonSchema,
    Part,
    ResponseFormat,
    SchemaJson,
    SchemaObject,
    Shape,
    Stops,
    Tool,
)
from edgevlm.server.turns import Turns, image_part, text_part, tool_call
from edgevlm.strict_json import write_json

_RESOURCES = frozenset(
    {"num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "low_vram", "f16_kv", "use_mmap", "use_mlock"}
) | {"vocab_only", "num_keep", "draft_num_predict"}
"""Options that say with what an answer is computed: they leave it as it is."""
_ENDLESS = 2**31
"""Tokens of an answer that only the context and the time bound, which Ollama asks for by -1."""


class Options(Shape):
    """How an answer is generated."""

    hints = _RESOURCES
    num_predict: int | None = Field(None, ge=-2, le=2**31)
    """At most so many tokens; 0 and below: until the context is full."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = None
    num_ctx: int | None = Field(None, ge=1, le=2**31)
    """The context is always the model's own: what does not fit into it is refused, not cut."""
    min_p: float | None = None
    typical_p: float | None = None
    tfs_z: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalize_newline: bool | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None

    @property
    def ignored(self) -> list[str]:
        """Options that an answer does not take into account though they ask for something."""
        given = self.model_dump(exclude_none=True)
        return [name for name, neutral in _IGNORED.items() if name in given and given[name] != neutral]


_IGNORED = {
    "min_p": 0,
    "typical_p": 1,
    "tfs_z": 1,
    "repeat_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "mirostat": 0,
}
"""Options without effect here, with the values at which they have none anywhere."""


def _as_format(value: object) -> object:
    if not isinstance(value, dict | None) and value not in ("", "json"):
        raise PydanticCustomError("format", 'must be "json" or a JSON schema')
    return value


Format: TypeAlias = Annotated[
    SchemaObject | Literal["", "json"] | None,
    BeforeValidator(_as_format, json_schema_input_type=dict[str, Any] | Literal["", "json"] | None),
]


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)(h|ms|m|s|us|µs|ns)")
"""A part of Go's durations, such as 1h30m."""
_LONGEST_DURATION = 50
_FOR_EVER_S = 1e9


def _as_seconds(value: object) -> object:
    """Return a `keep_alive` in seconds: of a number or a duration, for ever (inf) where it is below zero."""
    if isinstance(value, str):
        text = value[1:] if value.startswith(("+", "-")) else value
        parts = _DURATION.findall(text) if len(text) <= _LONGEST_DURATION else []
        if text != "0" and (not parts or "".join(map("".join, parts)) != text):
            raise _no_duration()
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
        value = -seconds if value.startswith("-") else seconds
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise _no_duration()
    return value if value is None or 0 <= value < _FOR_EVER_S else inf


def _no_duration() -> PydanticCustomError:
    return PydanticCustomError("keep_alive", 'must be a number of seconds, or a duration such as "5m"')


KeepAlive: TypeAlias = Annotated[float | None, BeforeValidator(_as_seconds, json_schema_input_type=float | str | None)]
"""How long a model stays loaded after the request, in seconds."""


class _Request(Shape):
    """What both ways of asking have in common."""

    hints = refusals.REQUEST_HINTS - {"keep_alive"}
    model: str | None = None
    stream: bool | None = None
    """A stream unless it is false."""
    format: Format = None
    options: Options | None = None
    keep_alive: KeepAlive = None
    """None is the time that the server was started with. The first model stays loaded in any case."""
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    """Whether the model thinks before it answers, or how much; None: as its chat template has it."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def ignored(self) -> list[str]:
        """Options that the answer does not take into account."""
        return self.options.ignored if self.options else []

    def _asked(self, turns: Turns, tools: Sequence[Tool] | None = None) -> Asked:
        options = self.options or Options.model_validate({})
        limit = options.num_predict
        fields = {
            **{name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed", "stop")},
            "model": self.model,
            "messages": turns.messages,
            "stream": self.stream is not False,
            "max_tokens": _ENDLESS if limit is not None and limit <= 0 else limit,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "response_format": self._response_format(),
            "tools": tools,
            "think": None if self.think is None else bool(self.think),
            "reasoning_effort": self.think if isinstance(self.think, str) else None,
        }
        return Asked(ChatRequest.model_validate(fields), {**turns.places, "response_format": "format"})

    def _response_format(self) -> ResponseFormat | None:
        if isinstance(self.format, dict):
            schema = JsonSchema.model_validate({"schema": self.format})
            return SchemaJson(type="json_schema", json_schema=schema)
        return AnyJson.model_validate({"type": "json_object"}) if self.format else None


class OllamaFunction(Shape):
    """A function that an earlier answer called."""

    hints = refusals.CALL_HINTS
    name: str
    arguments: SchemaObject


class OllamaCall(Shape):
    """A call that an earlier answer asked for."""

    hints = refusals.CALL_HINTS | {"id", "type"}
    function: OllamaFunction


class OllamaMessage(Shape):
    """One turn of the conversation."""

    hints = refusals.MESSAGE_HINTS
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    """The thought of an earlier answer."""
    images: list[str] | None = None
    """Pictures in base64."""
    tool_calls: list[OllamaCall] | None = None


class OllamaChat(_Request):
    """A conversation to be continued."""

    messages: list[OllamaMessage] | None = None
    """None at all asks whether the model is there."""
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked but that the model be loaded."""
        return not self.messages

    def asked(self) -> Asked:
        """Return the request as chat completions have it."""
        turns = Turns("messages")
        for number, message in enumerate(self.messages or ()):
            calls = [
                tool_call(call.function.name, write_json(call.function.arguments)) for call in message.tool_calls or ()
            ]
            place = f"messages.{number}"
            parts = _parts(f"{place}.images", message.images, message.content)
            turns.add(place, message.role, parts, calls, message.thinking)
        return self._asked(turns, self.tools)


class OllamaGenerate(_Request):
    """A question."""

    prompt: str | None = None
    """None and an empty one, without a picture, ask whether the model is there."""
    system: str | None = None
    images: list[str] | None = None
    """Pictures in base64."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked but that the model be loaded."""
        return not self.prompt and not self.images

    def asked(self) -> Asked:
        """Return the request as chat completions have it."""
        turns = Turns("prompt")
        if self.system:
            turns.add("system", "system", [("system", text_part(self.system))])
        turns.add("prompt", "user", _parts("images", self.images, self.prompt))
        return self._asked(turns)


def _parts(place: str, images: Sequence[str] | None, text: str | None) -> Iterator[tuple[str, Part]]:
    """Yield the pictures and then the text, as all edgevlm's questions have them."""
    for number, image in enumerate(images or ()):
        yield f"{place}.{number}", image_part(f"data:;base64,{image}")
    if text is not None:
        yield place, text_part(text)


class OllamaShow(Shape):
    """The model to be told of; `name` is what `model` was called before."""

    hints = refusals.REQUEST_HINTS | {"verbose", "system", "template", "options"}
    model: str | None = None
    name: str | None = None


class OllamaError(BaseModel):
    """Every error's body."""

    error: str


def describe(manifest: Manifest | None) -> dict[str, Any]:
    """Return the details of a model, those that are not known empty."""
    family = manifest.family if manifest else ""
    return {
        "parent_model": "",
        "format": "openvino",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": "",
        "quantization_level": manifest.submodels[LANGUAGE].precision.upper() if manifest else "",
    }


def list_entry(manifest: Manifest | None, name: str, since: str) -> dict[str, Any]:
    """Return a model's entry of the list; `since` is when it has been served from."""
    return {**_entry(manifest, name), "modified_at": since}


def process_entry(manifest: Manifest, name: str, expires_at: str | None) -> dict[str, Any]:
    """Return the entry of a model in memory; one that stays has no `expires_at`."""
    entry = {**_entry(manifest, name), "size_vram": 0, "context_length": manifest.context_length}
    return entry if expires_at is None else {**entry, "expires_at": expires_at}


def _entry(manifest: Manifest | None, name: str) -> dict[str, Any]:
    return {
        "name": tagged(name),
        "model": tagged(name),
        "size": manifest.size_bytes if manifest else 0,
        "digest": manifest.fingerprint if manifest else "",
        "details": describe(manifest),
    }


def show(manifest: Manifest, since: str, *, can_think: bool) -> dict[str, Any]:
    """Return what Ollama tells of one model."""
    family = manifest.family
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",  # Ollama's are in another language than the model's own
        "modified_at": since,
        "details": describe(manifest),
        "model_info": {"general.architecture": family, f"{family}.context_length": manifest.context_length},
        "capabilities": ["completion", "vision", "tools", *(["thinking"] if can_think else [])],
    }


def tagged(name: str) -> str:
    """Return a model's name with its tag, without which Ollama's clients know none."""
    return name if ":" in name else f"{name}:latest"
