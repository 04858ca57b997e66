"""What the generator yields: progress, pieces of text, and at the end the answer with its figures."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from edgevlm.metrics import Timings

FinishReason: TypeAlias = Literal["stop", "length", "context", "repetition"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer and its natural log-probability under the model's raw logits.

    That is before temperature, top-k, top-p and any constraint.
    """

    token_id: int
    data: bytes
    """The token's bytes, which may be a part of a character."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens in its place, best first; their own `top` is empty."""

    @property
    def text(self) -> str:
        """The token as text; bytes that are no whole character are shown as U+FFFD."""
        return self.data.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Answer:
    """A complete answer with its token counts, timings and memory."""

    text: str
    finish_reason: FinishReason
    """`stop`: the model ended it or a stop text came; `length`: max_new_tokens; `context`: the context is full;
    `repetition`: it had become a loop."""
    prompt_tokens: int
    image_tokens: int
    generated_tokens: int
    views: int
    """Calls of the vision encoder that the pictures take: tiles, global views, thumbnails."""
    token_ids: tuple[int, ...]
    cached_tokens: int
    """Prompt tokens reused from the KV cache."""
    cached_views: int
    """Views whose embeddings were in the vision cache."""
    drafted_tokens: int
    accepted_tokens: int
    """Drafted tokens that were accepted."""
    fast_forward_tokens: int
    """Tokens that the constraint or the thinking budget left no choice of; they take no step of their own."""
    satisfied: bool | None
    """Whether the answer satisfies its constraint; None without one."""
    logprobs: tuple[TokenLogprob, ...]
    """One for each token but the end token and those of the thought, when `top_logprobs` asks for them."""
    timings: Timings
    peak_memory_bytes: int
    reasoning_content: str | None = None
    """The thought before the answer, without what opens and closes it; None where the model did not think."""
    reasoning_tokens: int = 0
    """Of the generated tokens, those of the thought and those that open and close it."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm run --json` prints."""
        timings = asdict(self.timings) | {"tokens_per_s": self.timings.tokens_per_s}
        return {
            "answer": self.text,
            "reasoning_content": self.reasoning_content,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "image_tokens": self.image_tokens,
            "generated_tokens": self.generated_tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "views": self.views,
            "cached_tokens": self.cached_tokens,
            "cached_views": self.cached_views,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "fast_forward_tokens": self.fast_forward_tokens,
            "satisfied": self.satisfied,
            "timings": {name: round(value, 6) if value is not None else None for name, value in timings.items()}
            | {"peak_memory_bytes": self.peak_memory_bytes},
        }


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer's text, or of the thought before it; the last one carries the whole answer."""

    text: str
    """What it adds to the answer; empty in a piece of the thought."""
    answer: Answer | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens since the piece before, when `top_logprobs` asks for them."""
    reasoning_content: str = ""
    """What it adds to the thought."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Progress:
    """A step of an answer that is not text yet."""

    stage: Literal["vision", "decode"]
    """`vision`: views encoded; `decode`: tokens generated, also those that complete no text."""
    done: int
    total: int


Event: TypeAlias = Progress | Piece
T = TypeVar("T")


def result_of(steps: Generator[Any, None, T]) -> T:
    """Run a generator to its end and return what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
