"""Idle sessions, kept for prefix reuse."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from edgevlm.runtime.kv_session import Session, common_length


class SessionPool:
    """Sessions at rest with what they hold, so that a prompt that begins like an earlier one goes on from there.

    Each session keeps its KV cache, so `limit` bounds the memory; the one longest at rest is dropped first.
    """

    def __init__(self, make: Callable[[], Session], limit: int) -> None:
        self._make, self._limit = make, limit
        self._idle: list[Session] = []
        self._lock = Lock()

    @contextmanager
    def take(self, keys: Sequence[Hashable]) -> Iterator[Session]:
        """Lend the session that has most in common with `keys`, or a fresh one; after an error it is not kept."""
        session = self._choose(keys)
        try:
            yield session
        except GeneratorExit:  # whoever read the answer went away: the session is as sound as it was
            self._release(session)
            raise
        self._release(session)

    def _choose(self, keys: Sequence[Hashable]) -> Session:
        with self._lock:
            best = max(self._idle, key=lambda each: common_length(each.prefix_keys, keys), default=None)
            # What little all prompts share is not worth the rest of another conversation, while there is room.
            if best and (len(self._idle) >= self._limit or 2 * common_length(best.prefix_keys, keys) >= best.length):
                self._idle.remove(best)
                return best
        return self._make()

    def _release(self, session: Session) -> None:
        with self._lock:
            self._idle.append(session)
            del self._idle[: max(0, len(self._idle) - self._limit)]
