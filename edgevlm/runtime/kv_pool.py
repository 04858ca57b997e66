"""Idle sessions, kept for prefix reuse."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from weakref import WeakSet

from edgevlm.runtime.kv_session import Session, common_length


class SessionPool:
    """Idle sessions with their KV caches; a prompt gets the one that shares the longest prefix with it.

    Where a session that is lent shares a longer one, it is copied. `limit` bounds the number of idle caches held; the
    least recently used is dropped first.
    """

    def __init__(self, make: Callable[[], Session], limit: int) -> None:
        self._make, self._limit = make, limit
        self._idle: list[Session] = []
        self._lent: WeakSet[Session] = WeakSet()
        self._lock = Lock()

    @contextmanager
    def take(self, keys: Sequence[Hashable]) -> Iterator[Session]:
        """Lend the session that reuses the longest prefix of `keys`, or a new one; after an error it is discarded."""
        session = self._choose(keys)
        try:
            yield session
        except GeneratorExit:  # the caller closed the answer: the session is still consistent
            self._release(session)
            raise
        self._release(session)

    def _choose(self, keys: Sequence[Hashable]) -> Session:
        def reusable(session: Session) -> int:
            return session.reusable_length(keys)

        def common(session: Session) -> int:
            return common_length(session.prefix_keys, keys)

        with self._lock:
            best = max(self._idle, key=reusable, default=None)
            # Do not evict a longer cached prefix for a short common one while the pool has space.
            if best and (len(self._idle) >= self._limit or 2 * reusable(best) >= best.length):
                self._idle.remove(best)
                session = best
            else:
                session = self._make()
            longest = max(self._lent, key=common, default=session)
            if common(longest) > common(session):
                session.copy_prefix(longest, common(longest))
            self._lent.add(session)
            return session

    def _release(self, session: Session) -> None:
        with self._lock:
            self._lent.discard(session)
            self._idle.append(session)
            del self._idle[: max(0, len(self._idle) - self._limit)]
