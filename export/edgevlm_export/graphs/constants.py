"""A checkpoint's tensors as constants of a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.runtime.core import import_openvino
from edgevlm_export.source.safetensors_reader import RawTensor, Weights, concatenate

if TYPE_CHECKING:
    import openvino as ov

Output: TypeAlias = Any
"""An `openvino.Output`."""


class Constants:
    """Makes constants of tensors by name; `upcast` stores matrices as float32, else they keep their 16 bits."""

    def __init__(self, weights: Weights, *, upcast: bool) -> None:
        self._weights = weights
        self._upcast = upcast
        self._keep_alive: list[RawTensor] = []

    def vector(self, *names: str) -> npt.NDArray[np.float32]:
        """Return a norm's weights, a bias, or several of them concatenated, as float32."""
        return concatenate([self._weights.get(name) for name in names]).float32()

    def matrix(self, *names: str) -> Output:
        """Return a weight matrix, or several with their rows concatenated; the graph computes with it in float32."""
        return self._shared(concatenate([self._weights.get(name) for name in names]), names[0])

    def transposed(self, name: str) -> Output:
        """Return a weight matrix that is stored as `(columns, rows)`, as `matrix` returns one."""
        tensor = self._weights.get(name)
        return self._shared(replace(tensor, array=np.ascontiguousarray(tensor.array.T)), name)

    def part(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Output:
        """Return some rows and columns of a weight matrix as `matrix` returns the whole."""
        tensor = self._weights.get(name)
        label = f"{name}/{rows.start or columns.start or 0}"
        return self._shared(replace(tensor, array=np.ascontiguousarray(tensor.array[rows, columns])), label)

    def table(self, name: str) -> Output:
        """Return a tensor as a table of the vectors along its last axis."""
        tensor = self._weights.get(name)
        return self._shared(replace(tensor, array=tensor.array.reshape(-1, tensor.array.shape[-1])), name)

    def kernel(self, name: str) -> Output:
        """Return a convolution's kernel as a matrix: a row for each channel that comes out."""
        tensor = self._weights.get(name)
        return self._shared(replace(tensor, array=tensor.array.reshape(len(tensor.array), -1)), name)

    def rounded(self, value: float, name: str) -> np.float32:
        """Return a number as the type of a stored tensor holds it."""
        return self._weights.get(name).rounded(value)

    def _shared(self, tensor: RawTensor, name: str) -> Output:
        if self._upcast:
            tensor = RawTensor(tensor.float32(), "f32")
        self._keep_alive.append(tensor)  # the constant shares the array's memory and does not own it
        return constant(tensor, name)

    def release(self) -> None:
        """Give back the memory of all constants made so far; no graph may hold one any more."""
        self._keep_alive.clear()
        self._weights.release()


def constant(tensor: RawTensor, name: str) -> Output:
    """Return a constant that shares the memory of a tensor and does not own it, in float32."""
    openvino = import_openvino()
    dtype = getattr(openvino.Type, tensor.dtype)
    node = openvino.op.Constant(openvino.Tensor(tensor.array, list(tensor.array.shape), dtype), True)
    node.set_friendly_name(name)
    if tensor.dtype == "f32":
        return node.output(0)
    convert = openvino.opset13.convert(node, "f32")
    return named(convert, f"{name}/convert").output(0)


def named(node: ov.Node, name: str) -> ov.Node:
    """Return the node with its friendly name set."""
    node.set_friendly_name(name)
    return node
