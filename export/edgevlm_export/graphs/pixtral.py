"""LightOnOCR's vision submodel: Pixtral's transformer on patches in raster order, and what merges them.

An image token is made of `merge` x `merge` patches, which the input `merge_index` gathers. Patches of an odd last row
or column take part in attention and make no image token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants
from edgevlm_export.graphs.layers import activation, linear, rms_norm
from edgevlm_export.graphs.modules import Linear, Norm
from edgevlm_export.graphs.packed_vit import PackedTransformer, packed_stages
from edgevlm_export.graphs.rope import Rope, make_rope
from edgevlm_export.graphs.stages import Graph, Stage, Values


@dataclass(frozen=True)
class Projector:
    """linear_2(gelu(linear_1(merging_layer(patches side by side)))), the patches behind an RMSNorm."""

    norm: Norm
    merging_layer: Linear
    linear_1: Linear
    linear_2: Linear


def pixtral_rope(head_dim: int, theta: float) -> Rope:
    """Return the rotation of the first half of each head's pairs by the row, and of the second half by the column.

    Frequencies alternate: the row has those at even places, the column those at odd ones.
    """
    quarter = head_dim // 4
    frequencies = make_rope(head_dim, theta, None, 0).frequencies
    return Rope(np.concatenate([frequencies[0::2], frequencies[1::2]]), axes=(0,) * quarter + (1,) * quarter)


def pixtral_graph(vision: PackedTransformer, projector: Projector) -> Graph:
    """Return the submodel: pixel_values `(B, N, values of a patch)` -> image_embeds `(B, M, D)`."""
    inputs: Mapping[str, tuple[str, tuple[int, ...]]] = {**vision.inputs, "merge_index": ("i64", (-1, -1))}
    stages = [*packed_stages(vision), Stage(partial(project, vision, projector), (projector,))]
    return Graph(inputs, stages, "image_embeds", "image_embeds")


def project(vision: PackedTransformer, projector: Projector, values: Values, constants: Constants) -> None:
    """Set `image_embeds`. Side by side the patches are channel by channel, as torch unfolds a grid."""
    opset = import_openvino().opset13
    width, count = vision.hidden_size, vision.merge**2
    x = rms_norm(values["hidden_states"], constants, projector.norm)
    x = opset.gather(x, values["merge_index"], np.int64(1), 1)
    x = opset.reshape(x, np.array([0, -1, count, width]), special_zero=True)
    x = opset.reshape(opset.transpose(x, np.array([0, 1, 3, 2])), np.array([0, -1, count * width]), special_zero=True)
    x = linear(linear(x, constants, projector.merging_layer), constants, projector.linear_1)
    values["image_embeds"] = linear(activation(x, "gelu"), constants, projector.linear_2)
