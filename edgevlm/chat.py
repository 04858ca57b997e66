"""The checkpoint's chat template, rendered in Jinja's sandbox the way transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeAlias

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgevlm.errors import DamagedModelError, PromptError, one_line

Message: TypeAlias = Mapping[str, Any]
"""`{"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}`, as in Hugging Face chats."""


def user_message(question: str, images: int) -> Message:
    """Return one user turn: the images first, then the question."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def text_message(role: str, text: str) -> Message:
    """Return one turn of `role` ("system", "assistant") without pictures."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def check_texts(messages: Sequence[Message], image_token: str) -> None:
    """Raise `PromptError` when a text of the conversation holds the token that stands for a picture."""
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text" and image_token in part["text"]:
                raise PromptError(f"the question may not contain {image_token}, which stands for a picture")


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise DamagedModelError(f"the model's chat template does not parse: {one_line(error)}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the prompt for `messages`, opened for the assistant's answer. Raises `PromptError`."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except Exception as error:  # a template is a program: it may divide by zero or add a number to a text
            raise PromptError(f"the model's chat template refuses the conversation: {one_line(error)}") from None

    def answer_lead(self) -> str:
        """Return the whitespace that the template puts between the opened turn and its text.

        A model answers the way its template writes answers down: many begin theirs with a space.
        """
        question, answer = "question", "ANSWER"
        asked = [user_message(question, 0)]
        try:
            opened = self.render(asked)
            whole = self.render([*asked, text_message("assistant", answer)], add_generation_prompt=False)
        except PromptError:
            return ""
        lead = whole.removeprefix(opened).partition(answer)[0]
        return lead if whole.startswith(opened) and lead.isspace() else ""


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
