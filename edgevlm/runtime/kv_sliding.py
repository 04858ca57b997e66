"""The KV cache of layers with a sliding window, which does not grow with the sequence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgevlm.families.base import DecoderTraits
from edgevlm.runtime.core import import_openvino

if TYPE_CHECKING:
    import openvino as ov

MOST_REWOUND = 512
"""Entries before the window that a cut leaves: by so many tokens a sequence can be rewound, whenever it was cut."""
_MOST_GROWTH = 2
"""A cache grows from what a cut leaves to so many times that: a CPU gives it the memory for it at the first token."""
_LAYER = re.compile(r"past_key_values\.(\d+)\.")


class SlidingCache:
    """Which entries the layers with a sliding window hold: those of the whole cache from `start` on.

    They are cut between inferences and rarely: within the graph every token would copy them, and the CPU plugin fuses
    attention only with a cache that grows.
    """

    def __init__(self, traits: DecoderTraits) -> None:
        assert traits.sliding_window
        self._window, self._layers = traits.sliding_window, traits.sliding_layers
        self.start = 0

    def holds(self, variable: str) -> bool:
        """Tell whether a state is that of a layer with a sliding window, by its name."""
        layer = _LAYER.match(variable)
        return layer is not None and int(layer[1]) in self._layers

    def is_long(self, entries: int) -> bool:
        """Tell whether it should be cut, where the whole cache has so many entries."""
        return entries - self.start >= _MOST_GROWTH * (self._window + MOST_REWOUND)

    def has_window(self, length: int, mask: npt.NDArray[np.int64]) -> bool:
        """Tell whether it has what the token after the first `length` attends to; `mask` `(1, T)` is the cache's."""
        dropped = int(mask[0, : self.start].sum())
        return not dropped or length - dropped >= self._window - 1

    def cut(self, live: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return which of its entries are left when the whole cache keeps those at `live` alone; note them."""
        held = live[live >= self.start][-(self._window + MOST_REWOUND) :]
        kept = held - self.start
        self.start = len(live) - len(held)
        return kept


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
