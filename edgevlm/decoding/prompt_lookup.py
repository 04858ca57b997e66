"""Drafts of the next tokens: what came next before, where the text was alike, in prompt, answer or earlier answers."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from threading import Lock
from typing import NamedTuple

import numpy as np

from edgevlm.inputs.prompt import Prompt
from edgevlm.inputs.tokenizer import DIGITS, LETTERS
from edgevlm.runtime.kv_session import common_length

NGRAMS = (1, 2, 3)
"""How many of the last tokens are a context; a prompt is looked up by the longest alone."""
OUTLINES = (4, 12, 28)
"""The same for symbols of the outline; a row of six numbers in OTSL has 25."""
_LONGEST_RUN = 4
"""Longer runs of words or of digits are alike."""
LEAST_LIKELY = 0.25
"""A draft's tokens come true together at least as often as this. One more of them makes a step 0.03 longer under paged
attention and 0.13 otherwise (SmolVLM-256M's shape in INT8 and InternVL3-1B's in INT4, 1000 tokens cached, VNNI)."""
_FORGETTING = 0.98
MOST_QUESTIONS, MOST_ANSWERS, LONGEST_ANSWER = 64, 2, 4096
"""Questions whose answers are kept, how many of each, and tokens of each answer."""


class EarlierAnswers:
    """The last answers to each question, whatever the picture: a camera or a file of pages is asked the same again.

    Keeps `most` questions; the one that was not asked for longest goes. May be used in several threads.
    """

    def __init__(self, most: int = MOST_QUESTIONS) -> None:
        self._most = most
        self._answers: OrderedDict[bytes, tuple[Sequence[int], ...]] = OrderedDict()
        self._lock = Lock()

    def of(self, prompt: Prompt) -> tuple[Sequence[int], ...]:
        """Return the last two answers to the text of a prompt, the latest last; fewer if it was not asked so often."""
        with self._lock:
            return self._answers.get(_question(prompt), ())

    def add(self, prompt: Prompt, ids: Sequence[int]) -> None:
        """Take note of an answer."""
        question = _question(prompt)
        with self._lock:
            answers = self._answers.pop(question, ())
            self._answers[question] = (*answers, array("q", ids[:LONGEST_ANSWER]))[-MOST_ANSWERS:]
            if len(self._answers) > self._most:
                self._answers.popitem(last=False)


def _question(prompt: Prompt) -> bytes:
    """Return a digest of the prompt's tokens outside its pictures, and of its salt."""
    places = np.ones(len(prompt), bool)
    for image in prompt.images:
        places[image.start : image.stop] = False
    return blake2b(np.asarray(prompt.ids, np.int64)[places].tobytes() + prompt.cache_salt.encode()).digest()


class _End(NamedTuple):
    """How a text ends."""

    ids: tuple[int, ...] = ()
    outline: tuple[str, ...] = ()
    """Shapes of its tokens; a run of words or of digits is one symbol."""
    run: int = 0
    """Tokens of the last run."""

    def after(self, token: int, shape: str) -> _End:
        """Return how the text ends with one more token."""
        ids = (*self.ids[1 - NGRAMS[-1] :], token)
        if shape in (LETTERS, DIGITS) and self.outline[-1:] == (shape,):
            return _End(ids, self.outline, min(self.run + 1, _LONGEST_RUN))
        return _End(ids, (*self.outline[1 - OUTLINES[-1] :], shape), 1)

    def contexts(self) -> list[int]:
        """Return what the next token is looked up by, hashed: where two hashes are equal, a draft may be wrong."""
        ngrams = [hash((n, *self.ids[-n:])) for n in NGRAMS]
        return ngrams + [hash((n, self.run, *self.outline[-n:])) for n in OUTLINES]


class _Odds:
    """How often a kind of context has been right of late."""

    __slots__ = ("hits", "tries")

    def __init__(self, hits: float, tries: float) -> None:
        self.hits, self.tries = hits, tries

    def add(self, hit: bool) -> None:
        self.hits = self.hits * _FORGETTING + hit
        self.tries = self.tries * _FORGETTING + 1


class PromptLookup:
    """Proposes the tokens that came next when the text ended alike before.

    It ends alike where its last tokens are the same, or its outline, in which all words and all numbers are: so a row
    of a table foretells where the cells of the next one end, and an element's tags those of the next. How often each
    kind of context is right is counted at every token of the answer, drafted or not. Only what is likely enough to come
    true is drafted, so that text that never repeats is hardly slowed.
    """

    def __init__(
        self,
        ids: Sequence[int],
        longest: int,
        shape: Callable[[int], str] = str,
        earlier: Sequence[Sequence[int]] = (),
    ) -> None:
        """`ids` are the prompt's, `earlier` those of the last answers; `shape` is `Tokenizer.shape`."""
        self._prompt, self._earlier = ids, earlier
        self._longest, self._shape = longest, shape
        self._next: dict[int, tuple[int, bool]] = {}
        """By context what came next, and whether it did so twice in a row."""
        self._odds = [(_Odds(1, 5), _Odds(4, 5)) for _ in (*NGRAMS, *OUTLINES)]
        """For each kind of context, of what came next once and of what did so twice."""
        self._end = _End()
        self._contexts: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> None:
        """Append the next token of the answer."""
        self._new.append(token)

    def first_draft(self, room: int) -> list[int]:
        """Return up to `room` tokens that may begin the answer: those that the last two answers began with."""
        if len(self._earlier) < MOST_ANSWERS:
            return []
        *_, before, last = self._earlier
        return list(last[: min(common_length(before, last), self._longest, room)])

    def draft(self, room: int) -> list[int]:
        """Return up to `room` tokens that may come next."""
        if self._longest == 0:
            return []
        if not self._contexts:  # the first token is out by now
            self._read_earlier()
        for token in self._new:
            self._read(token)
        self._new = []
        draft: list[int] = []
        end, likely = self._end, 1.0
        while len(draft) < min(self._longest, room):
            odds, token = max(self._guesses(end), default=(0.0, -1))
            likely *= odds
            if likely < LEAST_LIKELY:
                break
            draft.append(token)
            end = end.after(token, self._shape(token))
        return draft

    def _guesses(self, end: _End) -> Iterator[tuple[float, int]]:
        """Yield what each context foretells, and how likely it is."""
        for context, odds in zip(end.contexts(), self._odds, strict=True):
            if known := self._next.get(context):
                token, twice = known
                yield odds[twice].hits / odds[twice].tries, token

    def _read_earlier(self) -> None:
        """Take note of the prompt, and of earlier answers as if they were this one."""
        longest = NGRAMS[-1]
        ngrams = zip(*(self._prompt[n:] for n in range(longest)), strict=False)
        following = zip(ngrams, self._prompt[longest:], strict=False)
        self._next = {hash((longest, *ngram)): (token, False) for ngram, token in following}
        for answer in (*self._earlier, ()):
            self._end = _End()
            for token in self._prompt[-longest:]:
                self._end = self._end.after(token, self._shape(token))
            self._contexts = self._end.contexts()
            for token in answer:
                self._read(token)

    def _read(self, token: int) -> None:
        """Take note of the next token, and of which contexts have foretold it."""
        for context, odds in zip(self._contexts, self._odds, strict=True):
            right = False
            if known := self._next.get(context):
                expected, twice = known
                right = expected == token
                odds[twice].add(right)
            self._next[context] = token, right
        self._end = self._end.after(token, self._shape(token))
        self._contexts = self._end.contexts()
