"""The language part: token embeddings, and the stateful LM whose KV cache lives inside OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgevlm.device import import_openvino

if TYPE_CHECKING:
    import openvino as ov

LOGITS_TO_KEEP = "logits_to_keep"
_MOST_STALE = 512
"""Masked entries of a KV cache beyond which they are cut out, which copies the cache once."""
_KEY_COST, _NARROWEST = 1 / 6, 512
"""Attending to one key costs a token this much over the hidden size, measured by its matrix products: a layer has
12 hidden^2 products of them, and 2 hidden a key. Below the narrowest width overheads hide the difference."""
_PAST_FACTOR = 13
"""OpenVINO's attention of several tokens to what the cache holds already takes this much longer a key than to the
tokens that come with them (874 tokens of SmolVLM-256M's shape: 0.63 s at once, 1.27 s in pieces of 128)."""


def keep_last_logits(model: ov.Model) -> ov.Model:
    """Add an input `logits_to_keep` (int64 `(1,)`): the head then reads only that many last positions.

    At prefill this spares `sequence - 1` rows of the largest matrix product in a small model.
    """
    openvino = import_openvino()
    opset = openvino.opset13
    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    keep = opset.parameter([1], np.int64, name=LOGITS_TO_KEEP)
    keep.output(0).set_names({LOGITS_TO_KEEP})
    one = np.array([1], np.int64)
    start = opset.multiply(keep, np.array([-1], np.int64))
    stop = np.array([np.iinfo(np.int32).max], np.int64)
    kept = opset.slice(head.input_value(0), start, stop, one, one)  # (B, S, D) -> (B, logits_to_keep, D)
    head.input(0).replace_source_output(kept.output(0))
    model.add_parameters([keep])
    model.validate_nodes_and_infer_types()
    return model


class TextEmbeddings:
    """The compiled embedding table."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled

    def request(self) -> ov.InferRequest:
        """Return an inference request, one for each session."""
        return self._compiled.create_infer_request()

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return _embed(self.request(), ids)


def _embed(request: ov.InferRequest, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
    tokens = np.asarray(ids, np.int64).reshape(1, -1)
    return np.array(request.infer([tokens])[0], np.float32)


class LanguageModel:
    """The compiled LM; `session()` gives one conversation's state."""

    def __init__(self, compiled: ov.CompiledModel, embeddings: TextEmbeddings) -> None:
        self._compiled = compiled
        self._embeddings = embeddings
        self._hidden_size = compiled.input("inputs_embeds").get_partial_shape()[2].get_length()

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return self._embeddings.embed(ids)

    def warm_up(self) -> None:
        """Read one token: what OpenVINO puts off until the first inference takes longer than a short prompt does."""
        self.session().step([0])

    def session(self) -> Session:
        """Return a fresh state: a request costs well under a millisecond to make, and shares the weights."""
        return Session(self._compiled.create_infer_request(), self._embeddings.request(), self._hidden_size)


class Session:
    """One sequence being decoded, with its own KV cache; sessions of one model may run in several threads.

    Going back does not touch the cache: the entries behind are masked out of the attention, which costs nothing and
    changes nothing, until there are `_MOST_STALE` of them and they are cut out for good.
    """

    def __init__(self, request: ov.InferRequest, embeddings: ov.InferRequest, hidden_size: int) -> None:
        self._request = request
        self._embeddings = embeddings
        self._key_cost = _KEY_COST / max(hidden_size, _NARROWEST)
        self._beam = np.zeros(1, np.int32)
        self._mask = np.zeros((1, 0), np.int64)  # one for each entry of the KV cache, 0 where it is stale
        self.keys: list[Hashable] = []
        """What each live position holds: a token id, or a name for a place of a picture."""

    @property
    def length(self) -> int:
        """Live positions in the KV cache."""
        return len(self.keys)

    def reset(self) -> None:
        """Forget everything."""
        self._request.reset_state()
        self._mask = np.zeros((1, 0), np.int64)
        self.keys = []

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` positions."""
        if length == 0:
            self.reset()
        elif length < self.length:
            live = np.flatnonzero(self._mask[0])
            self._mask[0, live[length:]] = 0
            del self.keys[length:]

    def rewind_to_common(self, keys: Sequence[Hashable]) -> int:
        """Rewind to where the sequence parts from `keys`, leaving at least the last of them to feed; return there.

        Where reading all of `keys` anew is quicker than going on from there, rewind to the beginning.
        """
        common = min(common_length(self.keys, keys), len(keys) - 1)
        self.rewind(common if self._going_on_pays(common, len(keys)) else 0)
        if self._mask.shape[1] - self.length > _MOST_STALE:
            self._cut_stale()
        return self.length

    def _going_on_pays(self, common: int, length: int) -> bool:
        rest = length - common
        entries = common + min(self._mask.shape[1] - common, _MOST_STALE)  # stale ones are read as well
        going_on = rest * (1 + _PAST_FACTOR * self._key_cost * (entries + rest / 2))
        return going_on < length * (1 + self._key_cost * length / 2)

    def _cut_stale(self) -> None:
        openvino = import_openvino()
        live = np.flatnonzero(self._mask[0])
        for variable in self._request.query_state():
            variable.state = openvino.Tensor(np.ascontiguousarray(variable.state.data[:, :, live]))
        self._mask = np.ones((1, len(live)), np.int64)

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return _embed(self._embeddings, ids)

    def prefill(
        self,
        inputs_embeds: npt.NDArray[np.float32],
        logits_to_keep: int = 1,
        keys: Sequence[Hashable] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Feed `(1, n, hidden)` after what the cache holds; return the last positions' logits `(logits_to_keep, V)`.

        `keys` name the n positions for later prompts; without them no later prompt takes them for its own.
        """
        count = inputs_embeds.shape[1]
        mask = np.concatenate([self._mask, np.ones((1, count), np.int64)], axis=1)
        outputs = self._request.infer(
            {
                "inputs_embeds": inputs_embeds,
                "attention_mask": mask,
                "position_ids": np.arange(self.length, self.length + count, dtype=np.int64)[None],
                "beam_idx": self._beam,
                LOGITS_TO_KEEP: np.array([logits_to_keep], np.int64),
            },
            share_inputs=True,
        )
        self._mask = mask
        self.keys += [object() for _ in range(count)] if keys is None else keys
        return np.asarray(outputs["logits"][0], np.float32)

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
