"""A conversation about pictures; earlier turns stay in the KV cache, so that a turn prefills only what is new."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

from edgevlm.answer import Answer, Event, Piece
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.stream import collect
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.image import ImageInput, Picture, load_picture
from edgevlm.inputs.messages import Message, text_message, user_message
from edgevlm.inputs.video import Video, Visuals, as_visuals, kinds_of
from edgevlm.inputs.vision_cache import PreprocessedImage


class Model(Protocol):
    """What a conversation asks of a `VLM`."""

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have."""
        ...

    def preprocess(
        self, images: Sequence[Picture | Video | PreprocessedImage], image_budget: ImageBudget | None, cache_salt: str
    ) -> list[PreprocessedImage]:
        """Resize and split the pictures of one prompt."""
        ...

    def count_tokens(
        self, messages: Sequence[Message], images: Sequence[PreprocessedImage], config: GenerationConfig
    ) -> int:
        """Return the length of a prompt."""
        ...

    def events(
        self,
        messages: Sequence[Message],
        images: Sequence[PreprocessedImage],
        config: GenerationConfig,
        image_budget: ImageBudget | None,
        cache_salt: str,
    ) -> Generator[Event, None, None]:
        """Yield the progress and the pieces of the answer to a conversation."""
        ...


@dataclass(frozen=True)
class Turn:
    """A question, its pictures and videos, and the answer and its thought as far as they were generated."""

    question: str
    images: tuple[Picture | PreprocessedImage, ...]
    answer: str
    reasoning_content: str = ""

    @property
    def answered(self) -> bool:
        """Whether anything was generated."""
        return bool(self.answer or self.reasoning_content)


class Chat:
    """A conversation with one model; make it with `VLM.chat()`. Not for use from several threads at once.

    When it outgrows the model's context, its oldest turns are forgotten, but never its pictures. Of earlier
    thoughts the model is told what its chat template keeps, which in most is nothing.
    """

    def __init__(
        self,
        vlm: Model,
        config: GenerationConfig | None = None,
        system: str | None = None,
        image_budget: ImageBudget | None = None,
        cache_salt: str = "",
    ) -> None:
        self._vlm, self._system, self._salt = vlm, system, cache_salt
        self.config = config or GenerationConfig()
        self.image_budget = image_budget or ImageBudget()
        self.turns: list[Turn] = []

    def reset(self) -> None:
        """Drop all turns and their pictures."""
        self.turns = []

    def ask(self, question: str, images: Visuals = None) -> Answer:
        """Return the answer to the next question, with new pictures if there are any.

        Errors as in `stream`, and `IncompleteAnswerError` for an answer cut short of its constraint.
        """
        return collect(self.stream(question, images))

    def stream(self, question: str, images: Visuals = None) -> Generator[Piece, None, None]:
        """Yield the answer piece by piece; errors as in `events`."""
        with closing(self.events(question, images)) as events:
            yield from (event for event in events if isinstance(event, Piece))

    def events(self, question: str, images: Visuals = None) -> Generator[Event, None, None]:
        """Yield the progress and the pieces of the answer; a closed one is kept in the conversation as far as it came.

        Raises `ImageError`, `PromptError` and `OptionError`; the conversation is then as it was before.
        """
        turns = [*self.turns, Turn(question, tuple(self._loaded(as_visuals(images))), "")]
        pictures = [picture for turn in turns for picture in turn.images]
        preprocessed = self._vlm.preprocess(pictures, self.image_budget, self._salt)
        turns = self._fit(turns, preprocessed)
        messages, turn = self._messages(turns), turns[-1]
        try:
            with closing(
                self._vlm.events(messages, preprocessed, self.config, self.image_budget, self._salt)
            ) as events:
                for event in events:
                    if isinstance(event, Piece):
                        said, thought = turn.answer + event.text, turn.reasoning_content + event.reasoning_content
                        turn = replace(turn, answer=said, reasoning_content=thought)
                    yield event
        finally:
            if turn.answered:
                self.turns = [*turns[:-1], turn]

    def _loaded(self, images: Sequence[ImageInput | Video]) -> Iterator[Picture | PreprocessedImage]:
        """Yield each picture decoded, each video sampled and sized: it is read once, however many turns follow."""
        for image in images:
            if isinstance(image, Video):
                yield from self._vlm.preprocess([image], self.image_budget, self._salt)
            else:
                yield load_picture(image)

    def _fit(self, turns: list[Turn], images: Sequence[PreprocessedImage]) -> list[Turn]:
        """Drop the oldest turns until the prompt and its answer fit the context; pictures move to the next turn."""
        limit = self._vlm.context_length
        reserved = min(self.config.max_new_tokens, limit // 4)
        while len(turns) > 1 and self._vlm.count_tokens(self._messages(turns), images, self.config) + reserved > limit:
            first, second, *rest = turns
            turns = [replace(second, images=first.images + second.images), *rest]
        return turns

    def _messages(self, turns: list[Turn]) -> list[Message]:
        messages: list[Message] = [] if self._system is None else [text_message("system", self._system)]
        for turn in turns:
            messages.append(user_message(turn.question, kinds_of(turn.images)))
            if turn.answered:
                messages.append(text_message("assistant", turn.answer, turn.reasoning_content))
        return messages
