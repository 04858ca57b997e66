"""The response: OpenAI's chat completion, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from edgevlm.answer import Answer, Piece, TokenLogprob
from edgevlm.server.errors import to_api_error, to_json
from edgevlm.server.tools import OPEN, read_call

_LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that could not have come: JSON has neither infinity nor NaN."""


class Completion:
    """One answer's frame: its id, its time, its model."""

    def __init__(self, model: str, fingerprint: str, *, tools: bool, logprobs: bool, include_usage: bool) -> None:
        """`tools`: a text that begins like a call is one; `include_usage`: a stream ends with a chunk of its own."""
        self._tools, self._logprobs, self._include_usage = tools, logprobs, include_usage
        self._frame = {
            "id": f"chatcmpl-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, answer: Answer, waited_s: float) -> dict[str, Any]:
        """Return the completion that is sent at once."""
        call = read_call(answer) if self._tools else None
        message: dict[str, Any] = {"role": "assistant", "content": None if call else answer.text, "refusal": None}
        if call:
            message["tool_calls"] = [call]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _logprobs(answer.logprobs) if self._logprobs else None,
            "finish_reason": _finish_reason(answer, call is not None),
        }
        end = {"usage": usage(answer), "timings": timings(answer, waited_s)}
        return {**self._frame, "object": "chat.completion", "choices": [choice], **end}

    async def events(self, pieces: AsyncIterator[tuple[Piece, float]]) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events; an error after the first piece is the stream's last event."""
        yield self._chunk({"role": "assistant", "content": ""})
        held, undecided, problem = "", self._tools, None
        try:
            async for piece, waited_s in pieces:
                held += piece.text
                undecided = undecided and (OPEN.startswith(held) or held.startswith(OPEN))
                logprobs = _logprobs(piece.logprobs) if self._logprobs and piece.logprobs else None
                if (held and not undecided) or logprobs:
                    yield self._chunk({} if undecided else {"content": held}, logprobs=logprobs)
                    held = held if undecided else ""
                if piece.answer:
                    for event in self._end(piece.answer, held, waited_s):
                        yield event
        except Exception as error:
            problem = to_api_error(error).body
        if problem:
            yield _event(problem)

    def _end(self, answer: Answer, held: str, waited_s: float) -> list[bytes]:
        """Return the last events: a call or what is left of the text, how it ended, what it took."""
        events = []
        call = read_call(answer) if self._tools else None
        if call:
            events.append(self._chunk({"tool_calls": [{"index": 0, **call}]}))
        elif held:
            events.append(self._chunk({"content": held}))
        end = {"usage": usage(answer), "timings": timings(answer, waited_s)}
        finish = _finish_reason(answer, call is not None)
        if self._include_usage:
            events.append(self._chunk({}, finish))
            events.append(_event({**self._frame, "object": "chat.completion.chunk", "choices": [], **end}))
        else:
            events.append(self._chunk({}, finish, end=end))
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
        return _event({**chunk, **(end or {"usage": None})})


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


def _finish_reason(answer: Answer, called: bool) -> str:
    """Return OpenAI's word for the end; an answer cut before it had its form is `length` whatever cut it."""
    if called:
        return "tool_calls"
    return "stop" if answer.finish_reason == "stop" and answer.satisfied is not False else "length"


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    told = [{**_logprob(token), "top_logprobs": [_logprob(each) for each in token.top]} for token in tokens]
    return {"content": told, "refusal": None}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    logprob = token.logprob if token.logprob > _LEAST_LOGPROB else _LEAST_LOGPROB  # not `max`, which may keep NaN
    return {"token": token.text, "logprob": logprob, "bytes": list(token.data)}


def usage(answer: Answer) -> dict[str, Any]:
    """Return OpenAI's usage, the tokens of pictures told apart."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.generated_tokens,
        "total_tokens": answer.prompt_tokens + answer.generated_tokens,
        "prompt_tokens_details": {
            "cached_tokens": answer.cached_tokens,
            "image_tokens": answer.image_tokens,
            "text_tokens": answer.prompt_tokens - answer.image_tokens,
            "audio_tokens": 0,
        },
    }


def timings(answer: Answer, waited_s: float) -> dict[str, Any]:
    """Return what is beyond OpenAI's shape: where the time went, in seconds."""
    times = answer.timings
    found = {
        "queue_s": waited_s,
        "preprocess_s": times.preprocess_s,
        "vision_s": times.vision_s,
        "prefill_s": times.prefill_s,
        "ttft_s": times.ttft_s,
        "tpot_s": times.tpot_s,
        "total_s": times.total_s,
        "tokens_per_s": times.tokens_per_s,
    }
    rounded = {name: None if value is None else round(value, 6) for name, value in found.items()}
    return {**rounded, "views": answer.views, "cached_views": answer.cached_views}
