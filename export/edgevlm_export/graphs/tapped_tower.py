"""Granite for Docling's vision submodel: a tower, a connector with norms, and image tokens of some of its layers.

The tower's output and those of the tapped layers are folded alike, `factor` x `factor` patches to an image token. The
features of tap K are added after layer K of the decoder (DeepStack).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.connectors import pixel_shuffle
from edgevlm_export.graphs.constants import Constants
from edgevlm_export.graphs.decoder import deepstack_name
from edgevlm_export.graphs.layers import activation, layer_norm, linear
from edgevlm_export.graphs.modules import Linear, Norm
from edgevlm_export.graphs.packed_vit import Merger, plain_mlp
from edgevlm_export.graphs.stages import Stage, Values
from edgevlm_export.graphs.token_merging import unmerged
from edgevlm_export.graphs.tower import Tower, tower_stages
from edgevlm_export.graphs.vision_transformer import last_norm

_TEMPERATURE = 10000.0
"""Base of the wavelengths of sinusoidal positions."""


@dataclass(frozen=True)
class ConnectorPath:
    """One way of folding patches: how many a side make an image token, their projection, and the taps' mergers."""

    factor: int
    projection: Linear
    mergers: tuple[Merger, ...]


@dataclass(frozen=True)
class Connector:
    """ln_out(fc2(gelu(ln_mid(projection(fold(ln_in(x))) + positions)))), and what is made of the tapped layers."""

    ln_in: Norm
    path: ConnectorPath
    ln_mid: Norm
    fc2: Linear
    ln_out: Norm
    taps: tuple[int, ...]
    """The tapped layers, rising."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs."""
        return ("image_embeds", *(deepstack_name(number) for number in range(len(self.taps))))


def tapped_stages(tower: Tower, connector: Connector) -> list[Stage]:
    """Return the stages from pixel_values to the connector's outputs, each `(B, image tokens, D)`."""
    start, *rest = tower_stages(tower)
    mergers = dict(zip(connector.taps, enumerate(connector.path.mergers), strict=True))
    stages = [start]
    for index, stage in enumerate(rest):
        stages.append(stage)
        if index in mergers:
            number, merger = mergers[index]
            stages.append(Stage(partial(merge_tap, tower, connector.path.factor, merger, number), (merger,)))
    stages.append(Stage(partial(last_norm, tower), (tower.post_layernorm,)))
    own = (connector.ln_in, connector.path.projection, connector.ln_mid, connector.fc2, connector.ln_out)
    return [*stages, Stage(partial(connect, tower, connector), own)]


def merge_tap(tower: Tower, factor: int, merger: Merger, number: int, values: Values, constants: Constants) -> None:
    """Set the features of tap `number`, of the layer before."""
    folded = pixel_shuffle(unmerged(values), tower.side, tower.hidden_size, factor)
    values[deepstack_name(number)] = plain_mlp(layer_norm(folded, constants, merger.norm), merger.mlp, constants)


def connect(tower: Tower, connector: Connector, values: Values, constants: Constants) -> None:
    """Set `image_embeds`."""
    path = connector.path
    x = layer_norm(values["hidden_states"], constants, connector.ln_in)
    x = linear(pixel_shuffle(x, tower.side, tower.hidden_size, path.factor), constants, path.projection)
    positions = sinusoidal_positions(tower.side // path.factor, path.projection.rows)
    x = layer_norm(import_openvino().opset13.add(x, positions[None]), constants, connector.ln_mid)
    x = linear(activation(x, "gelu"), constants, connector.fc2)
    values["image_embeds"] = layer_norm(x, constants, connector.ln_out)


def sinusoidal_positions(side: int, width: int) -> npt.NDArray[np.float32]:
    """Return fixed positions of `side` x `side` image tokens, row by row, `(side^2, width)`.

    A quarter of the channels each: sine and cosine of the column, then of the row.
    """
    quarter = width // 4
    angles = np.arange(side)[:, None] / _TEMPERATURE ** (np.arange(quarter) / quarter)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    grid = np.concatenate([np.tile(waves, (side, 1)), np.repeat(waves, side, axis=0)], axis=1)
    return grid.astype(np.float32)
