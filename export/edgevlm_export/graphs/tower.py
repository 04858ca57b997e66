"""The vision tower of LLaVA's kind: CLIP's or SigLIP's transformer on views of one size, run up to one of its layers.

CLIP's has a class token before the patches, a norm before the first layer, and no bias where SigLIP's has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs import vision_transformer
from edgevlm_export.graphs.layers import Constants, layer_norm, named, repeated
from edgevlm_export.graphs.stages import Block, Flow

_POOLING = [f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
_POOLING += [f"{module}.{name}" for module in ("layernorm", "mlp.fc1", "mlp.fc2") for name in ("weight", "bias")]


@dataclass(frozen=True)
class Tower(vision_transformer.VisionTransformer):
    """The sizes of the transformer, and how much of it is run."""

    has_class_token: bool = False
    layers: int = 0
    """How many layers are run."""

    @property
    def patches(self) -> int:
        """How many patches a view has."""
        return self.side**2

    @property
    def positions(self) -> int:
        """How many vectors come out: the class token, if there is one, and the patches."""
        return self.patches + int(self.has_class_token)


def shapes(tower: Tower) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that is read."""
    skipped, at = set(unused(tower)), f"{tower.prefix}.embeddings"
    found = {name: shape for name, shape in vision_transformer.shapes(tower) if name not in skipped}
    if tower.has_class_token:
        found.pop(f"{at}.patch_embedding.bias")
        found[f"{at}.class_embedding"] = (tower.hidden_size,)
        for kind in ("weight", "bias"):
            found[f"{tower.prefix}.pre_layrnorm.{kind}"] = (tower.hidden_size,)
    found[f"{at}.position_embedding.weight"] = (tower.positions, tower.hidden_size)
    return found


def unused(tower: Tower) -> tuple[str, ...]:
    """Return the names of tensors that checkpoints have and nothing here needs: what follows the last layer run."""
    after = tuple(f"{tower.layer(index)}." for index in range(tower.layers, tower.num_hidden_layers))
    after += (f"{tower.prefix}.post_layernorm.",)
    head = [f"{tower.prefix}.head.{name}" for name in ("probe", *_POOLING)]
    return (*(name for name, _ in vision_transformer.shapes(tower) if name.startswith(after)), *head)


def blocks(tower: Tower, constants: Constants) -> list[Block]:
    """Return patches and layers: pixel_values -> hidden_states `(B, positions, D)`."""
    in_layer = tower.hidden_size * (4 * tower.hidden_size + 2 * tower.intermediate_size)
    layers = [
        Block(lambda flow, index=index: vision_transformer.encoder_layer(flow, tower, constants, index), in_layer)  # type: ignore[misc]
        for index in range(tower.layers)
    ]
    return [Block(lambda flow: tokens(flow, tower, constants)), *layers]


def tokens(flow: Flow, tower: Tower, constants: Constants) -> None:
    """The class token and the patches as vectors, their places added."""
    opset = import_openvino().opset13
    at = f"{tower.prefix}.embeddings"
    weight = constants.matrix(f"{at}.patch_embedding.weight")
    side, none = [tower.patch_size] * 2, [0, 0]
    grid = opset.convolution(flow["pixel_values"], weight, side, none, none, [1, 1])  # (B, D, rows, columns)
    if not tower.has_class_token:
        grid = opset.add(grid, constants.vector(f"{at}.patch_embedding.bias").reshape(1, -1, 1, 1))
    row = opset.reshape(grid, np.array([0, tower.hidden_size, -1]), special_zero=True)
    row = opset.transpose(row, np.array([0, 2, 1]))
    if tower.has_class_token:
        row = opset.concat([repeated(constants.vector(f"{at}.class_embedding"), row), row], 1)
    row = named(opset.add(row, constants.vector(f"{at}.position_embedding.weight")[None]), at)
    if tower.has_class_token:
        row = layer_norm(row, constants, f"{tower.prefix}.pre_layrnorm", tower.layer_norm_eps)
    flow["hidden_states"] = row
