"""Thought and answer: told apart token by token; the thought bounded by a budget, the answer alone constrained."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from edgevlm.decoding.sampling import Logits, Sampler, TokenSelector
from edgevlm.decoding.stop_text import StopText
from edgevlm.inputs.thinking import Thought

if TYPE_CHECKING:
    from edgevlm.inputs.tokenizer import Tokenizer

Part: TypeAlias = Literal["thought", "marker", "answer"]
"""What a generated token belongs to; a marker opens or closes the thought and is shown in neither text."""


class ThoughtTracker:
    """Tells of each token in turn which part it belongs to.

    The model can open a thought that the prompt has not opened with its first token alone. The first closing token ends
    the thought: what comes after it is the answer, whatever it is.
    """

    def __init__(self, thought: Thought | None) -> None:
        self._thought = thought
        self.thinking = thought is not None and thought.opened
        """Whether the next token is of the thought, or closes it."""
        self.begun = False
        """Whether any token has come."""

    def add(self, token: int) -> Part:
        """Return what `token` belongs to."""
        first, self.begun = not self.begun, True
        if self._thought is None:
            return "answer"
        if self.thinking:
            self.thinking = token != self._thought.closing_id
            return "thought" if token not in (self._thought.opening_id, self._thought.closing_id) else "marker"
        self.thinking = first and token == self._thought.opening_id
        return "marker" if self.thinking else "answer"


class ThoughtSplitter:
    """Generated tokens in, one by one; out come the texts of the thought and of the answer, no character split.

    White space around the thought is part of neither text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        thought: Thought | None,
        answer: StopText,
        *,
        skip_special_tokens: bool = True,
        strip: bool = True,
    ) -> None:
        """`answer` ends the answer's text; without `strip` white space after the closing token is left to it."""
        self._tokenizer, self._skip, self._strip = tokenizer, skip_special_tokens, strip
        self._tracker = ThoughtTracker(thought)
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
        self._heading = thought.heading if thought else ""
        self._held = ""
        self._answer = answer
        self.part: Part = "answer"
        """What the last token belongs to."""
        self.reasoning_content: str | None = "" if self._tracker.thinking else None
        """The thought as far as it was shown; None without one."""
        self.reasoning_tokens = 0

    def add(self, token: int) -> tuple[str, str]:
        """Return what `token` adds to the thought and to the answer, one of which is empty."""
        was_thinking = self._tracker.thinking
        self.part = self._tracker.add(token)
        if self.part == "answer":
            return "", self._add_answer(self._detokenizer.add(token))
        self.reasoning_tokens += 1
        self.reasoning_content = self.reasoning_content or ""
        if self.part == "thought":
            return self._add_thought(self._detokenizer.add(token)), ""
        return (self._close() if was_thinking and not self._tracker.thinking else ""), ""

    def finish(self) -> tuple[str, str]:
        """Return what is left of both: characters that the last tokens began, and text held back for a stop text."""
        rest = self._detokenizer.finish()
        if self._tracker.thinking:
            return self._add_thought(rest), ""
        return "", self._answer.finish(self._stripped(rest))

    def _close(self) -> str:
        rest = self._add_thought(self._detokenizer.finish())
        self._detokenizer = self._tokenizer.detokenizer(skip_special_tokens=self._skip)
        return rest

    def _add_thought(self, text: str) -> str:
        """Add text to the thought; return what can be shown: white space waits for what comes after it."""
        waiting = self._held + text
        if not self.reasoning_content:
            waiting = waiting.lstrip()
            if self._heading.startswith(waiting):
                self._held = waiting
                return ""
            waiting = waiting.removeprefix(self._heading).lstrip()
        shown = waiting.rstrip()
        self._held = waiting[len(shown) :]
        self.reasoning_content = (self.reasoning_content or "") + shown
        return shown

    def _add_answer(self, text: str) -> str:
        return self._answer.add(self._stripped(text))

    def _stripped(self, text: str) -> str:
        """Return an answer's text without the white space that parts it from the thought."""
        if not self._strip or self.reasoning_content is None:
            return text
        text = text.lstrip()
        self._strip = not text
        return text


class ThoughtSelector(TokenSelector):
    """Selects the tokens of a thought freely, and leaves those of the answer to another selector.

    At the thought's budget the tokens that end it are fast-forwarded.
    """

    def __init__(
        self,
        sampler: Sampler,
        thought: Thought,
        answer: TokenSelector,
        budget: int | None = None,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        """Of `eos_token_ids`, those of an answer that must not be left out, each ends the thought in place of it."""
        super().__init__(sampler)
        self._thought, self._answer, self._budget = thought, answer, budget
        self._eos = frozenset(eos_token_ids)
        self._tracker = ThoughtTracker(thought)
        self._pending: deque[int] = deque()
        self._spent = self._forced = 0
        self._keep_budget()

    @property
    def _undecided(self) -> bool:
        """Whether the next token tells if there will be a thought."""
        return not self._tracker.begun and not self._tracker.thinking

    @property
    def _answering(self) -> bool:
        return not self._tracker.thinking and not self._undecided

    @property
    def fast_forward(self) -> list[int]:
        return list(self._pending) or (self._answer.fast_forward if self._answering else [])

    @property
    def finished(self) -> bool:
        return self._answering and self._answer.finished

    @property
    def satisfied(self) -> bool | None:
        return self._answer.satisfied and self._answering

    def select(self, logits: Logits) -> int:
        token = self._select(logits)
        if self._tracker.add(token) == "thought":
            self._spent += 1
        self._keep_budget()
        self.fast_forward_tokens = self._forced + self._answer.fast_forward_tokens
        return token

    def _select(self, logits: Logits) -> int:
        if self._pending:
            self._forced += 1
            return self._pending.popleft()
        if self._answering:
            return self._answer.select(logits)
        token = super().select(logits)
        if self._undecided:
            free = token == self._thought.opening_id or self._answer.satisfied is None
            return token if free else self._answer.select(logits)
        if token in self._eos:
            self._pending.extend(self._thought.ending)
            return self._pending.popleft()
        return token

    def _keep_budget(self) -> None:
        spent = self._budget is not None and self._spent >= self._budget
        if spent and self._tracker.thinking and not self._pending:
            self._pending.extend(self._thought.ending)

    def filter_draft(self, draft: Sequence[int]) -> list[int]:
        if self._answering:
            return self._answer.filter_draft(draft)
        end = next((n for n, token in enumerate(draft, 1) if token == self._thought.closing_id), len(draft))
        return list(draft[:end])
