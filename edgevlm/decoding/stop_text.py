"""Stop texts in a stream."""

from __future__ import annotations

from collections.abc import Sequence

from edgevlm.runtime.kv_session import common_length


class StopText:
    """Passes text on up to the first stop text, without the response prefix; holds back what may begin a stop text."""

    def __init__(self, stops: Sequence[str], response_prefix: str = "") -> None:
        self._stops = tuple(stops)
        self._prefix = response_prefix
        self._held = ""
        self.shown = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Add new text and return what can be shown now."""
        if self.stopped:
            return ""
        self._held += self._without_prefix(text)
        # The stop text that is whole first ends the answer, however the text was cut into pieces.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found)[1])
        return self._show(len(self._held) - self._possible_beginning())

    def finish(self, text: str = "") -> str:
        """Add the last text and return all that was held back."""
        shown = self.add(text)
        return shown if self.stopped else shown + self._show(len(self._held))

    def _without_prefix(self, text: str) -> str:
        """Return the text without what is left of the response prefix."""
        common = common_length(self._prefix, text)
        self._prefix = self._prefix[common:] if common == len(text) else ""
        return text[common:]

    def _show(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self.shown += text
        return text

    def _possible_beginning(self) -> int:
        """Return the length of the longest suffix of the held text that is a prefix of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        return next(
            (n for n in range(min(longest, len(self._held)), 0, -1) if self._begins_stop(self._held[-n:])),
            0,
        )

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
