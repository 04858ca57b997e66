"""A vision transformer as SigLIP has it: patches by a convolution, learned positions, pre-norm blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.layers import (
    activation,
    attention_bias,
    embedding,
    from_heads,
    layer_norm,
    linear,
    patch_embedding,
    split,
    to_heads,
)
from edgevlm_export.graphs.modules import Embedding, Linear, Norm, PatchConvolution
from edgevlm_export.graphs.stages import Stage, Values
from edgevlm_export.graphs.token_merging import TokenMerging, merge_tokens, unmerge_tokens

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True)
class EncoderLayer:
    """Attention and MLP, each behind a LayerNorm and added to what came in."""

    name: str
    norm1: Norm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    norm2: Norm
    fc1: Linear
    fc2: Linear
    merging: TokenMerging | None = None
    """What is merged between attention and MLP."""


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
    has_class_token: bool = False
    merged_tokens: Mapping[int, int] = field(default_factory=dict)
    """How many tokens a layer merges, by its index; shapes are static where there are any."""

    @property
    def side(self) -> int:
        """Patches in a row of the picture."""
        return self.image_size // self.patch_size

    @property
    def embeddings(self) -> str:
        """What the names of the patches' and positions' weights begin with."""
        return f"{self.prefix}.embeddings"

    @property
    def patch_embedding(self) -> PatchConvolution:
        """Turns patches into vectors."""
        name = f"{self.embeddings}.patch_embedding"
        return PatchConvolution(name, self.hidden_size, self.num_channels, self.patch_size)

    @property
    def position_embedding(self) -> Embedding:
        """A vector for each place of a patch."""
        return Embedding(f"{self.embeddings}.position_embedding", self.side**2, self.hidden_size)

    @property
    def post_layernorm(self) -> Norm:
        """After the last layer."""
        return self.norm(f"{self.prefix}.post_layernorm")

    def norm(self, name: str) -> Norm:
        """Return a LayerNorm over all channels."""
        return Norm(name, self.hidden_size, self.layer_norm_eps, bias=True)

    def encoder_layer(self, index: int) -> EncoderLayer:
        """Return one layer."""
        hidden, inner, at = self.hidden_size, self.intermediate_size, f"{self.prefix}.encoder.layers.{index}"
        q, k, v, out = (Linear(f"{at}.self_attn.{name}_proj", hidden, hidden, True) for name in ("q", "k", "v", "out"))
        fc1, fc2 = Linear(f"{at}.mlp.fc1", inner, hidden, True), Linear(f"{at}.mlp.fc2", hidden, inner, True)
        norm1, norm2 = self.norm(f"{at}.layer_norm1"), self.norm(f"{at}.layer_norm2")
        return EncoderLayer(at, norm1, q, k, v, out, norm2, fc1, fc2, self.merging(index, at))

    def merging(self, index: int, name: str) -> TokenMerging | None:
        """Return what a layer merges."""
        count = self.merged_tokens.get(index)
        return TokenMerging(name, count, self.has_class_token) if count else None


def vision_stages(vision: VisionTransformer) -> list[Stage]:
    """Return patches, layers and last norm: pixel_values -> hidden_states `(B, P, D)`."""
    start = Stage(partial(embed_patches, vision), (vision.patch_embedding, vision.position_embedding))
    end = Stage(partial(last_norm, vision), (vision.post_layernorm,))
    return [start, *encoder_stages(vision, vision.num_hidden_layers), end]


def encoder_stages(vision: VisionTransformer, count: int) -> list[Stage]:
    """Return a stage for each of the first `count` layers, and one that undoes what they merge."""
    layers = [vision.encoder_layer(index) for index in range(count)]
    stages = [Stage(partial(encoder_layer, vision, layer), (layer,)) for layer in layers]
    return [*stages, *unmerging_stages(vision)]


def unmerging_stages(vision: VisionTransformer) -> list[Stage]:
    """Return the stage that gives every patch a vector again, where layers merge tokens."""
    return [Stage(unmerge_tokens)] if vision.merged_tokens else []


def embed_patches(vision: VisionTransformer, values: Values, constants: Constants) -> None:
    """Set each patch as a vector with its position added; patches that are padding are masked."""
    opset = import_openvino().opset13
    row = patch_embedding(values["pixel_values"], constants, vision.patch_embedding)
    places = embedding(values["patch_position_ids"], constants, vision.position_embedding)
    values["hidden_states"] = named(opset.add(row, places), vision.embeddings)
    present = opset.reshape(values["patch_attention_mask"], np.array([0, 1, 1, -1]), special_zero=True)  # (B, 1, 1, P)
    values["attention_bias"] = attention_bias(present)


def encoder_layer(vision: VisionTransformer, layer: EncoderLayer, values: Values, constants: Constants) -> None:
    """Set `hidden_states` after one layer."""
    opset = import_openvino().opset13
    x = values["hidden_states"]
    normal = layer_norm(x, constants, layer.norm1)
    mixed, keys = attention(normal, vision, layer, values, constants)
    x = opset.add(x, mixed)
    if layer.merging:
        x = merge_tokens(x, keys, layer.merging, values)
    normal = layer_norm(x, constants, layer.norm2)
    inner = activation(linear(normal, constants, layer.fc1), vision.hidden_act)
    values["hidden_states"] = named(opset.add(x, linear(inner, constants, layer.fc2)), layer.name)


def attention(
    x: Output, vision: VisionTransformer, layer: EncoderLayer, values: Values, constants: Constants
) -> tuple[ov.Node, ov.Node]:
    """Return what every patch gets of every patch, `attention_bias` added to the scores, and the keys."""
    opset = import_openvino().opset13
    heads, width = vision.num_attention_heads, vision.hidden_size
    qkv = linear(x, constants, layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (to_heads(each, heads, width // heads) for each in split(qkv, [width] * 3))
    scale = np.float32((width // heads) ** -0.5)
    bias = values.outputs.get("attention_bias")
    mixed = opset.scaled_dot_product_attention(q, k, v, bias, scale, causal=False)
    return linear(from_heads(mixed, width), constants, layer.out_proj), k


def last_norm(vision: VisionTransformer, values: Values, constants: Constants) -> None:
    """Set `hidden_states` after the last norm."""
    values["hidden_states"] = layer_norm(values["hidden_states"], constants, vision.post_layernorm)
