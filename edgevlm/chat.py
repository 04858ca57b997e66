"""A conversation about pictures, whose earlier turns stay in the KV cache: each turn reads only what is new."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from edgevlm.answer import Answer, Piece
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.stream import Progress, collect
from edgevlm.families.base import RGB
from edgevlm.inputs.chat_template import Message, text_message, user_message
from edgevlm.inputs.image import ImageInput, Images, as_list, load_image


class Model(Protocol):
    """What a conversation asks of a `VLM`."""

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have."""
        ...

    def stream_messages(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput],
        config: GenerationConfig | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Piece]:
        """Yield the answer to a conversation."""
        ...

    def count_tokens(
        self, messages: Sequence[Message], images: Sequence[ImageInput], config: GenerationConfig | None = None
    ) -> int:
        """Return the length of its prompt."""
        ...


@dataclass(frozen=True)
class Turn:
    """A question, the pictures that came with it, and the answer as far as it was given."""

    question: str
    images: tuple[RGB, ...]
    answer: str


class Chat:
    """A conversation with one model; make it with `VLM.chat()`. Not for use from several threads at once.

    When it outgrows the model's context, its oldest turns are forgotten, but never its pictures.
    """

    def __init__(self, vlm: Model, config: GenerationConfig | None = None, system: str | None = None) -> None:
        self._vlm = vlm
        self._system = system
        self.config = config or GenerationConfig()
        self.turns: list[Turn] = []

    def reset(self) -> None:
        """Forget all turns and their pictures."""
        self.turns = []

    def ask(self, question: str, images: Images = None) -> Answer:
        """Return the answer to the next question, with new pictures if there are any.

        Errors as in `stream`, and `IncompleteAnswerError` for an answer cut short of its constraint.
        """
        return collect(self.stream(question, images))

    def stream(self, question: str, images: Images = None, on_progress: Progress | None = None) -> Iterator[Piece]:
        """Yield the answer piece by piece; one that is broken off is part of the conversation as far as it came.

        Raises `ImageError` and `PromptError`; the conversation is then as it was before.
        """
        new = Turn(question, tuple(load_image(image) for image in as_list(images)), "")
        turns = self._fit([*self.turns, new])
        answer = ""
        try:
            for piece in self._vlm.stream_messages(*self._messages(turns), self.config, on_progress):
                answer += piece.text
                yield piece
        finally:
            if answer:
                self.turns = [*turns[:-1], replace(turns[-1], answer=answer)]

    def _fit(self, turns: list[Turn]) -> list[Turn]:
        """Drop the oldest turns until the last one and its answer have room; pictures move to the next turn."""
        limit = self._vlm.context_length
        room = min(self.config.max_new_tokens, limit // 4)
        while len(turns) > 1 and self._vlm.count_tokens(*self._messages(turns), self.config) + room > limit:
            first, second, *rest = turns
            turns = [replace(second, images=first.images + second.images), *rest]
        return turns

    def _messages(self, turns: list[Turn]) -> tuple[list[Message], list[RGB]]:
        messages: list[Message] = [] if self._system is None else [text_message("system", self._system)]
        for turn in turns:
            messages.append(user_message(turn.question, len(turn.images)))
            if turn.answer:
                messages.append(text_message("assistant", turn.answer))
        return messages, [image for turn in turns for image in turn.images]
