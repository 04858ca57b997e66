"""A vision transformer on packed patches, as the Qwen-VL models and Pixtral have it.

A picture comes in its own size, as a row of patches: `merge` x `merge` neighbours follow each other, so that every
`merge`^2 rows become one image token at the end. Shapes: N patches, M = N / merge^2 image tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.decoder import GatedMLP, deepstack_name, gated_mlp
from edgevlm_export.graphs.layers import (
    activation,
    attention_bias,
    dimension,
    embedding,
    from_heads,
    layer_norm,
    linear,
    per_head,
    rms_norm,
    split,
    to_heads,
)
from edgevlm_export.graphs.modules import Embedding, FrameConvolution, Linear, Norm, PatchConvolution
from edgevlm_export.graphs.rope import Rope, make_rope, rotate, rotations
from edgevlm_export.graphs.stages import Stage, Values

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True)
class PlainMLP:
    """fc2(act(fc1(x)))."""

    fc1: Linear
    fc2: Linear
    hidden_act: str


@dataclass(frozen=True)
class Block:
    """Attention and MLP, each behind a norm and added to what came in."""

    name: str
    norm1: Norm
    qkv: tuple[Linear, ...]
    """Rows of q, then of k, then of v, of one module or of three."""
    proj: Linear
    norm2: Norm
    mlp: PlainMLP | GatedMLP
    windowed: bool = False
    """Patches attend to those of their window alone."""
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    """RMSNorms over each head's channels, before the rotation."""


@dataclass(frozen=True)
class Merger:
    """Makes one image token of `merge`^2 patches: a norm, before or after they are joined, and an MLP of two layers."""

    norm: Norm
    mlp: PlainMLP
    joins_first: bool = False


