"""A sequence with its KV cache: prefill, decode, rewind, and reuse of a cached prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from edgevlm.families.base import PER_LAYER_IDS, DecoderTraits, LanguageInputs
from edgevlm.runtime.inference import infer

if TYPE_CHECKING:
    import openvino as ov

SHORT_STEP = 32
"""Tokens whose inference is over before anything could break it off."""
_KEY_COST, _NARROWEST = 1 / 6, 512
"""Cost of attending to one cached key, relative to a token's matmuls: (2 hidden) / (12 hidden^2) for each layer. Below
the narrowest width overheads hide the difference."""
_MOST_STOP_COST = 1 / 4
"""Of a prefill's cost, as much more is spent at most to stop where a later prompt may go on: one that does saves nearly
all of it."""


LONGEST_STEP = 512
"""Tokens that a decoder with a recurrent state reads at once. More at once are not faster and take more memory: of
Qwen3.5-0.8B's shape in INT4, 4,010 tokens take 13.7 s and 1.7 GB in such steps, 19.5 s and 5.4 GB at once."""


def embed(request: ov.InferRequest, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return the embeddings `(1, n, hidden)` of `n` token ids, using a request of the embedding table."""
    tokens = np.asarray(ids, np.int64).reshape(1, -1)
    return np.array(request.infer([tokens], share_inputs=True)[0], np.float32)


class Requests(NamedTuple):
    """The inference requests of a sequence; under paged attention all sequences share the decoder's."""

    decoder: ov.InferRequest
    embeddings: ov.InferRequest


@dataclass(frozen=True)
class DecoderInfo:
    """Sizes, traits and extra inputs of the decoder that a session runs."""

    hidden_size: int
    traits: DecoderTraits = field(default_factory=DecoderTraits)
    extras: Mapping[str, tuple[npt.DTypeLike, tuple[int, ...]]] = field(default_factory=dict)
    """Inputs other than embeddings, positions and the cache, by name: dtype and shape for each token."""


class Session(ABC):
    """One sequence with its own KV cache; sessions of one model may run in several threads."""

    cached_attention_slowdown: ClassVar[float]
    """Slowdown of a multi-token step's attention to cached keys, relative to keys of the same step (measured with
    SmolVLM-256M's shape)."""

    def __init__(self, requests: Requests, decoder: DecoderInfo) -> None:
        self._request, self._embeddings = requests.decoder, requests.embeddings
        self._decoder = decoder
        self._key_cost = _KEY_COST / max(decoder.hidden_size, _NARROWEST)
        self.prefix_keys: list[Hashable] = []
        """Key of each cached entry: a token id, or the key of a row of image embeddings."""
        self._positions = np.zeros((decoder.traits.position_axes, 0), np.int64)
        """Position of each cached entry, `(axes, n)`."""

    @abstractmethod
    def _forget(self, length: int) -> None:
        """Truncate the cache to its first `length` entries."""

    @abstractmethod
    def _read(
        self, inputs_embeds: npt.NDArray[np.float32], inputs: LanguageInputs, logits_to_keep: int
    ) -> npt.NDArray[np.float32]:
        """Run the decoder on `(1, n, hidden)` and its other inputs; return the logits `(logits_to_keep, V)`."""

    def _infer(self, inputs: Mapping[str, Any], count: int) -> Any:
        """Run the decoder on `count` tokens. Raises `Interrupted`: the sequence is then of no use any more."""
        if count <= SHORT_STEP:
            return self._request.infer(inputs, share_inputs=True)
        return infer(self._request, inputs)

    def _cached_entries(self, common: int) -> int:
        """Return how many entries attention reads if the sequence continues after the first `common` positions."""
        return common

    @property
    def length(self) -> int:
        """Number of entries in the KV cache, masked ones not counted."""
        return len(self.prefix_keys)

    @property
    def rewindable(self) -> bool:
        """Whether the sequence can be truncated anywhere."""
        return self._decoder.traits.rewindable

    @property
    def takes_drafts(self) -> bool:
        """Whether tokens of a draft can be taken back."""
        return self._decoder.traits.rewindable

    def _reachable(self, length: int) -> int:
        """Return the greatest length of at most `length` that the sequence can be truncated to."""
        return length if self._decoder.traits.rewindable or length >= self.length else 0

    def _keep(self, *, for_draft: bool = False) -> None:  # noqa: ARG002
        """Let the sequence go back to where it ends now, where states need copies for that; a draft does so once."""
        return

    def reusable_length(self, keys: Sequence[Hashable]) -> int:
        """Return how many entries a sequence of these keys would reuse at most."""
        return self._reachable(common_length(self.prefix_keys, keys))

    def reset(self) -> None:
        """Empty the cache."""
        self._forget(0)
        self.prefix_keys = []
        self._positions = self._positions[:, :0]

    def rewind(self, length: int) -> None:
        """Truncate the sequence to its first `length` entries, or to fewer where its states cannot be cut there."""
        length = self._reachable(length)
        if length == 0:
            self.reset()
        elif length < self.length:
            self._forget(length)
            del self.prefix_keys[length:]
            self._positions = self._positions[:, :length]

    def take_back(self, count: int) -> list[int]:
        """Take the last `count` tokens of a step with a draft back.

        Returns those before them that had to be taken back, too, and must be read again.
        """
        length = self.length - count
        lost = self.prefix_keys[self._reachable(length) : length]
        self.rewind(length)
        return cast("list[int]", lost)  # the keys of a step's tokens

    def copy_prefix(self, other: Session, length: int) -> int:  # noqa: ARG002
        """Begin anew with copies of another sequence's entries, at most its first `length`; return how many.

        OpenVINO's state is not copied.
        """
        return 0

    def reuse_prefix(
        self, keys: Sequence[Hashable], inputs: LanguageInputs | None = None, images: Sequence[range] = ()
    ) -> int:
        """Rewind to the longest common prefix with `keys` and return its length, at most `len(keys) - 1`.

        Rewinds to the beginning where a full prefill is faster than continuing. A cached entry counts as common only if
        its position in `inputs` is equal, too. `images` are the places of each picture's rows, for decoders whose
        images are reused whole or not at all. Where states cannot be cut, the prefix ends at a length that was kept.
        """
        common = min(common_length(self.prefix_keys, keys), len(keys) - 1)
        if inputs:
            same = (self._positions[:, :common] == inputs.positions[:, :common]).all(axis=0)
            common = int(np.argmin(same)) if not same.all() else common
        if self._decoder.traits.atomic_images:
            common = next((each.start for each in images if each.start < common < each.stop), common)
        common = self._reachable(common)
        self.rewind(common if self._reuse_is_faster(common, len(keys)) else 0)
        return self.length

    def _reuse_is_faster(self, common: int, length: int) -> bool:
        if self._decoder.traits.recurrent:  # from the beginning it would be read in steps, too
            return True
        rest = length - common
        going_on = rest * (
            1 + self.cached_attention_slowdown * self._key_cost * (self._cached_entries(common) + rest / 2)
        )
        return going_on < length * (1 + self._key_cost * length / 2)

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return embed(self._embeddings, ids)

    def prefill(
        self,
        inputs_embeds: npt.NDArray[np.float32],
        logits_to_keep: int = 1,
        keys: Sequence[Hashable] | None = None,
        inputs: LanguageInputs | None = None,
        marks: Sequence[int] = (),
    ) -> npt.NDArray[np.float32]:
        """Append n tokens, `(1, n, hidden)`, to the cache; return the last ones' logits `(logits_to_keep, V)`.

        `keys` identify the tokens for prefix reuse; without them no later prompt reuses the entries. `inputs` holds
        positions and extra inputs of the first of them; the rest continue as text. `marks` are places among them, and
        the beginning besides, that later prompts may go on from: states that cannot be cut are kept there.
        """
        count = inputs_embeds.shape[1]
        whole = self._completed(inputs, count, keys)
        names = [object() for _ in range(count)] if keys is None else keys
        logits: list[npt.NDArray[np.float32]] = []
        if marks:
            self._keep()
        for start, stop in pairwise([0, *self._stops(marks, count), count]):
            kept = max(1, stop - max(start, count - logits_to_keep))
            part = whole.between(start, stop)
            logits.append(self._read(inputs_embeds[:, start:stop], part, kept))
            self._append(names[start:stop], part.positions)
            if stop in marks:
                self._keep()
        return logits[0] if len(logits) == 1 else np.concatenate(logits)[-logits_to_keep:]

    def _stops(self, marks: Sequence[int], count: int) -> list[int]:
        """Return where a prefill of `count` tokens is interrupted: at marks, to keep states, and after `LONGEST_STEP`.

        What follows attends to cached keys, which is slow where all layers do: there no stop is made that costs too
        much.
        """
        traits = self._decoder.traits
        within = {mark for mark in marks if 0 < mark < count}
        if traits.recurrent:
            return sorted(within.union(range(LONGEST_STEP, count, LONGEST_STEP)))
        if not traits.fixed_states:
            return []
        whole = count * (1 + self._key_cost * (self.length + count / 2))
        dearer = self.cached_attention_slowdown * self._key_cost
        return sorted(
            mark for mark in within if (count - mark) * dearer * (self.length + mark) <= _MOST_STOP_COST * whole
        )

    def _append(self, keys: Sequence[Hashable], positions: npt.NDArray[np.int64]) -> None:
        """Note that the cache holds entries with these keys and positions `(axes, n)` behind the others."""
        self.prefix_keys += keys
        self._positions = np.concatenate([self._positions, positions], axis=1)

    def _completed(self, inputs: LanguageInputs | None, count: int, keys: Sequence[Hashable] | None) -> LanguageInputs:
        """Return `inputs` for `count` tokens: text continues after the highest position, equally on every axis.

        The keys of text are its token ids.
        """
        given = inputs.positions if inputs else self._positions[:, :0]
        last = max((int(each.max()) for each in (self._positions, given) if each.size), default=-1)
        text = np.broadcast_to(np.arange(count - given.shape[1]) + last + 1, (len(given), count - given.shape[1]))
        extras = {}
        for name, (dtype, shape) in self._decoder.extras.items():
            extras[name] = np.zeros((count, *shape), dtype)
            if inputs and name in inputs.extras:
                extras[name][: given.shape[1]] = inputs.extras[name]
            if name == PER_LAYER_IDS and keys is not None:
                extras[name][given.shape[1] :] = keys[given.shape[1] :]
        return LanguageInputs(np.concatenate([given, text], axis=1), extras)

    def step(self, token_ids: Sequence[int], drafted: int = 0) -> npt.NDArray[np.float32]:
        """Append n tokens, the last `drafted` of which may be taken back; return the logits `(n, V)` after each."""
        if drafted:
            self._keep(for_draft=True)
        return self.prefill(self.embed(token_ids), len(token_ids), token_ids)


def common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return the length of the common prefix of two sequences."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
