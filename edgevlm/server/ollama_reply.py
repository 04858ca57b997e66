"""Ollama's answer, whole or as lines of JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from time import time
from typing import Any

from edgevlm.answer import TokenLogprob
from edgevlm.server.completion import logprobs_list
from edgevlm.server.deltas import Deltas, End, told_in_stream
from edgevlm.server.errors import OLLAMA_PATHS, to_json
from edgevlm.server.ollama import OllamaChat, OllamaGenerate
from edgevlm.strict_json import read_json


class OllamaReply:
    """An answer to `/api/chat` or to `/api/generate`, which differ in how they hold its text."""

    media_type = "application/x-ndjson"

    def __init__(self, request: OllamaChat | OllamaGenerate, model: str) -> None:
        self._chat = isinstance(request, OllamaChat)
        self._model = request.model or model
        self._logprobs, self._ignored = bool(request.logprobs), request.ignored

    def nothing(self, reason: str) -> dict[str, Any]:
        """Return the answer to a request that asks nothing but to `load` the model, or to `unload` it."""
        return {**self._body(""), "done": True, "done_reason": reason}

    def whole(self, end: End) -> dict[str, Any]:
        """Return the answer that is sent at once."""
        calls, answer = _calls(end), end.answer
        body = self._body("" if calls else answer.text, calls, answer.logprobs, answer.reasoning_content or "")
        return body | self._figures(end)

    async def events(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        """Yield lines of JSON; an error after the first piece is the last one."""
        held: tuple[TokenLogprob, ...] = ()
        problem = None
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    held += delta.logprobs
                    if delta.reasoning_content:
                        yield _line(self._body("", thinking=delta.reasoning_content))
                    calls = _calls(delta.end) if delta.end else []
                    unread = delta.end.answer.text if delta.end and delta.end.call and not calls else ""
                    if text := delta.text or unread:
                        yield _line(self._body(text, logprobs=held))
                        held = ()
                    if calls:
                        yield _line(self._body("", calls, held))
                        held = ()
                    if delta.end:
                        yield _line(self._body("", logprobs=held) | self._figures(delta.end))
        except Exception as error:
            problem = told_in_stream(error).body_at(OLLAMA_PATHS)
        if problem:
            yield _line(problem)

    def _body(
        self,
        text: str,
        calls: Sequence[dict[str, Any]] = (),
        logprobs: Sequence[TokenLogprob] = (),
        thinking: str = "",
    ) -> dict[str, Any]:
        thought = {"thinking": thinking} if thinking else {}
        said: dict[str, Any] = {"response": text, **thought}
        if self._chat:
            called = {"tool_calls": calls} if calls else {}
            said = {"message": {"role": "assistant", "content": text, **thought, **called}}
        told = {"logprobs": logprobs_list(logprobs)} if self._logprobs and logprobs else {}
        return {"model": self._model, "created_at": rfc3339(time()), **said, **told, "done": False}

    def _figures(self, end: End) -> dict[str, Any]:
        """Return how the answer ended and what it took: counts, and durations in nanoseconds."""
        answer, times = end.answer, end.answer.timings
        figures = {
            "done": True,
            "done_reason": "stop" if end.complete else "length",
            "total_duration": _ns(end.waited_s + times.total_s),
            "load_duration": _ns(end.waited_s),  # until the model was free for this answer
            "prompt_eval_count": answer.prompt_tokens,
            "prompt_eval_duration": _ns(times.ttft_s),
            "eval_count": answer.generated_tokens,
            "eval_duration": _ns(times.total_s - times.ttft_s),
        }
        return {**figures, "ignored": self._ignored} if self._ignored else figures


def _calls(end: End) -> list[dict[str, Any]]:
    """Return the calls that an answer is, with their arguments as objects.

    Arguments with a number that none can hold (1e999) make no object: the answer is left a text, as Ollama leaves it.
    """
    if not end.call:
        return []
    called = end.call["function"]
    try:
        return [{"function": {"name": called["name"], "arguments": read_json(called["arguments"])}}]
    except ValueError:
        return []


def rfc3339(seconds: float) -> str:
    """Return the moment so many seconds after 1970, as Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _line(content: dict[str, Any]) -> bytes:
    return to_json(content) + b"\n"


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
