"""GLM-OCR's vision submodel: a transformer on packed patches, and a convolution and an MLP that merge them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, named
from edgevlm_export.graphs.decoder import GatedMLP, gated_mlp
from edgevlm_export.graphs.layers import activation, layer_norm, linear
from edgevlm_export.graphs.modules import Linear, Norm, PatchConvolution
from edgevlm_export.graphs.packed_vit import PackedTransformer, packed_stages
from edgevlm_export.graphs.stages import Graph, Stage, Values


@dataclass(frozen=True)
class ConvolutionMerger:
    """mlp(gelu(norm(proj(downsample(patches))))), the first a convolution over the patches of an image token."""

    downsample: PatchConvolution
    proj: Linear
    norm: Norm
    mlp: GatedMLP


def glm_graph(vision: PackedTransformer, merger: ConvolutionMerger) -> Graph:
    """Return the submodel: pixel_values `(B, N, values of a patch)` -> image_embeds `(B, M, D)`."""
    stages = [*packed_stages(vision), Stage(partial(merge, vision, merger), (merger,))]
    return Graph(vision.inputs, stages, "image_embeds", "image_embeds")


def merge(vision: PackedTransformer, merger: ConvolutionMerger, values: Values, constants: Constants) -> None:
    """Set `image_embeds`. The convolution sees an image token's patches channel by channel."""
    opset = import_openvino().opset13
    width, count, name = vision.hidden_size, vision.merge**2, merger.downsample.name
    x = opset.reshape(values["hidden_states"], np.array([0, -1, count, width]), special_zero=True)
    x = opset.reshape(opset.transpose(x, np.array([0, 1, 3, 2])), np.array([0, -1, count * width]), special_zero=True)
    x = named(opset.matmul(x, constants.kernel(f"{name}.weight"), False, True), name)
    x = opset.add(x, constants.vector(f"{name}.bias").reshape(1, 1, -1))
    x = layer_norm(linear(x, constants, merger.proj), constants, merger.norm)
    values["image_embeds"] = gated_mlp(activation(x, "gelu"), merger.mlp, constants)
