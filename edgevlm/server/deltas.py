"""An answer as every API sends it on: the thought before it and its text as they grow, or its call, and its end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from edgevlm.answer import Answer, Piece, TokenLogprob
from edgevlm.server.engine import log_failure
from edgevlm.server.errors import CALLERS_ERRORS, ApiError, to_api_error
from edgevlm.server.tools import OPEN, read_call

Pieces: TypeAlias = AsyncGenerator[tuple[Piece, float], None]
"""The pieces of an answer, each with the seconds that its job had waited."""


@dataclass(frozen=True)
class End:
    """An answer that has ended."""

    answer: Answer
    call: dict[str, Any] | None
    """The call that the answer is, as chat completions write it."""
    waited_s: float

    @classmethod
    def of(cls, answer: Answer, waited_s: float, *, tools: bool) -> End:
        """Return the end of an answer that may be a call if there are `tools`."""
        return cls(answer, read_call(answer) if tools else None, waited_s)

    @property
    def complete(self) -> bool:
        """Whether nothing cut the answer short; one that was cut before it had its form is not, whatever cut it."""
        return self.answer.finish_reason == "stop" and self.answer.satisfied is not False


@dataclass(frozen=True)
class Delta:
    """What an answer has grown by; the last one carries its end."""

    text: str
    logprobs: tuple[TokenLogprob, ...]
    end: End | None
    reasoning_content: str = ""
    """What the thought before it has grown by."""


Deltas: TypeAlias = AsyncGenerator[Delta, None]


class Reply(Protocol):
    """An answer in the form of one API."""

    media_type: str
    """Of a stream."""

    def whole(self, end: End) -> dict[str, Any]:
        """Return the body of an answer that is sent at once."""

    def events(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        """Yield what a stream holds; an error after the first piece is its last event."""


async def read_deltas(pieces: Pieces, *, tools: bool) -> Deltas:
    """Yield what is new of an answer; with `tools` a text that begins like a call is held back until it is none."""
    held, undecided = "", tools
    async with aclosing(pieces):
        async for piece, waited_s in pieces:
            held += piece.text
            undecided = undecided and (OPEN.startswith(held) or held.startswith(OPEN))
            end = End.of(piece.answer, waited_s, tools=tools) if piece.answer else None
            if undecided and not (end and not end.call):
                yield Delta("", piece.logprobs, end, piece.reasoning_content)
            else:
                yield Delta(held, piece.logprobs, end, piece.reasoning_content)
                held = ""


def told_in_stream(error: Exception) -> ApiError:
    """Return what the last event of a stream tells of `error`; where an unexpected one came from is logged."""
    if not isinstance(error, CALLERS_ERRORS):
        log_failure(error)
    return to_api_error(error)
