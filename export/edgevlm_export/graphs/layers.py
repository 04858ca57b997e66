"""The layers that encoders and decoders share. Shapes: B batch, S sequence, D channels, H heads, d head size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.modules import Embedding, Linear, Norm, PatchConvolution

if TYPE_CHECKING:
    import openvino as ov


def linear(x: Output, constants: Constants, *modules: Linear) -> ov.Node:
    """x W^T + b: `(B, S, D)` -> `(B, S, sum of the modules' rows)`; several modules of one input are one product."""
    opset = import_openvino().opset13
    first, names = modules[0], [module.name for module in modules]
    weight = constants.matrix(*(f"{name}.weight" for name in names))
    y = named(opset.matmul(x, weight, False, True), first.name)
    if not first.bias:
        return y
    bias = constants.vector(*(f"{name}.bias" for name in names))
    return named(opset.add(y, bias.reshape(1, 1, -1)), f"{first.name}/bias")


def rms_norm(x: Output, constants: Constants, norm: Norm) -> ov.Node:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis; 1 + weight for a norm with `unit_offset`."""
    opset = import_openvino().opset13
    square = opset.power(x, np.float32(2))
    mean = opset.reduce_mean(square, np.array([-1]), keep_dims=True)
    scale = opset.divide(np.float32(1), opset.sqrt(opset.add(mean, np.float32(norm.eps))))
    if not norm.scaled:
        return named(opset.multiply(x, scale), norm.name)
    weight = constants.vector(f"{norm.name}.weight")
    if norm.unit_offset:
        weight = weight + np.float32(1)
    return named(opset.multiply(opset.multiply(x, scale), weight), norm.name)


def layer_norm(x: Output, constants: Constants, norm: Norm) -> ov.Node:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last axis."""
    opset = import_openvino().opset13
    normal = opset.mvn(x, opset.constant(np.array([-1], np.int64)), True, float(norm.eps), "inside_sqrt")
    scaled = opset.multiply(normal, constants.vector(f"{norm.name}.weight").reshape(1, 1, -1))
    return named(opset.add(scaled, constants.vector(f"{norm.name}.bias").reshape(1, 1, -1)), norm.name)


def patch_embedding(pixel_values: Output, constants: Constants, patches: PatchConvolution) -> ov.Node:
    """Each patch as a vector: `(B, C, H, W)` -> `(B, P, D)`, row by row."""
    opset = import_openvino().opset13
    weight = constants.matrix(f"{patches.name}.weight")
    grid = opset.convolution(pixel_values, weight, [patches.size] * 2, [0, 0], [0, 0], [1, 1])  # (B, D, rows, columns)
    if patches.bias:
        grid = opset.add(grid, constants.vector(f"{patches.name}.bias").reshape(1, -1, 1, 1))
    row = opset.reshape(grid, np.array([0, patches.hidden, -1]), special_zero=True)
    return opset.transpose(row, np.array([0, 2, 1]))


def scaled(x: Output, factor: float) -> Output:
    """Return x * factor, `x` itself where that is 1."""
    return x if factor == 1 else import_openvino().opset13.multiply(x, np.float32(factor)).output(0)


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


def embedding(ids: Output, constants: Constants, table: Embedding) -> ov.Node:
    """Rows of a table: int64 `(B, S)` -> `(B, S, D)`."""
    opset = import_openvino().opset13
    weight = constants.matrix(f"{table.name}.weight")
    rows = opset.gather(weight, opset.convert(ids, "i32"), np.int32(0))
    if table.scale != 1:
        rows = opset.multiply(rows, constants.rounded(table.scale, f"{table.name}.weight"))
    return named(rows, table.name)


def repeated(row: npt.NDArray[np.float32], like: Output) -> ov.Node:
    """One vector `(D,)` for each sequence of a batch: `(B, 1, D)`, B that of `like` `(B, S, D)`."""
    opset = import_openvino().opset13
    batch = opset.unsqueeze(dimension(like, 0), np.int64(0))
    return opset.broadcast(row.reshape(1, 1, -1), opset.concat([batch, np.array([1, row.size])], 0))


def attention_bias(allowed: Output) -> ov.Node:
    """0 where a boolean is true, and a number that softmax turns to 0 elsewhere."""
    opset = import_openvino().opset13
    return opset.select(allowed, np.float32(0), np.float32(-65504))
