"""Turns of another API's conversation, as chat completions have them."""

from __future__ import annotations

from collections.abc import Iterable

from edgevlm.server.schemas import CalledFunction, ChatMessage, ImagePart, Part, Role, TextPart, ToolCall


class Turns:
    """Collects messages, and where each of them, and each picture in it, stands in the caller's own request."""

    def __init__(self, place: str) -> None:
        """`place` is what the request calls all that is asked."""
        self.messages: list[ChatMessage] = []
        self.places = {"messages": place}

    def add(
        self,
        place: str,
        role: Role,
        parts: Iterable[tuple[str, Part]],
        calls: Iterable[ToolCall] = (),
        reasoning_content: str | None = None,
    ) -> None:
        """Add a message whose parts come with their own places."""
        at = f"messages.{len(self.messages)}"
        self.places[at] = place
        content = []
        for number, (own, part) in enumerate(parts):
            content.append(part)
            if isinstance(part, ImagePart):
                self.places[f"{at}.content.{number}.image_url"] = own
        called = list(calls) or None
        message = ChatMessage(role=role, content=content, tool_calls=called, reasoning_content=reasoning_content)
        self.messages.append(message)


def text_part(text: str) -> TextPart:
    """Return a text."""
    return TextPart(type="text", text=text)


def image_part(url: str, detail: str | None = None) -> ImagePart:
    """Return a picture."""
    return ImagePart.model_validate({"type": "image_url", "image_url": {"url": url, "detail": detail}})


def tool_call(name: str, arguments: str) -> ToolCall:
    """Return a call that an earlier answer asked for."""
    return ToolCall(function=CalledFunction(name=name, arguments=arguments))
