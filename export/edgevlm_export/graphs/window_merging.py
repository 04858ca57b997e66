"""A vision transformer as MiniCPM-V 4.6 has it: SigLIP's, of which a layer on the way merges windows of patches to one.

A picture comes in its own size, as a row of patches. Those of a window follow each other, and so do the windows that
become one image token at the end. Shapes: N patches, D channels, `WINDOW` patches of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, named
from edgevlm_export.graphs.layers import activation, dimension, embedding, layer_norm, linear
from edgevlm_export.graphs.packed_vit import Merger, plain_mlp, stacked
from edgevlm_export.graphs.stages import Stage, Values
from edgevlm_export.graphs.vision_transformer import (
    EncoderLayer,
    VisionTransformer,
    attention,
    encoder_layer,
    last_norm,
)

WINDOW = 4
"""2 x 2 patches, or what has become of them."""


@dataclass(frozen=True)
class MergingTransformer:
    """The layers, what merges windows after one of them, and what makes image tokens in the end."""

    vision: VisionTransformer
    window_merger: EncoderLayer
    """Attention within a window, and an MLP of all its patches, whose mean is added."""
    merged_after: int
    merger: Merger

    @property
    def inputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The graph's inputs: name to element type and shape."""
        values = self.vision.num_channels * self.vision.patch_size**2
        return {"pixel_values": ("f32", (-1, -1, values)), "patch_position_ids": ("i64", (-1, -1))}


def merging_stages(model: MergingTransformer) -> list[Stage]:
    """Return the stages from pixel_values `(B, N, values of a patch)` to image_embeds `(B, N / 16, D)`."""
    vision = model.vision
    stages = [Stage(partial(embed_patches, vision), (vision.patch_embedding, vision.position_embedding))]
    for index in range(vision.num_hidden_layers):
        layer = vision.encoder_layer(index)
        stages.append(Stage(partial(encoder_layer, vision, layer), (layer,)))
        if index == model.merged_after:
            stages.append(Stage(partial(merge_windows, vision, model.window_merger), (model.window_merger,)))
    stages.append(Stage(partial(last_norm, vision), (vision.post_layernorm,)))
    stages.append(Stage(partial(make_tokens, vision, model.merger), (model.merger,)))
    return stages


def embed_patches(vision: VisionTransformer, values: Values, constants: Constants) -> None:
    """Set each patch as a vector, its learned position added."""
    opset = import_openvino().opset13
    name = vision.patch_embedding.name
    row = named(opset.matmul(values["pixel_values"], constants.kernel(f"{name}.weight"), False, True), name)
    row = opset.add(row, constants.vector(f"{name}.bias").reshape(1, 1, -1))
    places = embedding(values["patch_position_ids"], constants, vision.position_embedding)
    values["hidden_states"] = named(opset.add(row, places), vision.embeddings)


def merge_windows(vision: VisionTransformer, merger: EncoderLayer, values: Values, constants: Constants) -> None:
    """Set `hidden_states` `(B, N, D)` to `(B, N / WINDOW, D)`: one vector for each window."""
    opset = import_openvino().opset13
    x, width = values["hidden_states"], vision.hidden_size
    windows = opset.reshape(x, np.array([-1, WINDOW, width]), special_zero=False)
    mixed, _ = attention(layer_norm(windows, constants, merger.norm1), vision, merger, values, constants)
    windows = opset.add(windows, mixed)
    batch, means = dimension(x, 0), opset.reduce_mean(windows, np.array([1]), keep_dims=True)
    means = opset.reshape(means, stacked(batch, np.int64(-1), np.int64(width)), special_zero=False)
    joined = opset.reshape(windows, stacked(batch, np.int64(-1), np.int64(WINDOW * width)), special_zero=False)
    inner = linear(layer_norm(joined, constants, merger.norm2), constants, merger.fc1)
    inner = linear(activation(inner, "gelu_pytorch_tanh"), constants, merger.fc2)
    values["hidden_states"] = named(opset.add(inner, means), merger.name)


def make_tokens(vision: VisionTransformer, merger: Merger, values: Values, constants: Constants) -> None:
    """Set `image_embeds`: an image token for every `WINDOW` vectors, in the order in which they came."""
    opset = import_openvino().opset13
    joined = np.array([0, -1, WINDOW * vision.hidden_size])
    x = opset.reshape(values["hidden_states"], joined, special_zero=True)
    values["image_embeds"] = plain_mlp(layer_norm(x, constants, merger.norm), merger.mlp, constants)
