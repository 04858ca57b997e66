"""Messages of a conversation, as in Hugging Face chats, and the variables of chat templates. No Jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from edgevlm.errors import OptionError

Message: TypeAlias = Mapping[str, Any]
"""`{"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}`, as in Hugging Face chats."""


def user_message(question: str, images: int | Sequence[str]) -> Message:
    """Return one user turn: the images first, then the question.

    `images` are how many, or `image` or `video` for each.
    """
    kinds = ["image"] * images if isinstance(images, int) else images
    content: list[dict[str, str]] = [{"type": kind} for kind in kinds]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


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
