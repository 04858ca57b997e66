"""The vision transformer of Gemma 4: patches of a picture in its own size, with linears that clip what they see.

Patches come in the order of the image tokens that they become: `pooled`^2 neighbours follow each other and are averaged
at the end. Shapes: N patches, M = N / pooled^2 image tokens, D channels, H heads, d channels of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.layers import activation, from_heads, linear, per_head, rms_norm, split, to_heads
from edgevlm_export.graphs.modules import Linear, Norm, Shape, Tensor
from edgevlm_export.graphs.rope import make_rope, rotate, rotations
from edgevlm_export.graphs.stages import Stage, Values

if TYPE_CHECKING:
    import openvino as ov

_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


@dataclass(frozen=True)
class ClippedLinear:
    """x W^T, whose input and output are clipped to bounds of the checkpoint."""

    name: str
    rows: int
    columns: int
    clipped: bool

    @property
    def linear(self) -> Linear:
        """The product."""
        return Linear(f"{self.name}.linear", self.rows, self.columns)

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield names and shapes."""
        yield from self.linear.tensors()
        if self.clipped:
            yield from ((f"{self.name}.{bound}", ()) for bound in _BOUNDS)


@dataclass(frozen=True)
class Block:
    """Attention and a gated MLP, each between two norms and added to what came in."""

    name: str
    norms: tuple[Norm, Norm, Norm, Norm]
    """Before attention, after it, before the MLP, after it."""
    q_proj: ClippedLinear
    k_proj: ClippedLinear
    v_proj: ClippedLinear
    o_proj: ClippedLinear
    head_norms: tuple[Norm, Norm, Norm]
    """Of each head of queries, keys and values."""
    gate_proj: ClippedLinear
    up_proj: ClippedLinear
    down_proj: ClippedLinear


