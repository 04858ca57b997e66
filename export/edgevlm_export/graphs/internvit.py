"""A vision transformer as InternVL has it: a class token before the patches, and branches scaled channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.layers import (
    activation,
    dimension,
    from_heads,
    layer_norm,
    linear,
    patch_embedding,
    rms_norm,
    split,
    to_heads,
)
from edgevlm_export.graphs.modules import Linear, Norm, PatchConvolution, Tensor
from edgevlm_export.graphs.stages import Stage, Values
from edgevlm_export.graphs.token_merging import TokenMerging, merge_tokens
from edgevlm_export.graphs.vision_transformer import VisionTransformer, unmerging_stages

if TYPE_CHECKING:
    import openvino as ov

_QK_NORM_EPS = 1e-6
"""Of transformers' InternVLVisionRMSNorm, which no config changes."""


@dataclass(frozen=True)
class InternLayer:
    """Attention and MLP, each behind a norm, scaled channel by channel and added to what came in."""

    name: str
    norm_before: Norm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    """RMSNorms over all heads together."""
    projection: Linear
    lambda_1: Tensor
    norm_after: Norm
    fc1: Linear
    fc2: Linear
    lambda_2: Tensor
    merging: TokenMerging | None = None
    """What is merged between attention and MLP."""


@dataclass(frozen=True)
class InternViT(VisionTransformer):
    """The sizes and choices of the transformer, named as Hugging Face configs name them."""

    has_class_token: bool = True
    attention_bias: bool = False
    use_qk_norm: bool = False
    rms: bool = False
    """Norms before attention and MLP are RMSNorms."""
    last_norm: bool = False
    """A LayerNorm follows the last layer."""
    positions: bool = True
    """Learned positions are added to the class token and the patches."""

    @property
    def patch_embedding(self) -> PatchConvolution:
        """Turns patches into vectors."""
        name = f"{self.embeddings}.patch_embeddings.projection"
        return PatchConvolution(name, self.hidden_size, self.num_channels, self.patch_size)

    @property
    def cls_token(self) -> Tensor:
        """The class token."""
        return Tensor(f"{self.embeddings}.cls_token", (1, 1, self.hidden_size))

    @property
    def mask_token(self) -> str:
        """The name of the token that stands for masked patches in training."""
        return f"{self.embeddings}.mask_token"

    @property
    def position_embeddings(self) -> Tensor | None:
        """A vector for the class token and each place of a patch."""
        shape = (1, self.side**2 + 1, self.hidden_size)
        return Tensor(f"{self.embeddings}.position_embeddings", shape) if self.positions else None

    @property
    def final_norm(self) -> Norm | None:
        """After the last layer."""
        return self.norm(f"{self.prefix}.layernorm") if self.last_norm else None

    def intern_layer(self, index: int) -> InternLayer:
        """Return one layer."""
        hidden, inner, at = self.hidden_size, self.intermediate_size, f"{self.prefix}.encoder.layer.{index}"
        q, k, v = (Linear(f"{at}.attention.{name}_proj", hidden, hidden, self.attention_bias) for name in "qkv")
        q_norm, k_norm = (
            Norm(f"{at}.attention.{name}_norm", hidden, _QK_NORM_EPS) if self.use_qk_norm else None for name in "qk"
        )
        return InternLayer(
            at,
            Norm(f"{at}.layernorm_before", hidden, self.layer_norm_eps, bias=not self.rms),
            q,
            k,
            v,
            q_norm,
            k_norm,
            Linear(f"{at}.attention.projection_layer", hidden, hidden, True),
            Tensor(f"{at}.lambda_1", (hidden,)),
            Norm(f"{at}.layernorm_after", hidden, self.layer_norm_eps, bias=not self.rms),
            Linear(f"{at}.mlp.fc1", inner, hidden, True),
            Linear(f"{at}.mlp.fc2", hidden, inner, True),
            Tensor(f"{at}.lambda_2", (hidden,)),
            self.merging(index, at),
        )


def vision_stages(vision: InternViT) -> list[Stage]:
    """Return patches, layers and last norm: pixel_values -> hidden_states `(B, P, D)`, the class token dropped."""
    layers = [vision.intern_layer(index) for index in range(vision.num_hidden_layers)]
    start = Stage(partial(embed_tile, vision), (vision.cls_token, vision.position_embeddings, vision.patch_embedding))
    stages = [Stage(partial(intern_layer, vision, layer), (layer,)) for layer in layers]
    return [start, *stages, *unmerging_stages(vision), Stage(partial(drop_class_token, vision), (vision.final_norm,))]


def embed_tile(vision: InternViT, values: Values, constants: Constants) -> None:
    """Set the class token, then each patch as a vector, their positions added."""
    opset = import_openvino().opset13
    row = patch_embedding(values["pixel_values"], constants, vision.patch_embedding)
    batch = opset.unsqueeze(dimension(row, 0), np.int64(0))
    target = opset.concat([batch, np.array([1, vision.hidden_size])], 0)
    x = opset.concat([opset.broadcast(constants.vector(vision.cls_token.name), target), row], 1)
    if vision.position_embeddings:
        x = opset.add(x, constants.vector(vision.position_embeddings.name))
    values["hidden_states"] = named(x, vision.embeddings)


def intern_layer(vision: InternViT, layer: InternLayer, values: Values, constants: Constants) -> None:
    """Set `hidden_states` after one layer."""
    opset = import_openvino().opset13
    x = values["hidden_states"]
    norm = rms_norm if vision.rms else layer_norm
    mixed, keys = attention(norm(x, constants, layer.norm_before), vision, layer, values, constants)
    x = opset.add(x, opset.multiply(mixed, constants.vector(layer.lambda_1.name).reshape(1, 1, -1)))
    if layer.merging:
        x = merge_tokens(x, keys, layer.merging, values)
    inner = activation(linear(norm(x, constants, layer.norm_after), constants, layer.fc1), vision.hidden_act)
    inner = linear(inner, constants, layer.fc2)
    scaled = opset.multiply(inner, constants.vector(layer.lambda_2.name).reshape(1, 1, -1))
    values["hidden_states"] = named(opset.add(x, scaled), layer.name)


def attention(
    x: Output, vision: InternViT, layer: InternLayer, values: Values, constants: Constants
) -> tuple[ov.Node, ov.Node]:
    """Return what everything gets of everything, `attention_bias` added to the scores, and the keys."""
    opset = import_openvino().opset13
    heads, width = vision.num_attention_heads, vision.hidden_size
    q, k, v = split(linear(x, constants, layer.q_proj, layer.k_proj, layer.v_proj), [width] * 3)
    if layer.q_norm and layer.k_norm:
        q, k = rms_norm(q, constants, layer.q_norm), rms_norm(k, constants, layer.k_norm)
    q, k, v = (to_heads(each, heads, width // heads) for each in (q, k, v))
    scale = np.float32((width // heads) ** -0.5)
    bias = values.outputs.get("attention_bias", np.zeros((1, 1), np.float32))
    mixed = opset.scaled_dot_product_attention(q, k, v, bias, scale, causal=False)
    return linear(from_heads(mixed, width), constants, layer.projection), k


def drop_class_token(vision: InternViT, values: Values, constants: Constants) -> None:
    """Set `hidden_states` to the patches alone, after the last norm if there is one."""
    opset = import_openvino().opset13
    x = values["hidden_states"]
    if vision.final_norm:
        x = layer_norm(x, constants, vision.final_norm)
    end, one = np.array([vision.side**2 + 1]), np.array([1])
    values["hidden_states"] = opset.slice(x, one, end, one, one)
