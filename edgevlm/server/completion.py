"""The response: OpenAI's chat completion, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from edgevlm.answer import Answer, TokenLogprob
from edgevlm.decoding.scoring import AnyScores
from edgevlm.server.deltas import Deltas, End, told_in_stream
from edgevlm.server.wire import sse

_LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that could not have come: JSON has neither infinity nor NaN."""


class Completion:
    """One answer's frame: its id, its time, its model."""

    media_type = "text/event-stream"

    def __init__(self, model: str, fingerprint: str, *, logprobs: bool, include_usage: bool) -> None:
        """`include_usage`: a stream ends with a chunk of its own for the usage."""
        self._logprobs, self._include_usage = logprobs, include_usage
        self._frame = {
            "id": f"chatcmpl-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, end: End) -> dict[str, Any]:
        """Return the completion that is sent at once."""
        answer, call = end.answer, end.call
        message: dict[str, Any] = {"role": "assistant", "content": None if call else answer.text, "refusal": None}
        if answer.reasoning_content is not None:
            message["reasoning_content"] = answer.reasoning_content
        if call:
            message["tool_calls"] = [call]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _logprobs(answer.logprobs) if self._logprobs else None,
            "finish_reason": _finish_reason(end),
        }
        return {**self._frame, "object": "chat.completion", "choices": [choice], **_figures(end)}

    async def events(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events; an error after the first piece is the stream's last event."""
        yield self._chunk({"role": "assistant", "content": ""})
        problem = None
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    logprobs = _logprobs(delta.logprobs) if self._logprobs and delta.logprobs else None
                    grown = {"reasoning_content": delta.reasoning_content, "content": delta.text}
                    grown = {name: text for name, text in grown.items() if text}
                    if grown or logprobs:
                        yield self._chunk(grown, logprobs=logprobs)
                    if delta.end:
                        for event in self._end(delta.end):
                            yield event
        except Exception as error:
            problem = told_in_stream(error).body
        if problem:
            yield sse(problem)

    def _end(self, end: End) -> list[bytes]:
        """Return the last events: a call, how the answer ended, what it took."""
        events = [self._chunk({"tool_calls": [{"index": 0, **end.call}]})] if end.call else []
        if self._include_usage:
            events.append(self._chunk({}, _finish_reason(end)))
            events.append(sse({**self._frame, "object": "chat.completion.chunk", "choices": [], **_figures(end)}))
        else:
            events.append(self._chunk({}, _finish_reason(end), end=_figures(end)))
        return [*events, b"data: [DONE]\n\n"]

    def _chunk(
        self,
        delta: dict[str, Any],
        finish: str | None = None,
        *,
        logprobs: Any = None,
        end: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._frame, "object": "chat.completion.chunk", "choices": [choice]}
        return sse({**chunk, **(end or {"usage": None})})


def _figures(end: End) -> dict[str, Any]:
    return {"usage": usage(end.answer), "timings": timings(end.answer, end.waited_s)}


def _finish_reason(end: End) -> str:
    """Return OpenAI's word for the end."""
    if end.call:
        return "tool_calls"
    if end.answer.finish_reason == "repetition":  # vLLM's word
        return "repetition"
    return "stop" if end.complete else "length"


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": logprobs_list(tokens), "refusal": None}


def logprobs_list(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return the tokens with their log-probabilities, each with the likeliest in its place."""
    return [{**_logprob(token), "top_logprobs": [_logprob(each) for each in token.top]} for token in tokens]


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    logprob = token.logprob if token.logprob > _LEAST_LOGPROB else _LEAST_LOGPROB  # not `max`, which may keep NaN
    return {"token": token.text, "logprob": logprob, "bytes": list(token.data)}


def usage(answer: Answer | AnyScores) -> dict[str, Any]:
    """Return OpenAI's usage, the tokens of pictures and of the thought told apart; scores generate no tokens."""
    generated, reasoning = (answer.generated_tokens, answer.reasoning_tokens) if isinstance(answer, Answer) else (0, 0)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": answer.prompt_tokens + generated,
        "prompt_tokens_details": {
            "cached_tokens": answer.cached_tokens,
            "image_tokens": answer.image_tokens,
            "text_tokens": answer.prompt_tokens - answer.image_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def timings(answer: Answer | AnyScores, waited_s: float) -> dict[str, Any]:
    """Return what is beyond OpenAI's shape: where the time went, in seconds."""
    times = answer.timings
    found: dict[str, float | None] = {
        "queue_s": waited_s,
        "preprocess_s": times.preprocess_s,
        "vision_s": times.vision_s,
        "prefill_s": times.prefill_s,
        "total_s": times.total_s,
    }
    if isinstance(answer, Answer):
        found |= {"ttft_s": times.ttft_s, "tpot_s": times.tpot_s, "tokens_per_s": times.tokens_per_s}
    rounded = {name: None if value is None else round(value, 6) for name, value in found.items()}
    return {**rounded, "views": answer.views, "cached_views": answer.cached_views}
