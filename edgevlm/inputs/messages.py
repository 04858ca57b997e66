"""Messages of a conversation, as in Hugging Face chats, and the variables of chat templates. No Jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from edgevlm.errors import OptionError, PromptError

Message: TypeAlias = Mapping[str, Any]
"""`{"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}`, as in Hugging Face chats."""


def user_message(question: str, images: int | Sequence[str]) -> Message:
    """Return one user turn: the images first, then the question.

    `images` are how many, or `image` or `video` for each.
    """
    kinds = ["image"] * images if isinstance(images, int) else images
    content: list[dict[str, str]] = [{"type": kind} for kind in kinds]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


LABEL = "{label}"
"""Stands for the label in a question that is asked of each."""
_ABOUT_LABEL = f'\nDoes the label "{LABEL}" apply? Answer yes or no.'
"""Follows a question that does not say itself where the label goes."""


def about_label(messages: Sequence[Message], label: str) -> list[Message]:
    """Return the conversation whose last question is about one label: in place of `{label}`, or asked after its text.

    Raises `PromptError` where no user asks anything.
    """
    for index in reversed(range(len(messages))):
        message = messages[index]
        texts = [part for part in message["content"] if part["type"] == "text"]
        if message["role"] == "user" and texts:
            ending = "" if any(LABEL in part["text"] for part in texts) else _ABOUT_LABEL
            content = [
                {**part, "text": (part["text"] + ending * (part is texts[-1])).replace(LABEL, label)}
                if part["type"] == "text"
                else part
                for part in message["content"]
            ]
            return [*messages[:index], {**message, "content": content}, *messages[index + 1 :]]
    raise PromptError("labels need a question, a user's message with text")


_REASONING = ("reasoning_content", "thinking")
"""What chat templates call the thought before an answer in its message."""


def text_message(role: str, text: str, reasoning_content: str = "") -> Message:
    """Return one turn of `role` ("system", "assistant") without pictures."""
    return with_reasoning({"role": role, "content": [{"type": "text", "text": text}]}, reasoning_content)


def with_reasoning(message: Message, reasoning_content: str | None) -> Message:
    """Return an answer's message with the thought before it, of which the chat template keeps what it will."""
    return {**message, **dict.fromkeys(_REASONING, reasoning_content)} if reasoning_content else message


_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raise `OptionError` for template variables that no template could be given."""
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier():
            raise OptionError(f"a template variable needs a name such as enable_thinking, not {name!r}")
        if name in _RESERVED:
            raise OptionError(f"{name} is no template variable: edgevlm sets it itself")
