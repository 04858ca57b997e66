"""The KV cache of layers with a sliding window, which does not grow with the sequence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgevlm.families.base import SLIDING_ATTENTION_MASK, DecoderTraits
from edgevlm.runtime.core import import_openvino

if TYPE_CHECKING:
    import openvino as ov

MOST_REWOUND = 512
"""Entries before the window that a cut leaves: by so many tokens a sequence can be rewound, whenever it was cut."""
_MOST_GROWTH = 2
"""A cache grows from what a cut leaves to so many times that: a CPU gives it the memory for it at the first token."""
_LAYER = re.compile(r"past_key_values\.(\d+)\.")


class SlidingCache:
    """The entries that layers with a sliding window hold: the last ones of the sequence, masked ones among them.

    It is cut between inferences and rarely: within the graph every token would copy it, and the CPU plugin fuses
    attention only with a cache that grows.
    """

    def __init__(self, request: ov.InferRequest, traits: DecoderTraits) -> None:
        assert traits.sliding_window
        self._request, self._window, self._layers = request, traits.sliding_window, traits.sliding_layers
        self._mask = np.zeros((1, 0), np.int64)  # (1, T): 1 for each entry that they hold, 0 where it is masked
        self._dropped = 0  # entries of the sequence before them
        self._set_from = np.empty(0)

    def holds(self, variable: str) -> bool:
        """Tell whether a state is that of a layer with a sliding window, by its name."""
        layer = _LAYER.match(variable)
        return layer is not None and int(layer[1]) in self._layers

    def reachable(self, length: int) -> int:
        """Return `length` if the window of the token after so many is held, else 0."""
        return length if not self._dropped or length - self._dropped >= self._window - 1 else 0

    def forget(self, length: int) -> None:
        """Truncate the sequence to its first `length` entries, which is `reachable`."""
        self._mask[0, np.flatnonzero(self._mask[0])[length - self._dropped :]] = 0

    def clear(self) -> None:
        """Forget all; the states are reset with all others."""
        self._mask, self._dropped = self._mask[:, :0], 0

    def grow(self, count: int) -> dict[str, npt.NDArray[np.int64]]:
        """Return the decoder's input for `count` tokens more; first cut the cache if it is too long."""
        if self._mask.shape[1] >= _MOST_GROWTH * (self._window + MOST_REWOUND):
            self._cut()
        self._mask = np.concatenate([self._mask, np.ones((1, count), np.int64)], axis=1)
        return {SLIDING_ATTENTION_MASK: self._mask}

    def _cut(self) -> None:
        live = np.flatnonzero(self._mask[0])
        kept = live[-(self._window + MOST_REWOUND) :]
        self._set_from = cut((each for each in self._request.query_state() if self.holds(each.name)), kept)
        self._mask = np.ones((1, len(kept)), np.int64)
        self._dropped += len(live) - len(kept)


def cut(variables: Iterable[ov.VariableState], kept: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Leave states of keys or values `(B, heads, T, head_dim)` their entries `kept` alone.

    Returns the array that they were set from one after another, to be held as long as they are. A state copies what it
    is set from and keeps the tensor nevertheless: arrays of their own would outweigh the caches.
    """
    openvino, buffer = import_openvino(), np.empty(0, np.float32)
    for variable in variables:
        assert ".key" in variable.name or ".value" in variable.name, (
            f"{variable.name} is no KV cache, and cannot be cut"
        )
        past = variable.state.data
        shape = (*past.shape[:2], len(kept), past.shape[3])
        if buffer.size < math.prod(shape):
            buffer = np.empty(math.prod(shape), past.dtype)
        left = np.take(past, kept, axis=2, out=buffer[: math.prod(shape)].reshape(shape), mode="clip")
        variable.state = openvino.Tensor(left, shared_memory=True)
    return buffer
