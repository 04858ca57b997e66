"""SigLIP 2 on pictures of any shape (NaFlex, arXiv:2502.14786): patches come packed, and learned positions stretched.

Neighbours of `merge` x `merge` patches follow each other, so that every `merge`^2 rows become one image token at the
end. A batch has one picture, so there is no padding. Shapes: N patches, M = N / merge^2 image tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, named
from edgevlm_export.graphs.layers import activation, embedding, layer_norm, linear
from edgevlm_export.graphs.modules import Linear, Norm
from edgevlm_export.graphs.stages import Graph, Stage, Values
from edgevlm_export.graphs.vision_transformer import VisionTransformer, encoder_stages, last_norm


@dataclass(frozen=True)
class NaFlexTransformer(VisionTransformer):
    """SigLIP's transformer; `image_size` is that of the picture whose patches the position table has a row for."""

    @property
    def packed_patches(self) -> Linear:
        """Turns a patch's values, `(P, P, channels)` flattened, into a vector."""
        name = f"{self.embeddings}.patch_embedding"
        return Linear(name, self.hidden_size, self.num_channels * self.patch_size**2, bias=True)


@dataclass(frozen=True)
class Projector:
    """Makes one image token of `merge`^2 patches: linear_2(act(linear_1(x))), behind a norm if there is one."""

    norm: Norm | None
    linear_1: Linear
    linear_2: Linear
    hidden_act: str
    merge: int


def naflex_graph(vision: NaFlexTransformer, projector: Projector) -> Graph:
    """Return the vision submodel: pixel_values `(B, N, values of a patch)` -> image_embeds `(B, M, D)`.

    Of the position table each patch gets the sum of the rows `table_indices` `(B, taps, N)`, weighted by
    `table_weights`.
    """
    stages = [
        Stage(partial(embed_packed, vision), (vision.packed_patches, vision.position_embedding)),
        *encoder_stages(vision, vision.num_hidden_layers),
        Stage(partial(last_norm, vision), (vision.post_layernorm,)),
        Stage(partial(project, vision, projector), (projector,)),
    ]
    inputs = {
        "pixel_values": ("f32", (-1, -1, vision.packed_patches.columns)),
        "table_indices": ("i64", (-1, -1, -1)),
        "table_weights": ("f32", (-1, -1, -1)),
    }
    return Graph(inputs, stages, "image_embeds", "image_embeds")


def embed_packed(vision: NaFlexTransformer, values: Values, constants: Constants) -> None:
    """Set each patch as a vector, its position added."""
    opset = import_openvino().opset13
    patches = linear(values["pixel_values"], constants, vision.packed_patches)
    rows = embedding(values["table_indices"], constants, vision.position_embedding)  # (B, taps, N, D)
    weights = opset.unsqueeze(values["table_weights"], np.int64(-1))
    places = opset.reduce_sum(opset.multiply(rows, weights), np.array([1]), keep_dims=False)
    values["hidden_states"] = named(opset.add(patches, places), vision.embeddings)


def project(vision: NaFlexTransformer, projector: Projector, values: Values, constants: Constants) -> None:
    """Set `image_embeds`: the vectors of every `merge`^2 patches joined, and projected to the decoder's width."""
    opset = import_openvino().opset13
    joined = np.array([0, -1, vision.hidden_size * projector.merge**2])
    x = opset.reshape(values["hidden_states"], joined, special_zero=True)
    if projector.norm:
        x = layer_norm(x, constants, projector.norm)
    x = activation(linear(x, constants, projector.linear_1), projector.hidden_act)
    values["image_embeds"] = linear(x, constants, projector.linear_2)
