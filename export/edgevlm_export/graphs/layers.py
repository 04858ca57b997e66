"""The layers that encoders and decoders share. Shapes: B batch, S sequence, D channels, H heads, d head size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.stages import Output
from edgevlm_export.source.safetensors_reader import Stored, Weights, concatenate

if TYPE_CHECKING:
    import openvino as ov


class Constants:
    """A checkpoint's tensors as graph constants; `widen` makes matrices float32, else they keep their 16 bits."""

    def __init__(self, weights: Weights, *, widen: bool) -> None:
        self._weights = weights
        self._widen = widen
        self._held: list[Stored] = []

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def vector(self, *names: str) -> npt.NDArray[np.float32]:
        """Return a norm's weights or a bias, or several joined, as float32."""
        return concatenate([self._weights.take(name) for name in names]).float32()

    def matrix(self, *names: str) -> Output:
        """Return a weight matrix, or several with their rows joined, computed with as float32."""
        stored = concatenate([self._weights.take(name) for name in names])
        if self._widen:
            stored = Stored(stored.float32(), "f32")
        self._held.append(stored)  # a constant shares the array's memory and does not keep it
        return _constant(stored, names[0])

    def release(self) -> None:
        """Give back the memory of all constants made so far; the graphs that hold them must be gone."""
        self._held.clear()
        self._weights.release()


def _constant(stored: Stored, name: str) -> Output:
    openvino = import_openvino()
    kind = getattr(openvino.Type, stored.kind)
    node = openvino.op.Constant(openvino.Tensor(stored.array, list(stored.array.shape), kind), True)
    node.set_friendly_name(name)
    if stored.kind == "f32":
        return node.output(0)
    convert = openvino.opset13.convert(node, "f32")
    convert.set_friendly_name(f"{name}/convert")
    return convert.output(0)


def named(node: ov.Node, name: str) -> ov.Node:
    """Return the node with its friendly name set."""
    node.set_friendly_name(name)
    return node


def linear(x: Output, constants: Constants, *modules: str) -> ov.Node:
    """x W^T + b: `(B, S, D)` -> `(B, S, sum of the modules' rows)`; several modules of one input are one product."""
    opset = import_openvino().opset13
    weight = constants.matrix(*(f"{module}.weight" for module in modules))
    y = named(opset.matmul(x, weight, False, True), modules[0])
    if f"{modules[0]}.bias" not in constants:
        return y
    bias = constants.vector(*(f"{module}.bias" for module in modules))
    return named(opset.add(y, bias.reshape(1, 1, -1)), f"{modules[0]}/bias")


def rms_norm(x: Output, constants: Constants, module: str, eps: float) -> ov.Node:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    opset = import_openvino().opset13
    square = opset.power(x, np.float32(2))
    mean = opset.reduce_mean(square, np.array([-1]), keep_dims=True)
    scale = opset.divide(np.float32(1), opset.sqrt(opset.add(mean, np.float32(eps))))
    weight = constants.vector(f"{module}.weight")
    return named(opset.multiply(opset.multiply(x, scale), weight), module)


def layer_norm(x: Output, constants: Constants, module: str, eps: float) -> ov.Node:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last axis."""
    opset = import_openvino().opset13
    normal = opset.mvn(x, opset.constant(np.array([-1], np.int64)), True, float(eps), "inside_sqrt")
    scaled = opset.multiply(normal, constants.vector(f"{module}.weight").reshape(1, 1, -1))
    return named(opset.add(scaled, constants.vector(f"{module}.bias").reshape(1, 1, -1)), module)


def activation(x: Output, name: str) -> ov.Node:
    """The activation function that a config calls `name`."""
    opset = import_openvino().opset13
    if name in ("silu", "swish"):
        return opset.swish(x)
    if name in ("gelu_pytorch_tanh", "gelu_new"):
        return opset.gelu(x, "tanh")
    if name == "gelu":
        return opset.gelu(x, "erf")
    if name == "quick_gelu":
        return opset.swish(x, np.float32(1.702))
    assert name == "relu", name
    return opset.relu(x)


ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh", "gelu_new", "gelu", "quick_gelu", "relu")


def split(x: Output, widths: Sequence[int]) -> Sequence[Output]:
    """Split the last axis."""
    opset = import_openvino().opset13
    return list(opset.variadic_split(x, np.int64(-1), np.asarray(widths, np.int64)).outputs())


def to_heads(x: Output, heads: int, head_dim: int) -> ov.Node:
    """`(B, S, H*d)` -> `(B, H, S, d)`."""
    opset = import_openvino().opset13
    return opset.transpose(per_head(x, heads, head_dim), np.array([0, 2, 1, 3]))


def per_head(x: Output, heads: int, head_dim: int) -> ov.Node:
    """`(B, S, H*d)` -> `(B, S, H, d)`."""
    return import_openvino().opset13.reshape(x, np.array([0, 0, heads, head_dim]), special_zero=True)


def from_heads(x: Output, width: int) -> ov.Node:
    """`(B, H, S, d)` -> `(B, S, H*d)`."""
    opset = import_openvino().opset13
    return opset.reshape(opset.transpose(x, np.array([0, 2, 1, 3])), np.array([0, 0, width]), special_zero=True)


def dimension(x: Output, axis: int) -> ov.Node:
    """Return the length of one axis, a scalar int64."""
    opset = import_openvino().opset13
    return opset.gather(opset.shape_of(x), np.int64(axis), np.int64(0))


def embedding(ids: Output, constants: Constants, module: str) -> ov.Node:
    """Rows of a table: int64 `(B, S)` -> `(B, S, D)`."""
    opset = import_openvino().opset13
    return named(opset.gather(constants.matrix(f"{module}.weight"), opset.convert(ids, "i32"), np.int32(0)), module)


def repeated(row: npt.NDArray[np.float32], like: Output) -> ov.Node:
    """One vector `(D,)` for each sequence of a batch: `(B, 1, D)`, B that of `like` `(B, S, D)`."""
    opset = import_openvino().opset13
    batch = opset.unsqueeze(dimension(like, 0), np.int64(0))
    return opset.broadcast(row.reshape(1, 1, -1), opset.concat([batch, np.array([1, row.size])], 0))


def attention_bias(allowed: Output) -> ov.Node:
    """0 where a boolean is true, and a number that softmax turns to 0 elsewhere."""
    opset = import_openvino().opset13
    return opset.select(allowed, np.float32(0), np.float32(-65504))


def constant(value: Any) -> ov.Node:
    """Return an array as a constant."""
    return import_openvino().opset13.constant(value)