@dataclass(frozen=True)
class PackedTransformer:
    """A vision transformer on packed patches, its merger, and mergers of earlier layers' outputs."""

    patch_embedding: FrameConvolution | PatchConvolution
    positions: Embedding | None
    """A table of learned positions, of which each patch gets a weighted sum of four."""
    blocks: tuple[Block, ...]
    merger: Merger | None
    """None where `packed_stages` ends with the hidden states."""
    deepstack: tuple[tuple[int, Merger], ...]
    """After which blocks other mergers read the hidden states, in order."""
    num_heads: int
    merge: int
    rope: Rope
    """Its positions are a patch's row and column."""
    window: int = 0
    """Patches of a whole window, of a transformer with windowed blocks."""
    pre_norm: Norm | None = None
    """Before the first block."""
    post_norm: Norm | None = None
    """After the last block."""

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        return self.patch_embedding.hidden

    @property
    def windowed(self) -> bool:
        """Whether any block attends within windows."""
        return any(block.windowed for block in self.blocks)

    @property
    def inputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The graph's inputs: name to element type and shape."""
        inputs: dict[str, tuple[str, tuple[int, ...]]] = {
            "pixel_values": ("f32", (-1, -1, self.patch_embedding.values)),
            "patch_positions": ("i64", (-1, -1, 2)),
        }
        if self.positions:
            inputs |= {"table_indices": ("i64", (-1, 4, -1)), "table_weights": ("f32", (-1, 4, -1))}
        if self.windowed:
            inputs |= {"window_index": ("i64", (-1, -1)), "window_ids": ("i64", (-1, -1))}
        return inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs."""
        return ("image_embeds", *(deepstack_name(number) for number in range(len(self.deepstack))))


def axial_rope(head_dim: int, theta: float) -> Rope:
    """Return the rotation of the first half of each head's pairs by the row, and of the second half by the column."""
    quarter = head_dim // 4
    frequencies = make_rope(head_dim // 2, theta, None, 0).frequencies
    return Rope(np.concatenate([frequencies, frequencies]), axes=(0,) * quarter + (1,) * quarter)


def packed_stages(vision: PackedTransformer) -> list[Stage]:
    """Return the stages from pixel_values `(B, N, values of a patch)` to the outputs, each `(B, M, D)`.

    Without a merger they end with hidden_states `(B, N, D)`.
    """
    stages = [Stage(partial(embed_patches, vision), (vision.patch_embedding, vision.positions, vision.pre_norm))]
    stages.append(Stage(partial(place_patches, vision)))
    mergers = {after: (deepstack_name(number), each) for number, (after, each) in enumerate(vision.deepstack)}
    for index, block in enumerate(vision.blocks):
        stages.append(Stage(partial(transformer_block, vision, block), (block,)))
        if index in mergers:
            name, merger = mergers[index]
            stages.append(Stage(partial(merge_patches, vision, merger, name), (merger,)))
    if vision.post_norm:
        stages.append(Stage(partial(normalise, vision.post_norm), (vision.post_norm,)))
    if vision.merger:
        stages.append(Stage(partial(merge_patches, vision, vision.merger, "image_embeds"), (vision.merger,)))
    return stages


def embed_patches(vision: PackedTransformer, values: Values, constants: Constants) -> None:
    """Set each patch as a vector, its learned position added."""
    opset = import_openvino().opset13
    patches = vision.patch_embedding
    x = named(
        opset.matmul(values["pixel_values"], constants.kernel(f"{patches.name}.weight"), False, True), patches.name
    )
    if patches.bias:
        x = opset.add(x, constants.vector(f"{patches.name}.bias").reshape(1, 1, -1))
    if vision.positions:
        corners = embedding(values["table_indices"], constants, vision.positions)  # (B, 4, N, D)
        weights = opset.unsqueeze(values["table_weights"], np.int64(-1))
        x = opset.add(x, opset.reduce_sum(opset.multiply(corners, weights), np.array([1]), keep_dims=False))
    values["hidden_states"] = norm(x, constants, vision.pre_norm) if vision.pre_norm else x


def place_patches(vision: PackedTransformer, values: Values, constants: Constants) -> None:  # noqa: ARG001
    """Set what all blocks share, cosines and sines, and put the patches in the order of their windows."""
    positions = values["patch_positions"]
    if vision.windowed:
        index = values["window_index"]
        values["hidden_states"] = permuted(values["hidden_states"], index, vision.hidden_size, vision.merge**2)
        positions = permuted(positions, index, 2, vision.merge**2)
        fill_windows(vision, values)
        padded = in_windows(positions, vision, values, 2)
        values["window_cos"], values["window_sin"] = axial_rotations(padded, vision.rope)
    values["cos"], values["sin"] = axial_rotations(positions, vision.rope)


def axial_rotations(positions: Output, rope: Rope) -> tuple[ov.Node, ov.Node]:
    """Return cosine and sine `(B, 1, N, head_dim)` of rows and columns `(B, N, 2)`."""
    return rotations(import_openvino().opset13.transpose(positions, np.array([2, 0, 1])), rope)


def fill_windows(vision: PackedTransformer, values: Values) -> None:
    """Set where patches lie once every window is filled up to W = `window` places, so that windows make a batch.

    Of V windows a picture has P = V * W places. `window_patches` `(B, P)` is the patch at each place, the first where
    there is none, `window_places` `(B, N)` the place of each patch, and `window_bias` `(B * V, 1, 1, W)` hides places
    without one. A mask of all patches by all would have the square of N values.
    """
    opset = import_openvino().opset13
    ids = values["window_ids"]
    shape = opset.shape_of(ids)
    patches = opset.broadcast(opset.range(np.int64(0), dimension(ids, 1), np.int64(1), "i64"), shape)
    axis = np.int64(1)
    firsts = opset.scatter_elements_update(patches, ids, patches, axis, reduction="min", use_init_val=False)
    within = opset.subtract(patches, opset.gather(firsts, ids, axis, 1))
    places = opset.add(opset.multiply(ids, np.int64(vision.window)), within)
    count = opset.add(opset.reduce_max(ids, np.array([0, 1]), keep_dims=False), np.int64(1))
    length = opset.multiply(count, np.int64(vision.window))
    nothing = opset.broadcast(np.int64(0), stacked(dimension(ids, 0), length))
    filled = opset.scatter_elements_update(nothing, places, opset.broadcast(np.int64(1), shape), axis)
    values["window_patches"] = opset.scatter_elements_update(nothing, places, patches, axis)
    values["window_places"] = places
    filled = opset.reshape(filled, np.array([-1, 1, 1, vision.window]), special_zero=False)
    values["window_bias"] = attention_bias(opset.equal(filled, np.int64(1)))


def stacked(*lengths: Output | np.int64) -> ov.Node:
    """Return scalars as a shape."""
    opset = import_openvino().opset13
    return opset.concat([opset.unsqueeze(each, np.int64(0)) for each in lengths], 0)


def in_windows(x: Output, vision: PackedTransformer, values: Values, width: int) -> ov.Node:
    """`(B, N, width)` -> `(B * V, W, width)`, each window a row of the batch."""
    opset = import_openvino().opset13
    padded = permuted(x, values["window_patches"], width)
    return opset.reshape(padded, np.array([-1, vision.window, width]), special_zero=False)


def out_of_windows(x: Output, values: Values, width: int) -> ov.Node:
    """`(B * V, W, width)` -> `(B, N, width)`."""
    opset = import_openvino().opset13
    places = values["window_places"]
    joined = opset.reshape(x, stacked(dimension(places, 0), np.int64(-1), np.int64(width)), special_zero=False)
    return opset.gather(joined, places, np.int64(1), 1)


def permuted(x: Output, index: Output, width: int, count: int = 1) -> ov.Node:
    """Return groups of `count` rows of `x` `(B, count * M, width)` in the order of `index` `(B, M)`."""
    opset = import_openvino().opset13
    groups = opset.reshape(x, np.array([0, -1, count * width]), special_zero=True)
    groups = opset.gather(groups, index, np.int64(1), 1)
    return opset.reshape(groups, np.array([0, -1, width]), special_zero=True)


def inverse(index: Output) -> ov.Node:
    """Return the permutations `(B, M)` that undo those of `index`."""
    opset = import_openvino().opset13
    count = opset.range(np.int64(0), dimension(index, 1), np.int64(1), "i64")
    return opset.scatter_elements_update(index, index, opset.broadcast(count, opset.shape_of(index)), np.int64(1))


def transformer_block(vision: PackedTransformer, block: Block, values: Values, constants: Constants) -> None:
    """Set `hidden_states` after one block."""
    opset = import_openvino().opset13
    x = values["hidden_states"]
    x = opset.add(x, attention(norm(x, constants, block.norm1), vision, block, values, constants))
    normal = norm(x, constants, block.norm2)
    inner = (
        gated_mlp(normal, block.mlp, constants)
        if isinstance(block.mlp, GatedMLP)
        else plain_mlp(normal, block.mlp, constants)
    )
    values["hidden_states"] = named(opset.add(x, inner), block.name)


def norm(x: Output, constants: Constants, module: Norm) -> ov.Node:
    """LayerNorm where the module has a bias, else RMSNorm."""
    return (layer_norm if module.bias else rms_norm)(x, constants, module)


def normalise(module: Norm, values: Values, constants: Constants) -> None:
    """Set `hidden_states` after a norm."""
    values["hidden_states"] = norm(values["hidden_states"], constants, module)


def plain_mlp(x: Output, mlp: PlainMLP, constants: Constants) -> ov.Node:
    """fc2(act(fc1(x)))."""
    return linear(activation(linear(x, constants, mlp.fc1), mlp.hidden_act), constants, mlp.fc2)


def attention(x: Output, vision: PackedTransformer, block: Block, values: Values, constants: Constants) -> ov.Node:
    """Every patch attends to every patch, or to those of its window; q and k are rotated by row and column."""
    opset = import_openvino().opset13
    heads, width = vision.num_heads, vision.hidden_size
    head_dim = width // heads
    x, prefix, bias = linear(x, constants, *block.qkv), "", np.zeros((1, 1), np.float32)
    if block.windowed:
        x, prefix, bias = in_windows(x, vision, values, 3 * width), "window_", values["window_bias"]
    q, k, v = split(x, [width] * 3)
    if block.q_norm and block.k_norm:
        q, k = (
            rms_norm(per_head(each, heads, head_dim), constants, module)
            for each, module in ((q, block.q_norm), (k, block.k_norm))
        )
    q, k, v = (to_heads(each, heads, head_dim) for each in (q, k, v))
    cos, sin = values[f"{prefix}cos"], values[f"{prefix}sin"]
    q, k = (rotate(each, cos, sin, head_dim) for each in (q, k))
    mixed = opset.scaled_dot_product_attention(q, k, v, bias, np.float32(head_dim**-0.5), causal=False)
    x = from_heads(mixed, width)
    return linear(out_of_windows(x, values, width) if block.windowed else x, constants, block.proj)


def merge_patches(vision: PackedTransformer, merger: Merger, name: str, values: Values, constants: Constants) -> None:
    """Set the value `name`: one image token for every `merge`^2 patches, in the order in which the patches came."""
    opset = import_openvino().opset13
    joined = np.array([0, -1, vision.hidden_size * vision.merge**2])
    x = values["hidden_states"]
    if merger.joins_first:
        x = norm(opset.reshape(x, joined, special_zero=True), constants, merger.norm)
    else:
        x = opset.reshape(norm(x, constants, merger.norm), joined, special_zero=True)
    x = plain_mlp(x, merger.mlp, constants)
    if vision.windowed:
        x = permuted(x, inverse(values["window_index"]), merger.mlp.fc2.rows)
    values[name] = x
