"""Copies of states that cannot be cut, such as a convolution's: a sequence goes back to a length that has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgevlm.runtime.core import import_openvino

if TYPE_CHECKING:
    import openvino as ov

MOST_SNAPSHOTS, MOST_BYTES = 16, 64 * 2**20
"""Bounds of the snapshots that one sequence keeps; the least recently used goes first."""
_FIXED = "cache_params."
"""What the names of states of a fixed size begin with, here as in optimum-intel's exports."""


class Snapshots:
    """Copies of the states of a fixed size of one infer request, by the length of the sequence that they belong to."""

    def __init__(self, request: ov.InferRequest) -> None:
        self._request = request
        self._kept: dict[int, list[npt.NDArray[Any]]] = {}  # least recently used first
        self._draft: int | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of one snapshot, 0 before the first."""
        return sum(state.nbytes for state in next(iter(self._kept.values()), []))

    def keep(self, length: int, *, for_draft: bool = False) -> None:
        """Keep the states as those of the first `length` entries; for a draft only until the next call."""
        if self._draft is not None:
            self._kept.pop(self._draft, None)
        self._draft = length if for_draft and length not in self._kept else None
        held = (
            self._kept.pop(length) if length in self._kept else [np.array(each.state.data) for each in self._states()]
        )
        self._kept[length] = held
        most = min(MOST_SNAPSHOTS, MOST_BYTES // max(1, self.size_bytes))
        while len(self._kept) > max(1, most):
            self._kept.pop(next(iter(self._kept)))

    def longest(self, length: int) -> int:
        """Return the greatest length of at most `length` that there is a snapshot of, 0 where there is none."""
        return max((each for each in self._kept if each <= length), default=0)

    def restore(self, length: int) -> None:
        """Bring back the states of that length, and drop the snapshots of longer sequences."""
        openvino = import_openvino()
        kept = self._kept[length] = self._kept.pop(length)
        for variable, state in zip(self._states(), kept, strict=True):
            variable.state = openvino.Tensor(state)
        self._kept = {each: states for each, states in self._kept.items() if each <= length}

    def clear(self) -> None:
        """Drop all."""
        self._kept.clear()

    def _states(self) -> list[ov.VariableState]:
        return [each for each in self._request.query_state() if is_fixed(each.name)]


def is_fixed(variable: str) -> bool:
    """Tell whether a state has a fixed size, by its name."""
    return variable.startswith(_FIXED)
