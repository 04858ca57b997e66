"""Thinking models: what opens and closes a thought, and how a prompt has the model begin with one or without.

Nothing of it is configured: the tokens are added tokens of the tokenizer, and what the chat template does with them is
found by rendering it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgevlm.errors import PromptError, ThinkingError
from edgevlm.inputs.messages import text_message, user_message

if TYPE_CHECKING:
    from edgevlm.inputs.chat_template import ChatTemplate
    from edgevlm.inputs.tokenizer import Tokenizer


@dataclass(frozen=True)
class Markers:
    """The added tokens that stand before and after a thought."""

    opening: str
    closing: str
    heading: str = ""
    """What the model writes between the opening token and the thought itself."""


_MARKERS = (Markers("<think>", "</think>"), Markers("<|channel>", "<channel|>", "thought\n"))
_VARIABLES = ("enable_thinking", "thinking")
"""What chat templates call the variable that has the model think, or keeps it from that."""
_ENDING = ("\n", "\n\n")
"""What stands on either side of the closing token where a template writes no thought down: as in Qwen's."""
_QUESTION = user_message("question", 0)


@dataclass(frozen=True)
class Thought:
    """How the thought before one answer is told from it."""

    opening_id: int
    closing_id: int
    heading: str
    opened: bool
    """Whether the prompt has opened the thought; else the model opens one with its first token, or does without."""
    asked: bool
    """Whether the caller has asked for a thought."""
    ending: tuple[int, ...]
    """Tokens that end the thought as the template does it; the last is the closing token."""
    separator: str
    """White space between the closing token and the answer."""


@dataclass(frozen=True)
class Opening:
    """How a prompt opens the assistant's turn."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    """The chat template's."""
    suffix: str = ""
    """Text after the rendered template: it ends a thought that the template opens whatever it is told."""
    thought: Thought | None = None
    """None for a model whose tokenizer knows no thought."""

    @property
    def thinks(self) -> bool:
        """Whether the answer comes after a thought, as far as the prompt decides it."""
        return self.thought is not None and self.thought.opened


class Thinking:
    """What a model's tokenizer and chat template say of its thoughts."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template, self._tokenizer = template, tokenizer
        known = (each for each in _MARKERS if None not in map(tokenizer.added_id, (each.opening, each.closing)))
        self._markers = next(known, None)

    @cached_property
    def supported(self) -> bool:
        """Whether the model thinks before its answers, or can be told to."""
        return self._markers is not None and (self._variable is not None or self._opens({}))

    def opening(self, think: bool | None, given: Mapping[str, Any]) -> Opening:
        """Return how the prompt opens a turn with a thought, without one, or (None) as the template has it.

        `given` are template variables; `think` goes before them. Raises `ThinkingError` for a thought that the model
        cannot be asked for. Every model can do without one: what its template opens is closed at once.
        """
        if think and not self.supported:
            raise ThinkingError("this model does not think before it answers; leave out what asks it to")
        variable = None if think is None else self._variable
        variables = {**given, variable: think} if variable else given
        if self._markers is None:
            return Opening(variables)
        before, after = self._ending(variables)
        opened = self._opens(variables)
        closed_here = opened and think is False
        thought = Thought(
            self._id(self._markers.opening),
            self._id(self._markers.closing),
            self._markers.heading,
            opened=opened and not closed_here,
            asked=bool(think),
            ending=tuple(self._tokenizer.encode(before + self._markers.closing, add_special_tokens=False)),
            separator=after,
        )
        return Opening(variables, before + self._markers.closing + after if closed_here else "", thought)

    def response_prefix(self, opening: Opening) -> str:
        """Return the white space that the model writes before an answer, after the thought where there is one."""
        if opening.thought is None or not (opening.thinks or opening.suffix):
            return self._template.response_prefix(opening.variables)
        return "" if opening.suffix else opening.thought.separator

    def _id(self, token: str) -> int:
        found = self._tokenizer.added_id(token)
        assert found is not None
        return found

    @cached_property
    def _variable(self) -> str | None:
        """The variable on which a prompt of the template depends."""
        return next((name for name in _VARIABLES if self._prompt({name: True}) != self._prompt({name: False})), None)

    def _prompt(self, variables: Mapping[str, Any], *, add_generation_prompt: bool = True) -> str:
        try:
            return self._template.render([_QUESTION], variables, add_generation_prompt=add_generation_prompt)
        except PromptError:
            return ""

    def _opens(self, variables: Mapping[str, Any]) -> bool:
        """Tell whether the template leaves a thought open at the end of the prompt."""
        if self._markers is None:
            return False
        asked = self._prompt(variables, add_generation_prompt=False)
        tail = self._prompt(variables).removeprefix(asked)
        return tail.rfind(self._markers.opening) > tail.rfind(self._markers.closing)

    def _ending(self, variables: Mapping[str, Any]) -> tuple[str, str]:
        """Return the white space before and after the closing token, as the template writes thoughts down."""
        assert self._markers is not None
        answered = text_message("assistant", "ANSWER", "THOUGHT")
        try:
            whole = self._template.render([_QUESTION, answered], variables, add_generation_prompt=False)
        except PromptError:
            return _ENDING
        between = whole.partition("THOUGHT")[2].partition("ANSWER")[0]
        before, closing, after = between.partition(self._markers.closing)
        return (before, after) if closing and not (before + after).strip() else _ENDING
