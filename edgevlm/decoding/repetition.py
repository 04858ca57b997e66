"""Loops: an answer that repeats one pattern of tokens and will not end by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgevlm.errors import OptionError

_ROW_ENDS = (b"\n", b"</tr>", b"<nl>")
"""What ends a row of a table in Markdown, HTML and OTSL."""


@dataclass(frozen=True)
class RepetitionDetection:
    """When an answer counts as a loop: its end is one pattern of tokens, over and over.

    A table may have many equal rows, so a pattern with the end of a row in it must come oftener.
    """

    max_pattern_size: int = 128
    """Tokens of the longest pattern that is looked for."""
    min_count: int = 32
    """How often the pattern must come."""
    min_row_count: int = 128
    """The same for a pattern that ends a row: more rows than a page has."""
    min_tokens: int = 512
    """Least number of tokens of all repetitions together: a line of dots is no loop."""

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_count", "min_row_count", "min_tokens"):
            if (value := getattr(self, name)) < 1:
                raise OptionError(f"{name} must be at least 1, not {value}")


class RepetitionGuard:
    """Tells after each token whether the answer has become a loop."""

    def __init__(self, detection: RepetitionDetection, token_bytes: Callable[[int], bytes]) -> None:
        self._detection, self._token_bytes = detection, token_bytes
        size = detection.max_pattern_size
        self._last = np.full(size, -1)
        """The last tokens, latest first."""
        self._matches = np.zeros(size, np.int64)
        """For each size of a pattern, how many tokens in a row were equal to the one that many places before."""
        sizes = np.arange(1, size + 1)
        repeated = np.maximum(detection.min_tokens, sizes * detection.min_count)
        self._wanted = np.maximum(1, repeated - sizes)
        """How many matches of each size make a loop; the pattern itself comes before them."""

    def add(self, token: int) -> bool:
        """Take the next token; return whether the answer is a loop now."""
        self._matches = np.where(self._last == token, self._matches + 1, 0)
        self._last[1:] = self._last[:-1]
        self._last[0] = token
        found = np.flatnonzero(self._matches >= self._wanted)
        if not found.size:
            return False
        size = int(found[0]) + 1
        pattern = b"".join(self._token_bytes(int(each)) for each in self._last[:size][::-1])
        is_row = any(end in pattern + pattern for end in _ROW_ENDS)
        return not is_row or bool(self._matches[size - 1] + size >= size * self._detection.min_row_count)
