"""A vision transformer as SigLIP has it: patches by a convolution, learned positions, pre-norm blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.layers import (
    Constants,
    activation,
    attention_bias,
    embedding,
    from_heads,
    layer_norm,
    linear,
    named,
    split,
    to_heads,
)
from edgevlm_export.graphs.stages import Block, Flow

if TYPE_CHECKING:
    import openvino as ov

    from edgevlm_export.graphs.stages import Output


@dataclass(frozen=True)
class VisionTransformer:
    """The sizes of a vision transformer, named as Hugging Face configs name them."""

    prefix: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str

    @property
    def side(self) -> int:
        """Patches in a row of the picture."""
        return self.image_size // self.patch_size

    def layer(self, index: int) -> str:
        """Return what the names of a layer's weights begin with."""
        return f"{self.prefix}.encoder.layers.{index}"


def shapes(vision: VisionTransformer) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor that the transformer has in a checkpoint."""
    hidden, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    embeddings = f"{vision.prefix}.embeddings"
    yield f"{embeddings}.patch_embedding.weight", (hidden, vision.num_channels, patch, patch)
    yield f"{embeddings}.patch_embedding.bias", (hidden,)
    yield f"{embeddings}.position_embedding.weight", (vision.side**2, hidden)
    for index in range(vision.num_hidden_layers):
        at = vision.layer(index)
        square = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
        for module, shape in {**square, "mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}.items():
            yield f"{at}.{module}.weight", shape
            yield f"{at}.{module}.bias", shape[:1]
        for module in ("layer_norm1", "layer_norm2"):
            yield f"{at}.{module}.weight", (hidden,)
            yield f"{at}.{module}.bias", (hidden,)
    yield f"{vision.prefix}.post_layernorm.weight", (hidden,)
    yield f"{vision.prefix}.post_layernorm.bias", (hidden,)


def blocks(vision: VisionTransformer, constants: Constants) -> list[Block]:
    """Return patches, layers and last norm: pixel_values -> hidden_states `(B, P, D)`."""
    hidden = vision.hidden_size
    in_layer = hidden * (4 * hidden + 2 * vision.intermediate_size)
    layers = [
        Block(lambda flow, index=index: encoder_layer(flow, vision, constants, index), in_layer)  # type: ignore[misc]
        for index in range(vision.num_hidden_layers)
    ]

    def last_norm(flow: Flow) -> None:
        at = f"{vision.prefix}.post_layernorm"
        flow["hidden_states"] = layer_norm(flow["hidden_states"], constants, at, vision.layer_norm_eps)

    return [Block(lambda flow: patches(flow, vision, constants)), *layers, Block(last_norm)]


def patches(flow: Flow, vision: VisionTransformer, constants: Constants) -> None:
    """Each patch as a vector with its place added; patches that are padding may not be attended to."""
    opset = import_openvino().opset13
    at = f"{vision.prefix}.embeddings"
    weight = constants.matrix(f"{at}.patch_embedding.weight")
    side, none = [vision.patch_size] * 2, [0, 0]
    grid = opset.convolution(flow["pixel_values"], weight, side, none, none, [1, 1])  # (B, D, rows, columns)
    grid = opset.add(grid, constants.vector(f"{at}.patch_embedding.bias").reshape(1, -1, 1, 1))
    row = opset.reshape(grid, np.array([0, vision.hidden_size, -1]), special_zero=True)
    row = opset.transpose(row, np.array([0, 2, 1]))
    places = embedding(flow["patch_position_ids"], constants, f"{at}.position_embedding")
    flow["hidden_states"] = named(opset.add(row, places), at)
    seen = opset.reshape(flow["patch_attention_mask"], np.array([0, 1, 1, -1]), special_zero=True)  # (B, 1, 1, P)
    flow["attention_bias"] = attention_bias(seen)


def encoder_layer(flow: Flow, vision: VisionTransformer, constants: Constants, index: int) -> None:
    """Attention and MLP, each behind a LayerNorm and added to what came in."""
    opset = import_openvino().opset13
    at, x = vision.layer(index), flow["hidden_states"]
    normal = layer_norm(x, constants, f"{at}.layer_norm1", vision.layer_norm_eps)
    x = opset.add(x, attention(normal, flow, vision, constants, f"{at}.self_attn"))
    normal = layer_norm(x, constants, f"{at}.layer_norm2", vision.layer_norm_eps)
    inner = activation(linear(normal, constants, f"{at}.mlp.fc1"), vision.hidden_act)
    flow["hidden_states"] = named(opset.add(x, linear(inner, constants, f"{at}.mlp.fc2")), at)


def attention(x: Output, flow: Flow, vision: VisionTransformer, constants: Constants, at: str) -> ov.Node:
    """Every patch attends to every patch; to none that is padding, where there may be any."""
    opset = import_openvino().opset13
    heads, width = vision.num_attention_heads, vision.hidden_size
    qkv = linear(x, constants, *(f"{at}.{name}_proj" for name in "qkv"))
    q, k, v = (to_heads(each, heads, width // heads) for each in split(qkv, [width] * 3))
    scale = np.float32((width // heads) ** -0.5)
    bias = flow.values.get("attention_bias")
    mixed = opset.scaled_dot_product_attention(q, k, v, bias, scale, causal=False)
    return linear(from_heads(mixed, width), constants, f"{at}.out_proj")
