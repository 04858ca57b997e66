"""LFM2's short convolution: a gated causal convolution of a few places, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.layers import linear, split
from edgevlm_export.graphs.modules import DepthwiseConvolution, Linear
from edgevlm_export.graphs.stages import Values
from edgevlm_export.graphs.states import FixedState, State, previous_state, state_name

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True)
class ShortConv:
    """out(C * conv(B * x)), where B, C and x are thirds of one projection."""

    in_proj: Linear
    """Rows of B, then of C, then of x."""
    conv: DepthwiseConvolution
    out_proj: Linear
    rope: None = None

    def states(self, index: int) -> dict[str, State]:
        """Return the states of layer `index` by name."""
        return {state_name(index, "conv"): convolution_state(self.conv)}

    def mix(self, x: Output, index: int, values: Values, constants: Constants) -> ov.Node:
        """`(B, S, D)` -> `(B, S, D)`; the last places that the convolution reads become the layer's state."""
        opset = import_openvino().opset13
        gate, out_gate, x = split(linear(x, constants, self.in_proj), [self.conv.channels] * 3)
        mixed = causal_convolution(opset.multiply(gate, x), state_name(index, "conv"), self.conv, values, constants)
        return linear(opset.multiply(out_gate, mixed), constants, self.out_proj)


def convolution_state(conv: DepthwiseConvolution) -> FixedState:
    """Return what a causal convolution keeps: the places before the next one that it still reads, `(B, k - 1, D)`."""
    return FixedState((conv.size - 1, conv.channels))


def causal_convolution(
    x: Output, name: str, conv: DepthwiseConvolution, values: Values, constants: Constants
) -> ov.Node:
    """`(B, S, D)` -> `(B, S, D)`: each place a weighted sum of itself and the k - 1 before it; sets the state `name`.

    A sum of k slices: a GroupConvolution would need the channels first, and not every device runs it.
    """
    opset = import_openvino().opset13
    before = conv.size - 1
    row = opset.concat([previous_state(x, name, convolution_state(conv), values), x], 1)
    values[name] = named(_places(row, -before, 0), f"{name}/new")
    weights = constants.vector(f"{conv.name}.weight").reshape(conv.channels, conv.size)
    terms = [
        opset.multiply(_places(row, place, place - before), weights[:, place].copy().reshape(1, 1, -1))
        for place in range(conv.size)
    ]
    y = named(reduce(opset.add, terms), conv.name)
    if not conv.bias:
        return y
    return named(opset.add(y, constants.vector(f"{conv.name}.bias").reshape(1, 1, -1)), f"{conv.name}/bias")


def _places(x: Output, start: int, stop: int) -> ov.Node:
    """Return the places `start` to `stop` of `x` `(B, S, D)`, negative ones counted from the end, 0 being the end."""
    end = stop or np.iinfo(np.int64).max
    return import_openvino().opset13.slice(x, np.array([start]), np.array([end]), np.array([1]), np.array([1]))
