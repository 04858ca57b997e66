"""OpenAI's response object, whole or as the events that build it up."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import count
from typing import Any
from uuid import uuid4

from edgevlm.answer import Answer, TokenLogprob
from edgevlm.server.completion import logprobs_list, timings
from edgevlm.server.deltas import Delta, Deltas, End, told_in_stream
from edgevlm.server.errors import to_json
from edgevlm.server.responses import ResponsesRequest


class ResponseReply:
    """One response: what it says of its request, its items (thought, then message or call), its events' numbers."""

    media_type = "text/event-stream"

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        self._logprobs = request.logprobs
        self._frame = _frame(request, model)
        self._item_id = uuid4().hex
        self._numbers = count()
        self._begun = False
        """Whether the message has begun."""
        self._thought, self._index = "", 0
        """The thought so far, and the place of the item that is being told of."""

    def whole(self, end: End) -> dict[str, Any]:
        """Return the response that is sent at once."""
        status = "completed" if end.complete else "incomplete"
        return {
            **self._frame,
            "status": status,
            "completed_at": int(time.time()) if end.complete else None,
            "incomplete_details": None if end.complete else {"reason": "max_output_tokens"},
            "output": [*self._thoughts(end.answer), self._item(end)],
            "usage": _usage(end.answer),
            "timings": timings(end.answer, end.waited_s),
        }

    async def events(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events in OpenAI's order; an error after the first piece is the stream's last event."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._frame)
        problem = None
        held: tuple[TokenLogprob, ...] = ()
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    held += delta.logprobs
                    for event in self._before_text(delta):
                        yield event
                    if delta.text:
                        logprobs = self._told(held)
                        yield self._of_content("response.output_text.delta", delta=delta.text, logprobs=logprobs)
                        held = ()
                    if delta.end:
                        for event in self._end(delta.end):
                            yield event
        except Exception as error:
            problem = told_in_stream(error).body["error"]
        if problem:
            yield self._event("response.failed", response={**self._frame, "status": "failed", "error": problem})

    def _before_text(self, delta: Delta) -> Iterator[bytes]:
        """Yield the events that come before those of what a delta adds to the message."""
        yield from self._thinking(delta)
        is_message = bool(delta.text or (delta.end and not delta.end.call))
        if is_message and not self._begun:
            self._begun = True
            yield from self._begin_message()

    def _thinking(self, delta: Delta) -> Iterator[bytes]:
        """Yield the events of the thought; what comes after it is the next item."""
        if delta.reasoning_content:
            if not self._thought:
                added = {**_reasoning(self._item_id, ""), "status": "in_progress"}
                yield self._of_item("response.output_item.added", item=added)
                yield self._of_thought("response.content_part.added", part=_reasoning_part(""))
            self._thought += delta.reasoning_content
            yield self._of_thought("response.reasoning_text.delta", delta=delta.reasoning_content)
        if self._thought and not self._index and (delta.text or delta.end):
            yield self._of_thought("response.reasoning_text.done", text=self._thought)
            yield self._of_thought("response.content_part.done", part=_reasoning_part(self._thought))
            yield self._of_item("response.output_item.done", item=_reasoning(self._item_id, self._thought))
            self._index = 1

    def _begin_message(self) -> Iterator[bytes]:
        message = {**self._message("", "in_progress", ()), "content": []}
        yield self._of_item("response.output_item.added", item=message)
        yield self._of_content("response.content_part.added", part=self._part("", ()))

    def _end(self, end: End) -> Iterator[bytes]:
        item = self._item(end)
        if end.call:
            about = {"item_id": item["id"], "output_index": self._index}
            arguments = item["arguments"]
            added = {**item, "arguments": "", "status": "in_progress"}
            yield self._of_item("response.output_item.added", item=added)
            yield self._event("response.function_call_arguments.delta", **about, delta=arguments)
            done = {"name": item["name"], "arguments": arguments}
            yield self._event("response.function_call_arguments.done", **about, **done)
        else:
            [part] = item["content"]
            yield self._of_content("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._of_content("response.content_part.done", part=part)
        yield self._of_item("response.output_item.done", item=item)
        whole = self.whole(end)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _event(self, kind: str, **content: Any) -> bytes:
        data = {"type": kind, "sequence_number": next(self._numbers), **content}
        return f"event: {kind}\n".encode() + b"data: " + to_json(data) + b"\n\n"

    def _of_item(self, kind: str, **content: Any) -> bytes:
        return self._event(kind, output_index=self._index, **content)

    def _of_content(self, kind: str, **content: Any) -> bytes:
        return self._of_item(kind, item_id=f"msg_{self._item_id}", content_index=0, **content)

    def _of_thought(self, kind: str, **content: Any) -> bytes:
        return self._of_item(kind, item_id=f"rs_{self._item_id}", content_index=0, **content)

    def _thoughts(self, answer: Answer) -> list[dict[str, Any]]:
        return [_reasoning(self._item_id, answer.reasoning_content)] if answer.reasoning_content else []

    def _item(self, end: End) -> dict[str, Any]:
        """Return the last item of the output: a message or a call."""
        if not end.call:
            status = "completed" if end.complete else "incomplete"
            return self._message(end.answer.text, status, end.answer.logprobs)
        called = end.call["function"]
        return {
            "id": f"fc_{self._item_id}",
            "type": "function_call",
            "status": "completed",
            "call_id": end.call["id"],
            "name": called["name"],
            "arguments": called["arguments"],
        }

    def _message(self, text: str, status: str, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._item_id}",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [self._part(text, logprobs)],
        }

    def _part(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._told(logprobs)}

    def _told(self, logprobs: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
        return logprobs_list(logprobs) if self._logprobs else []


def _reasoning(item_id: str, text: str) -> dict[str, Any]:
    """Return a thought as an item of the output."""
    content = [_reasoning_part(text)] if text else []
    return {"id": f"rs_{item_id}", "type": "reasoning", "status": "completed", "summary": [], "content": content}


def _reasoning_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _frame(request: ResponsesRequest, model: str) -> dict[str, Any]:
    """Return a response that has just begun, as it says its request again."""

    def dumped(value: Any) -> Any:
        return value.model_dump(by_alias=True) if hasattr(value, "model_dump") else value

    form = request.text.format if request.text else None
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
        "store": False,
        "temperature": request.temperature or 0.0,
        "text": {"format": dumped(form) or {"type": "text"}},
        "tool_choice": dumped(request.tool_choice) or "auto",
        "tools": [dumped(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _usage(answer: Answer) -> dict[str, Any]:
    """Return OpenAI's usage, the tokens of pictures and of the thought told apart."""
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": answer.cached_tokens,
            "cache_write_tokens": 0,  # none that anybody would be billed for
            "image_tokens": answer.image_tokens,
            "text_tokens": answer.prompt_tokens - answer.image_tokens,
        },
        "output_tokens": answer.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        "total_tokens": answer.prompt_tokens + answer.generated_tokens,
    }
