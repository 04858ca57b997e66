"""Drafts of the next tokens, looked up in what has been read and written so far (prompt-lookup decoding)."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
"""Tokens that must have occurred before in the same order; fewer draft too often what does not come."""
FIRST_DRAFT = 3


class PromptLookup:
    """Proposes what followed the last three tokens when they occurred before.

    A draft is checked in the step that would have made one token anyway, so it can only cost time: a longer step. The
    longest draft grows while drafts come true; after one that fails at once it begins small again, and drafting rests
    for a number of tokens that doubles with each failure, so that text that never repeats is hardly slowed.
    """

    def __init__(self, ids: Sequence[int], longest: int) -> None:
        self._ids = list(ids)
        self._longest = longest
        self._size = min(FIRST_DRAFT, longest)
        self._rest = self._pause = 0
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = NGRAM

    def add(self, token: int) -> None:
        """Take the next token of the answer."""
        self._ids.append(token)
        self._rest = max(0, self._rest - 1)

    def draft(self, room: int) -> list[int]:
        """Return up to `room` tokens that may come next."""
        if self._longest == 0:
            return []
        for end in range(self._indexed, len(self._ids)):  # an n-gram is known once something follows it
            self._after[tuple(self._ids[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(self._ids))
        if self._rest:
            return []
        start = self._after.get(tuple(self._ids[-NGRAM:]))
        return [] if start is None else self._ids[start : start + min(self._size, room)]

    def learn(self, drafted: int, accepted: int) -> None:
        """Be told how many tokens of the last draft came true."""
        if accepted == drafted:
            self._size, self._pause = min(2 * self._size, self._longest), 0
        elif accepted == 0:
            self._pause = min(max(4, 2 * self._pause), 256)
            self._size, self._rest = min(FIRST_DRAFT, self._longest), self._pause
