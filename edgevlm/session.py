"""One sequence being decoded: what is in its KV cache, and when it is worth going on from there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import openvino as ov

_KEY_COST, _NARROWEST = 1 / 6, 512
"""Attending to one key costs a token this much over the hidden size, measured by its matrix products: a layer has
12 hidden^2 products of them, and 2 hidden a key. Below the narrowest width overheads hide the difference."""


def embed(request: ov.InferRequest, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return the embeddings `(1, n, hidden)` of `n` token ids, looked up by a request of the embedding table."""
    tokens = np.asarray(ids, np.int64).reshape(1, -1)
    return np.array(request.infer([tokens])[0], np.float32)


class Session(ABC):
    """One sequence being decoded, with its own KV cache; sessions of one model may run in several threads."""

    past_factor: ClassVar[float]
    """Several tokens' attention to a key that the cache holds already takes this much longer than to one of their own
    (measured with SmolVLM-256M's shape)."""

    def __init__(self, request: ov.InferRequest, embeddings: ov.InferRequest, hidden_size: int) -> None:
        self._request = request
        self._embeddings = embeddings
        self._key_cost = _KEY_COST / max(hidden_size, _NARROWEST)
        self.keys: list[Hashable] = []
        """What each live position holds: a token id, or a name for a place of a picture."""

    @abstractmethod
    def _forget(self, length: int) -> None:
        """Leave the first `length` live entries of the cache."""

    @abstractmethod
    def _read(self, inputs_embeds: npt.NDArray[np.float32], logits_to_keep: int) -> npt.NDArray[np.float32]:
        """Feed `(1, n, hidden)`; return the logits `(logits_to_keep, V)`."""

    def _entries(self, common: int) -> int:
        """Return how many of the cache's entries are read by what goes on after the first `common` positions."""
        return common

    @property
    def length(self) -> int:
        """Live positions in the KV cache."""
        return len(self.keys)

    def reset(self) -> None:
        """Forget everything."""
        self._forget(0)
        self.keys = []

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` positions."""
        if length == 0:
            self.reset()
        elif length < self.length:
            self._forget(length)
            del self.keys[length:]

    def rewind_to_common(self, keys: Sequence[Hashable]) -> int:
        """Rewind to where the sequence parts from `keys`, leaving at least the last of them to feed; return there.

        Where reading all of `keys` anew is quicker than going on from there, rewind to the beginning.
        """
        common = min(common_length(self.keys, keys), len(keys) - 1)
        self.rewind(common if self._going_on_pays(common, len(keys)) else 0)
        return self.length

    def _going_on_pays(self, common: int, length: int) -> bool:
        rest = length - common
        going_on = rest * (1 + self.past_factor * self._key_cost * (self._entries(common) + rest / 2))
        return going_on < length * (1 + self._key_cost * length / 2)

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return embed(self._embeddings, ids)

    def prefill(
        self,
        inputs_embeds: npt.NDArray[np.float32],
        logits_to_keep: int = 1,
        keys: Sequence[Hashable] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Feed `(1, n, hidden)` after what the cache holds; return the last positions' logits `(logits_to_keep, V)`.

        `keys` name the n positions for later prompts; without them no later prompt takes them for its own.
        """
        logits = self._read(inputs_embeds, logits_to_keep)
        self.keys += [object() for _ in range(inputs_embeds.shape[1])] if keys is None else keys
        return logits

    def step(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Feed tokens; return the logits `(n, V)` after each of them."""
        return self.prefill(self.embed(token_ids), len(token_ids), token_ids)


def common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return how many items two sequences begin with in common."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


class SessionPool:
    """Sessions at rest with what they hold, so that a prompt that begins like an earlier one goes on from there.

    Each session keeps its KV cache, so `limit` bounds the memory; the one longest at rest is dropped first.
    """

    def __init__(self, make: Callable[[], Session], limit: int) -> None:
        self._make, self._limit = make, limit
        self._resting: list[Session] = []
        self._lock = Lock()

    @contextmanager
    def take(self, keys: Sequence[Hashable]) -> Iterator[Session]:
        """Lend the session that has most in common with `keys`, or a fresh one; after an error it is not kept."""
        session = self._choose(keys)
        try:
            yield session
        except GeneratorExit:  # whoever read the answer went away: the session is as sound as it was
            self._rest(session)
            raise
        self._rest(session)

    def _choose(self, keys: Sequence[Hashable]) -> Session:
        with self._lock:
            best = max(self._resting, key=lambda each: common_length(each.keys, keys), default=None)
            # What little all prompts share is not worth the rest of another conversation, while there is room.
            if best and (len(self._resting) >= self._limit or 2 * common_length(best.keys, keys) >= best.length):
                self._resting.remove(best)
                return best
        return self._make()

    def _rest(self, session: Session) -> None:
        with self._lock:
            self._resting.append(session)
            del self._resting[: max(0, len(self._resting) - self._limit)]
