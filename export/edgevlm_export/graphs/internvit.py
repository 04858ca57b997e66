"""A vision transformer as InternVL has it: a class token before the patches, and branches scaled channel by channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs import vision_transformer
from edgevlm_export.graphs.layers import (
    Constants,
    activation,
    dimension,
    from_heads,
    layer_norm,
    linear,
    named,
    rms_norm,
    split,
    to_heads,
)
from edgevlm_export.graphs.stages import Block, Flow

if TYPE_CHECKING:
    import openvino as ov

    from edgevlm_export.graphs.stages import Output


@dataclass(frozen=True)
class InternViT(vision_transformer.VisionTransformer):
    """The sizes and choices of the transformer, named as Hugging Face configs name them."""

    attention_bias: bool = False
    use_qk_norm: bool = False
    rms: bool = False
    """Norms before attention and MLP are RMSNorms."""
    last_norm: bool = False
    """A LayerNorm follows the last layer."""
    positions: bool = True
    """Learned positions are added to the class token and the patches."""
    mask_token: bool = False
    """The checkpoint has the token that stands for masked patches in training."""

    def layer(self, index: int) -> str:
        """Return what the names of a layer's weights begin with."""
        return f"{self.prefix}.encoder.layer.{index}"


def shapes(vision: InternViT) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor that the transformer has in a checkpoint."""
    hidden, patch = vision.hidden_size, vision.patch_size
    embeddings = f"{vision.prefix}.embeddings"
    yield f"{embeddings}.cls_token", (1, 1, hidden)
    if vision.mask_token:
        yield f"{embeddings}.mask_token", (1, 1, hidden)
    if vision.positions:
        yield f"{embeddings}.position_embeddings", (1, vision.side**2 + 1, hidden)
    yield f"{embeddings}.patch_embeddings.projection.weight", (hidden, vision.num_channels, patch, patch)
    yield f"{embeddings}.patch_embeddings.projection.bias", (hidden,)
    for index in range(vision.num_hidden_layers):
        for module, shape, biased in _layer_shapes(vision):
            yield f"{vision.layer(index)}.{module}.weight", shape
            if biased:
                yield f"{vision.layer(index)}.{module}.bias", shape[:1]
        yield f"{vision.layer(index)}.lambda_1", (hidden,)
        yield f"{vision.layer(index)}.lambda_2", (hidden,)
    if vision.last_norm:
        yield f"{vision.prefix}.layernorm.weight", (hidden,)
        yield f"{vision.prefix}.layernorm.bias", (hidden,)


def _layer_shapes(vision: InternViT) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield each module of a layer, the shape of its weight, and whether it has a bias."""
    hidden, inner = vision.hidden_size, vision.intermediate_size
    for name in "qkv":
        yield f"attention.{name}_proj", (hidden, hidden), vision.attention_bias
    if vision.use_qk_norm:
        yield "attention.q_norm", (hidden,), False
        yield "attention.k_norm", (hidden,), False
    yield "attention.projection_layer", (hidden, hidden), True
    yield "mlp.fc1", (inner, hidden), True
    yield "mlp.fc2", (hidden, inner), True
    yield "layernorm_before", (hidden,), not vision.rms
    yield "layernorm_after", (hidden,), not vision.rms


def blocks(vision: InternViT, constants: Constants) -> list[Block]:
    """Return patches, layers and last norm: pixel_values -> hidden_states `(B, P, D)`, the class token dropped."""
    hidden = vision.hidden_size
    in_layer = hidden * (4 * hidden + 2 * vision.intermediate_size)
    layers = [
        Block(lambda flow, index=index: encoder_layer(flow, vision, constants, index), in_layer)  # type: ignore[misc]
        for index in range(vision.num_hidden_layers)
    ]

    def last(flow: Flow) -> None:
        opset = import_openvino().opset13
        x = flow["hidden_states"]
        if vision.last_norm:
            x = layer_norm(x, constants, f"{vision.prefix}.layernorm", vision.layer_norm_eps)
        end, one = np.array([vision.side**2 + 1]), np.array([1])
        flow["hidden_states"] = opset.slice(x, one, end, one, one)

    return [Block(lambda flow: tokens(flow, vision, constants)), *layers, Block(last)]


def tokens(flow: Flow, vision: InternViT, constants: Constants) -> None:
    """The class token, then each patch as a vector, their places added."""
    opset = import_openvino().opset13
    at, hidden = f"{vision.prefix}.embeddings", vision.hidden_size
    weight = constants.matrix(f"{at}.patch_embeddings.projection.weight")
    side, none = [vision.patch_size] * 2, [0, 0]
    grid = opset.convolution(flow["pixel_values"], weight, side, none, none, [1, 1])  # (B, D, rows, columns)
    bias = constants.vector(f"{at}.patch_embeddings.projection.bias")
    grid = opset.add(grid, bias.reshape(1, -1, 1, 1))
    row = opset.transpose(opset.reshape(grid, np.array([0, hidden, -1]), special_zero=True), np.array([0, 2, 1]))
    batch = opset.unsqueeze(dimension(row, 0), np.int64(0))
    first = opset.broadcast(constants.vector(f"{at}.cls_token"), opset.concat([batch, np.array([1, hidden])], 0))
    x = opset.concat([first, row], 1)
    if vision.positions:
        x = opset.add(x, constants.vector(f"{at}.position_embeddings"))
    flow["hidden_states"] = named(x, at)


def encoder_layer(flow: Flow, vision: InternViT, constants: Constants, index: int) -> None:
    """Attention and MLP, each behind a norm, scaled and added to what came in."""
    opset = import_openvino().opset13
    at, x = vision.layer(index), flow["hidden_states"]
    norm = rms_norm if vision.rms else layer_norm
    normal = norm(x, constants, f"{at}.layernorm_before", vision.layer_norm_eps)
    mixed = attention(normal, vision, constants, f"{at}.attention")
    x = opset.add(x, opset.multiply(mixed, constants.vector(f"{at}.lambda_1").reshape(1, 1, -1)))
    normal = norm(x, constants, f"{at}.layernorm_after", vision.layer_norm_eps)
    inner = activation(linear(normal, constants, f"{at}.mlp.fc1"), vision.hidden_act)
    inner = linear(inner, constants, f"{at}.mlp.fc2")
    scaled = opset.multiply(inner, constants.vector(f"{at}.lambda_2").reshape(1, 1, -1))
    flow["hidden_states"] = named(opset.add(x, scaled), at)


def attention(x: Output, vision: InternViT, constants: Constants, at: str) -> ov.Node:
    """Everything attends to everything; queries and keys may be normed over all heads together."""
    opset = import_openvino().opset13
    heads, width = vision.num_attention_heads, vision.hidden_size
    qkv = linear(x, constants, *(f"{at}.{name}_proj" for name in "qkv"))
    q, k, v = split(qkv, [width] * 3)
    if vision.use_qk_norm:  # with the eps of the class, which no config changes
        q, k = (rms_norm(each, constants, f"{at}.{name}_norm", 1e-6) for each, name in ((q, "q"), (k, "k")))
    q, k, v = (to_heads(each, heads, width // heads) for each in (q, k, v))
    scale = np.float32((width // heads) ** -0.5)
    mixed = opset.scaled_dot_product_attention(q, k, v, np.zeros((1, 1), np.float32), scale, causal=False)
    return linear(from_heads(mixed, width), constants, f"{at}.projection_layer")
