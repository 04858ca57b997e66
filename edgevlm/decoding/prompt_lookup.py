"""Prompt-lookup decoding: drafts of the next tokens, looked up in the prompt and the answer so far."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
"""Length of the n-gram that must have occurred before; shorter ones draft too many tokens that are rejected."""
FIRST_DRAFT = 3


class PromptLookup:
    """Proposes what followed the last three tokens when they occurred before.

    A draft is checked in a step that would have made one token anyway; a rejected one costs the longer step. Drafts
    grow while they are accepted. After one that is rejected at its first token they start small again, and drafting
    pauses for a number of tokens that doubles each time, so that text that never repeats is hardly slowed.
    """

    def __init__(self, ids: Sequence[int], longest: int) -> None:
        self._ids = list(ids)
        self._longest = longest
        self._size = min(FIRST_DRAFT, longest)
        self._rest = self._pause = 0
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = NGRAM

    def add(self, token: int) -> None:
        """Append the next token of the answer."""
        self._ids.append(token)
        self._rest = max(0, self._rest - 1)

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