@dataclass(frozen=True)
class Gemma4ViT:
    """A vision transformer and its projection to the decoder's channels."""

    input_proj: Linear
    positions: Tensor
    """`(2, P, D)`: a vector for each column, and one for each row."""
    blocks: tuple[Block, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    theta: float
    hidden_act: str
    pooled: int
    standard: tuple[Tensor, Tensor] | None
    """Bias and scale of the pooled vectors."""
    norm: Norm
    projection: Linear

    @property
    def inputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The graph's inputs: name to element type and shape."""
        return {
            "pixel_values": ("f32", (-1, -1, self.input_proj.columns)),
            "patch_positions": ("i64", (-1, -1, 2)),  # column and row
        }


def vision_stages(vision: Gemma4ViT) -> list[Stage]:
    """Return the stages from pixel_values `(B, N, values of a patch)` to image_embeds `(B, M, D of the decoder)`."""
    blocks = [Stage(partial(transformer_block, vision, block), (block,)) for block in vision.blocks]
    start = Stage(partial(embed_patches, vision), (vision.input_proj, vision.positions))
    return [start, *blocks, Stage(partial(project, vision), (vision.standard, vision.norm, vision.projection))]


def embed_patches(vision: Gemma4ViT, values: Values, constants: Constants) -> None:
    """Set each patch as a vector, its place added, and the cosines and sines of its column and row."""
    opset = import_openvino().opset13
    pixels = opset.multiply(opset.subtract(values["pixel_values"], np.float32(0.5)), np.float32(2))
    rows = np.array([0, vision.positions.shape[1]])  # where columns and rows begin in the joined table
    places = opset.convert(opset.add(values["patch_positions"], rows), "i32")
    vectors = opset.gather(constants.table(vision.positions.name), places, np.int32(0))  # (B, N, 2, D)
    x = linear(pixels, constants, vision.input_proj)
    values["hidden_states"] = opset.add(x, opset.reduce_sum(vectors, np.array([2]), keep_dims=False))
    rope = make_rope(vision.head_dim // 2, vision.theta, None, 0)
    for axis in range(2):
        place = opset.gather(values["patch_positions"], np.int64(axis), np.int64(2))
        values[f"cos.{axis}"], values[f"sin.{axis}"] = rotations(place, rope)


def transformer_block(vision: Gemma4ViT, block: Block, values: Values, constants: Constants) -> None:
    """Set `hidden_states` after one block."""
    opset = import_openvino().opset13
    x, norms = values["hidden_states"], block.norms
    mixed = attention(rms_norm(x, constants, norms[0]), vision, block, values, constants)
    x = opset.add(x, rms_norm(mixed, constants, norms[1]))
    normal = rms_norm(x, constants, norms[2])
    gate = activation(clipped_linear(normal, block.gate_proj, constants), vision.hidden_act)
    inner = opset.multiply(gate, clipped_linear(normal, block.up_proj, constants))
    y = rms_norm(clipped_linear(inner, block.down_proj, constants), constants, norms[3])
    values["hidden_states"] = named(opset.add(x, y), block.name)


def attention(x: Output, vision: Gemma4ViT, block: Block, values: Values, constants: Constants) -> ov.Node:
    """Every patch attends to every patch; half of each head's channels turn by the column, half by the row."""
    opset, head_dim = import_openvino().opset13, vision.head_dim
    heads = (vision.num_heads, vision.num_kv_heads, vision.num_kv_heads)
    projections = (block.q_proj, block.k_proj, block.v_proj)
    parts = []
    for each, count, norm in zip(projections, heads, block.head_norms, strict=True):
        own = per_head(clipped_linear(x, each, constants), count, head_dim)
        parts.append(to_heads(rms_norm(own, constants, norm), count, head_dim))
    q, k, v = parts
    q, k = axially_rotated(q, head_dim, values), axially_rotated(k, head_dim, values)
    bias = np.zeros((1, 1), np.float32)
    seen = opset.scaled_dot_product_attention(q, k, v, bias, np.float32(1), causal=False)
    return clipped_linear(from_heads(seen, vision.num_heads * head_dim), block.o_proj, constants)


def axially_rotated(x: Output, head_dim: int, values: Values) -> ov.Node:
    """Rotate the first half of the channels of `(B, H, N, d)` by the column, the second by the row."""
    half = head_dim // 2
    halves = enumerate(split(x, [half] * 2))
    turned = [rotate(each, values[f"cos.{axis}"], values[f"sin.{axis}"], half) for axis, each in halves]
    return import_openvino().opset13.concat(turned, -1)


def clipped_linear(x: Output, module: ClippedLinear, constants: Constants) -> ov.Node:
    """Clip, multiply, clip."""
    if not module.clipped:
        return linear(x, constants, module.linear)
    low, high, least, most = (float(constants.vector(f"{module.name}.{bound}")) for bound in _BOUNDS)
    return clipped(linear(clipped(x, low, high), constants, module.linear), least, most)


def clipped(x: Output, low: float, high: float) -> Output:
    """Return x within the bounds; infinite ones, which no IR holds, are the largest float32."""
    largest = float(np.finfo(np.float32).max)
    return import_openvino().opset13.clamp(x, max(low, -largest), min(high, largest))


def project(vision: Gemma4ViT, values: Values, constants: Constants) -> None:
    """Set `image_embeds`: the average of every `pooled`^2 patches, times the root of their width, projected."""
    opset = import_openvino().opset13
    width = vision.input_proj.rows
    x = opset.reshape(values["hidden_states"], np.array([0, -1, vision.pooled**2, width]), special_zero=True)
    x = opset.multiply(opset.reduce_mean(x, np.array([2]), keep_dims=False), np.float32(width**0.5))
    if vision.standard:
        bias, scale = (constants.vector(each.name) for each in vision.standard)
        x = opset.multiply(opset.subtract(x, bias), scale)
    values["image_embeds"] = linear(rms_norm(x, constants, vision.norm), constants, vision.projection)
