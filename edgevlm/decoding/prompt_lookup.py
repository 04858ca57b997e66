"""Drafts of the next tokens: looked up in the prompt and the answer so far, or in earlier answers to the question."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from threading import Lock
from typing import NamedTuple

import numpy as np

from edgevlm.inputs.prompt import Prompt
from edgevlm.runtime.kv_session import common_length

NGRAM = 3
"""Length of the n-gram that must have occurred before; shorter ones draft too many tokens that are rejected."""
FIRST_DRAFT = 3
MOST_QUESTIONS, LONGEST_ANSWER = 64, 512
"""Questions whose answers are kept, and tokens of each."""


class EarlierAnswer(NamedTuple):
    """The last answer to a question, and how many of its tokens the one before began with, too."""

    ids: Sequence[int] = ()
    agreed: int = 0


class EarlierAnswers:
    """The last answer to each question, whatever the picture: a camera is asked the same about every frame.

    Keeps `most` questions; the one that was not asked for longest goes. May be used in several threads.
    """

    def __init__(self, most: int = MOST_QUESTIONS) -> None:
        self._most = most
        self._answers: OrderedDict[bytes, EarlierAnswer] = OrderedDict()
        self._lock = Lock()

    def of(self, prompt: Prompt) -> EarlierAnswer:
        """Return the last answer to the text of a prompt, none if it was not asked yet."""
        with self._lock:
            return self._answers.get(_question(prompt), EarlierAnswer())

    def add(self, prompt: Prompt, ids: Sequence[int]) -> None:
        """Take note of an answer."""
        question = _question(prompt)
        with self._lock:
            before = self._answers.pop(question, EarlierAnswer()).ids
            kept = tuple(ids[:LONGEST_ANSWER])
            self._answers[question] = EarlierAnswer(kept, common_length(before, kept))
            if len(self._answers) > self._most:
                self._answers.popitem(last=False)


def _question(prompt: Prompt) -> bytes:
    """Return a digest of the prompt's tokens outside its pictures, and of its salt."""
    places = np.ones(len(prompt), bool)
    for image in prompt.images:
        places[image.start : image.stop] = False
    return blake2b(np.asarray(prompt.ids, np.int64)[places].tobytes() + prompt.cache_salt.encode()).digest()


class PromptLookup:
    """Proposes what followed the last three tokens when they occurred before.

    A draft is checked in a step that would have made one token anyway; a rejected one costs the longer step. Drafts
    grow while they are accepted. After one that is rejected at its first token they start small again, and drafting
    pauses for a number of tokens that doubles each time, so that text that never repeats is hardly slowed.
    """

    def __init__(self, ids: Sequence[int], longest: int, earlier: EarlierAnswer | None = None) -> None:
        self._earlier = earlier or EarlierAnswer()
        self._ids = list(ids)
        if self._earlier.ids:
            self._ids = [*ids[-NGRAM:], *self._earlier.ids, *ids]  # what ended the prompt then ends this one, too
        self._longest = longest
        self._size = min(FIRST_DRAFT, longest)
        self._rest = self._pause = 0
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = NGRAM

    def add(self, token: int) -> None:
        """Append the next token of the answer."""
        self._ids.append(token)
        self._rest = max(0, self._rest - 1)

    def first_draft(self, room: int) -> list[int]:
        """Return up to `room` tokens that may begin the answer: those that the last two answers began with."""
        return list(self._earlier.ids[: min(self._earlier.agreed, self._longest, room)])

    def draft(self, room: int) -> list[int]:
        """Return up to `room` tokens that may come next."""
        if self._longest == 0:
            return []
        for end in range(self._indexed, len(self._ids)):  # an n-gram is indexed once a token follows it
            self._after[tuple(self._ids[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(self._ids))
        if self._rest:
            return []
        start = self._after.get(tuple(self._ids[-NGRAM:]))
        return [] if start is None else self._ids[start : start + min(self._size, room)]

    def learn(self, drafted: int, accepted: int) -> None:
        """Adapt to how many tokens of the last draft were accepted."""
        if accepted == drafted:
            self._size, self._pause = min(2 * self._size, self._longest), 0
        elif accepted == 0:
            self._pause = min(max(4, 2 * self._pause), 256)
            self._size, self._rest = min(FIRST_DRAFT, self._longest), self._pause
