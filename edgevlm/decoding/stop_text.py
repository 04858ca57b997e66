"""Stop texts, found in a stream of text pieces."""

from __future__ import annotations

from collections.abc import Sequence

from edgevlm.runtime.kv_session import common_length


class StopText:
    """Lets text through after the lead and up to the first stop text, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], lead: str = "") -> None:
        self._stops = tuple(stops)
        self._lead = lead
        self._held = ""
        self.shown = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Take new text and return what may be shown of it now."""
        if self.stopped:
            return ""
        self._held += self._without_lead(text)
        # The stop text that is whole first ends the answer, however the text was cut into pieces.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found)[1])
        return self._show(len(self._held) - self._possible_beginning())

    def finish(self, text: str = "") -> str:
        """Take the last text and return all that was still held back."""
        shown = self.add(text)
        return shown if self.stopped else shown + self._show(len(self._held))

    def _without_lead(self, text: str) -> str:
        """Take what is left of the lead off the beginning of the text."""
        common = common_length(self._lead, text)
        self._lead = self._lead[common:] if common == len(text) else ""
        return text[common:]

    def _show(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self.shown += text
        return text

    def _possible_beginning(self) -> int:
        """Return the length of the longest end of the held text that begins some stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        return next(
            (n for n in range(min(longest, len(self._held)), 0, -1) if self._begins_stop(self._held[-n:])),
            0,
        )

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
