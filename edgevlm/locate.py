"""Locating: what a model is asked to find something in a picture, and how its answer is read."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, isnan

from edgevlm.answer import Answer, TokenLogprob
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.structured import Constraint
from edgevlm.errors import DeviceError, OptionError, PromptError
from edgevlm.families import LOCATING, Family, ImageBudget
from edgevlm.families.grounding import Grounding
from edgevlm.inputs.image import Picture
from edgevlm.inputs.messages import Message, user_message
from edgevlm.locations import Location, Locations, sorted_box

MAX_LOCATIONS, MAX_PHRASE = 100, 500
"""Most places that may be asked for, and most characters of a phrase, which every place repeats."""
_SPECIAL = re.compile(r"(<\|\w+\|>)")
_SLOT = re.compile(r"\{phrase\}|\{noun\}")
_ARTICLE = re.compile(r"^(?:the|a|an)\s+(?=\S)", re.IGNORECASE)


def grounding_of(family: Family) -> Grounding:
    """Return how the models of a family write places. Raises `OptionError` where no convention is known."""
    if family.grounding is None:
        raise OptionError(f"this model has no known way of writing places; {LOCATING} have one")
    return family.grounding


@dataclass(frozen=True)
class Search:
    """What is looked for, and how the model is asked for it and understood."""

    family: Family
    grounding: Grounding
    phrase: str
    most: int

    @classmethod
    def of(cls, family: Family, phrase: str, max_locations: int) -> Search:
        """Return the search for a phrase. Raises `PromptError`, and `OptionError` for a model that cannot locate."""
        grounding = grounding_of(family)
        if not 1 <= max_locations <= MAX_LOCATIONS:
            raise OptionError(f"max_locations must be between 1 and {MAX_LOCATIONS}, not {max_locations}")
        return cls(family, grounding, _checked(phrase), min(max_locations, grounding.most or max_locations))

    @property
    def noun(self) -> str:
        """The phrase without its article."""
        return _ARTICLE.sub("", self.phrase)

    @property
    def messages(self) -> list[Message]:
        """The conversation: one question about one picture."""
        words = {"{phrase}": self.phrase, "{noun}": self.noun}
        return [user_message(_SLOT.sub(lambda slot: words[slot[0]], self.grounding.question), 1)]

    def config(self, config: GenerationConfig, context_length: int) -> GenerationConfig:
        """Return how the answer is generated: greedy, without a thought, under the constraint, which bounds its length.

        Of `config` only `chat_template_kwargs` counts.
        """
        return GenerationConfig(
            max_new_tokens=context_length,
            constraint=self.constraint,
            top_logprobs=0,
            chat_template_kwargs=config.chat_template_kwargs,
            think=False,
        )

    @property
    def constraint(self) -> Constraint:
        """What the answer must satisfy: the family's convention, with `most` places at most."""
        given = self.grounding
        place = " N ".join(map(self._lark, given.place))
        more = f"({self._lark(given.separator)} place){{0,{self.most - 1}}}" if self.most > 1 else ""
        places = f"place {more} {self._lark(given.closing)}"
        if given.none is not None:
            places = f"({places} | {self._lark(given.none)})"
        return Constraint.lark(f"start: {self._lark(given.opening)} {places}\nplace: {place}\nN: /{self._number}/")

    @property
    def _number(self) -> str:
        if self.grounding.scale is None:
            return "0|[1-9][0-9]{0,4}"
        digits = len(str(self.grounding.scale)) - 1
        return f"0|[1-9][0-9]{{0,{digits - 1}}}|{self.grounding.scale}"

    def _literal(self, text: str) -> str:
        return text.replace("{label}", json.dumps(self.noun, ensure_ascii=False))

    def _lark(self, text: str) -> str:
        """Return a text of the convention as a sequence of terminals."""
        parts = [each for each in _SPECIAL.split(text) if each]
        quoted = (json.dumps(self._literal(each), ensure_ascii=False) for each in parts)
        return " ".join(part if _SPECIAL.fullmatch(part) else each for part, each in zip(parts, quoted, strict=True))

    def read(self, answer: Answer, picture: Picture, budget: ImageBudget) -> Locations:
        """Return the places of an answer that satisfies the constraint, in the pixels of the picture.

        Raises `DeviceError` where the model's logits overflow.
        """
        height, width = picture.pixels.shape[:2]
        frame = self._frame(width, height, budget)
        locations: list[Location] = []
        written = list(self._places(answer.logprobs))
        for numbers, score in written:
            location = self._location(numbers, score, frame, (width, height))
            if location and not any((location.box, location.point) == (each.box, each.point) for each in locations):
                locations.append(location)
        dropped = len(written) - len(locations)
        return Locations(self.phrase, tuple(locations), (width, height), picture.orientation, dropped, answer)

    def _frame(self, width: int, height: int, budget: ImageBudget) -> tuple[int, int]:
        """Return the width and height that the model's coordinates have the picture in."""
        if self.grounding.scale is not None:
            return self.grounding.scale, self.grounding.scale
        resized_height, resized_width = self.family.resized(height, width, self.family.budget_for(budget, 1))
        return resized_width, resized_height

    def _places(self, tokens: Sequence[TokenLogprob]) -> Iterator[tuple[list[int], float]]:
        """Yield the coordinates of each place, as the model wrote them, and their score."""
        given = self.grounding
        text = b"".join(token.data for token in tokens)
        opening, separator, *around = (
            self._literal(each).encode() for each in (given.opening, given.separator, *given.place)
        )
        place = re.compile(rb"(\d+)".join(map(re.escape, around)))
        found = place.search(text, text.find(opening) + len(opening))
        while found:
            spans = [found.span(number + 1) for number in range(len(around) - 1)]
            yield [int(each) for each in found.groups()], _score(tokens, spans)
            end = found.end()
            found = place.match(text, end + len(separator)) if text.startswith(separator, end) else None

    def _location(
        self, numbers: Sequence[int], score: float, frame: tuple[int, int], size: tuple[int, int]
    ) -> Location | None:
        """Return the place in pixels, within the picture; None for a box that has no area there."""
        placed = [
            min(number * size[axis % 2] / frame[axis % 2], float(size[axis % 2])) for axis, number in enumerate(numbers)
        ]
        if len(placed) == 2:
            return Location(None, (placed[0], placed[1]), self.phrase, score)
        left, top, right, bottom = sorted_box(*placed)
        return Location((left, top, right, bottom), None, self.phrase, score) if left < right and top < bottom else None


def _checked(phrase: str) -> str:
    """Return the phrase with its white space made single spaces. Raises `PromptError`."""
    if not isinstance(phrase, str) or not phrase.strip():
        raise PromptError("say what to look for, such as 'the red valve'")
    if any(unicodedata.category(each) in ("Cc", "Cs") for each in phrase if not each.isspace()):
        raise PromptError("what to look for must be text in UTF-8 without control characters")
    words = " ".join(phrase.split())
    if len(words) > MAX_PHRASE:
        raise PromptError(f"what to look for has {len(words):,} characters; say it in {MAX_PHRASE} or fewer")
    return words


def _score(tokens: Sequence[TokenLogprob], spans: Sequence[tuple[int, int]]) -> float:
    """Return the geometric mean of the probabilities of the tokens that have a byte in one of the spans.

    Raises `DeviceError` where the logits overflow.
    """
    logprobs, start = [], 0
    for token in tokens:
        end = start + len(token.data)
        if any(start < last and first < end for first, last in spans):
            logprobs.append(token.logprob)
        start = end
    mean = sum(logprobs) / len(logprobs)
    if isnan(mean):
        raise DeviceError("the model's logits are no numbers on this device; try --inference-precision f32")
    return exp(mean)
