"""Inspect AI's provider `edgevlm`, an export in this process: `inspect eval task.py --model edgevlm/my-model-int4`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from threading import Lock
from typing import Any

from anyio import to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    Content,
    ContentImage,
    ContentReasoning,
    ContentText,
    ContentVideo,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    TopLogprob,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from edgevlm.answer import Answer, Piece, TokenLogprob
from edgevlm.decoding.config import GenerationConfig, override
from edgevlm.decoding.structured import Constraint
from edgevlm.errors import ContextLengthError, ImageError, OptionError
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.messages import Message, with_reasoning
from edgevlm.inputs.video import Video
from edgevlm.runtime.config import RuntimeConfig

_ROLES = {"tool": "user"}
_DETAILS = {"original": "high"}
_STOP_REASONS: dict[str, StopReason] = {"stop": "stop", "length": "max_tokens", "context": "model_length"}
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_choices": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "prompt_logprobs": (0,),
    "modalities": ([], ["text"]),
}
"""Settings that are not honoured, at the values that ask for nothing."""


@modelapi(name="edgevlm")
class EdgeVLMAPI(ModelAPI):  # type: ignore[misc]
    """A model of edgevlm: one answer at a time, with log-probabilities and response schemas, without tools."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **model_args: Any,
    ) -> None:
        """`model_args` are fields of `RuntimeConfig`, `GenerationConfig` and `ImageBudget`, such as `threads=4`."""
        from edgevlm.vlm import VLM

        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        known = {each.name for each in fields(RuntimeConfig)}
        runtime = RuntimeConfig(**{name: value for name, value in model_args.items() if name in known})
        options = {name: value for name, value in model_args.items() if name not in known}
        self._config, self._budget = override(None, None, options)
        self._vlm = VLM(model_name, runtime)
        self._turn = Lock()

    def max_connections(self) -> int:
        """One answer at a time has all cores."""
        return 1

    def max_tokens(self) -> int:
        """Return the longest answer where the task says nothing."""
        return self._config.max_new_tokens

    async def generate(
        self,
        input: list[ChatMessage],  # noqa: A002 - the names are Inspect's
        tools: list[ToolInfo],
        tool_choice: ToolChoice,  # noqa: ARG002
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer a conversation. Raises `EdgeVLMError` for what cannot be read or is not honoured."""
        if tools:
            raise OptionError("this provider has no tools; use `edgevlm serve` and --model openai-api/edgevlm/NAME")
        messages, images, detail = _conversation(input)
        generation, budget = self._settings(config, detail)
        try:
            answer = await to_thread.run_sync(self._answer, messages, images, generation, budget)
        except ContextLengthError as error:
            return ModelOutput.from_content(self.model_name, "", "model_length", str(error))
        return _output(self.model_name, answer)

    def _settings(self, config: GenerateConfig, detail: str | None) -> tuple[GenerationConfig, ImageBudget]:
        for name, neutral in _NEUTRAL.items():
            if getattr(config, name) not in (None, *neutral):
                raise OptionError(f"{name} is not honoured; leave it out of the task's configuration")
        given = {
            "max_new_tokens": config.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "seed": config.seed,
            "stop": tuple(config.stop_seqs) if config.stop_seqs else None,
            "top_logprobs": (config.top_logprobs or 0) if config.logprobs else None,
            "think": config.reasoning_effort != "none" if config.reasoning_effort else None,
            "thinking_budget": config.reasoning_tokens,
            "detail": detail,
            **(config.extra_body or {}),
        }
        if config.response_schema:
            schema = config.response_schema.json_schema.model_dump(exclude_none=True, by_alias=True)
            given["constraint"] = Constraint.json_schema(schema)
        options = {name: value for name, value in given.items() if value is not None}
        return override(self._config, self._budget, options)

    def _answer(self, messages: Any, images: Any, config: GenerationConfig, budget: ImageBudget) -> Answer:
        with self._turn, closing(self._vlm.events(messages, images, config, budget)) as events:
            for event in events:
                if isinstance(event, Piece) and event.answer:
                    return event.answer
        raise AssertionError("an answer's last piece carries it")


def _conversation(messages: Sequence[ChatMessage]) -> tuple[list[Message], list[bytes | Video], str | None]:
    """Return messages, pictures and videos in edgevlm's form, and the detail that the pictures ask for."""
    said: list[Message] = []
    images: list[bytes | Video] = []
    details: set[str] = set()
    for message in messages:
        parts: list[dict[str, str]] = []
        thought = ""
        content = [ContentText(text=message.content)] if isinstance(message.content, str) else message.content
        for part in content:
            if isinstance(part, ContentReasoning):
                thought += part.reasoning
            else:
                parts.append(_part(part, images))
            if isinstance(part, ContentImage) and part.detail != "auto":
                details.add(_DETAILS.get(part.detail, part.detail))
        said.append(with_reasoning({"role": _ROLES.get(message.role, message.role), "content": parts}, thought))
    if len(details) > 1:
        raise OptionError("all pictures of a conversation must have the same detail")
    return said, images, next(iter(details), None)


def _part(part: Content, images: list[bytes | Video]) -> dict[str, str]:
    if isinstance(part, ContentText):
        return {"type": "text", "text": part.text}
    if isinstance(part, ContentImage):
        images.append(_read(part.image))
        return {"type": "image"}
    if isinstance(part, ContentVideo):
        images.append(Video(_read(part.video)))
        return {"type": "video"}
    raise OptionError(f"a part of type {part.type} cannot be shown to the model; it takes text, image and video")


def _read(url: str) -> bytes:
    """Return what a `data:` URL holds, as which Inspect hands on every picture and video. Raises `ImageError`."""
    head, _, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise ImageError("a picture or video must be a data: URL in base64")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise ImageError("a data: URL is not valid base64") from None


def _output(model: str, answer: Answer) -> ModelOutput:
    content: list[Content] = [ContentText(text=answer.text)]
    if answer.reasoning_content is not None:
        content.insert(0, ContentReasoning(reasoning=answer.reasoning_content))
    message = ChatMessageAssistant(content=content if len(content) > 1 else answer.text, model=model, source="generate")
    logprobs = Logprobs(content=[_logprob(each) for each in answer.logprobs]) if answer.logprobs else None
    reason: StopReason = _STOP_REASONS.get(answer.finish_reason, "unknown")
    return ModelOutput(
        model=model,
        choices=[ChatCompletionChoice(message=message, stop_reason=reason, logprobs=logprobs)],
        usage=ModelUsage(
            input_tokens=answer.prompt_tokens - answer.cached_tokens,
            output_tokens=answer.generated_tokens,
            total_tokens=answer.prompt_tokens + answer.generated_tokens,
            input_tokens_cache_read=answer.cached_tokens,
            reasoning_tokens=answer.reasoning_tokens,
        ),
        time=answer.timings.total_s,
    )


def _logprob(token: TokenLogprob) -> Logprob:
    top = [TopLogprob(token=each.text, logprob=each.logprob, bytes=list(each.data)) for each in token.top]
    return Logprob(token=token.text, logprob=token.logprob, bytes=list(token.data), top_logprobs=top)
