"""A gated delta net (https://arxiv.org/abs/2412.06464), as Qwen3.5 has it: linear attention, its state of a fixed size.

q, k and v go through a short causal convolution. Then each head has a state R, key channels by value channels, which
every token lets decay and corrects: R = exp(g) R; R = R + k^T beta (v - k R); its output is q R. Shapes: H value heads,
K and V channels of a head's keys and values, C channels of q, k and v together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output
from edgevlm_export.graphs.layers import activation, dimension, linear, per_head, rms_norm, split, to_heads
from edgevlm_export.graphs.modules import DepthwiseConvolution, Linear, Norm, Tensor
from edgevlm_export.graphs.short_conv import causal_convolution, convolution_state
from edgevlm_export.graphs.stages import Values
from edgevlm_export.graphs.states import FixedState, State, previous_state, state_name

if TYPE_CHECKING:
    import openvino as ov

_L2_EPS = 1e-6
"""Of the norms of q and k, which no config changes."""
_END = np.array([np.iinfo(np.int64).max])
_BY_HEAD = np.array([0, 2, 1, 3])
"""Swaps sequence and heads."""


@dataclass(frozen=True)
class GatedDeltaNet:
    """The delta rule with decay, over convolved queries, keys and values; its outputs are normalised and gated."""

    in_proj_qkv: Linear
    in_proj_z: Linear
    """Of the output's gate."""
    in_proj_b: Linear
    """Of beta, how far a value is corrected."""
    in_proj_a: Linear
    """Of the decay."""
    conv1d: DepthwiseConvolution
    dt_bias: Tensor
    a_log: Tensor
    norm: Norm
    out_proj: Linear
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    hidden_act: str
    """After the convolution."""

    @property
    def rope(self) -> None:
        """None: the recurrence itself knows the order of the tokens."""

    @property
    def recurrent_state(self) -> FixedState:
        """What the heads remember."""
        return FixedState((self.num_v_heads, self.head_k_dim, self.head_v_dim), recurrent=True)

    def states(self, index: int) -> dict[str, State]:
        """Return the states of layer `index` by name."""
        return {
            state_name(index, "conv"): convolution_state(self.conv1d),
            state_name(index, "recurrent"): self.recurrent_state,
        }

    def mix(self, x: Output, index: int, values: Values, constants: Constants) -> ov.Node:
        """`(B, S, D)` -> `(B, S, D)`; the convolution's and the recurrence's states go on."""
        opset = import_openvino().opset13
        both = linear(x, constants, self.in_proj_qkv, self.in_proj_z)
        qkv, z = split(both, [self.in_proj_qkv.rows, self.in_proj_z.rows])
        b, a = split(linear(x, constants, self.in_proj_b, self.in_proj_a), [self.num_v_heads] * 2)
        qkv = causal_convolution(qkv, state_name(index, "conv"), self.conv1d, values, constants)
        qkv = activation(qkv, self.hidden_act)
        decay = -np.exp(constants.vector(self.a_log.name))
        g = opset.multiply(opset.softplus(opset.add(a, constants.vector(self.dt_bias.name))), decay)
        mixed = self._recur(qkv, g, opset.sigmoid(b), index, values)
        normal = opset.reshape(
            rms_norm(mixed, constants, self.norm), np.array([0, 0, self.in_proj_z.rows]), special_zero=True
        )
        return linear(opset.multiply(normal, opset.swish(z)), constants, self.out_proj)

    def _recur(self, qkv: Output, g: Output, beta: Output, index: int, values: Values) -> ov.Node:
        """Return the heads' outputs `(B, S, H, V)` of convolved q, k and v `(B, S, C)`, g and beta `(B, S, H)`."""
        opset = import_openvino().opset13
        keys, head_k_dim = self.num_k_heads * self.head_k_dim, self.head_k_dim
        q, k, v = split(qkv, [keys, keys, self.num_v_heads * self.head_v_dim])
        q, k = (
            opset.transpose(l2_norm(self._repeat(per_head(each, self.num_k_heads, head_k_dim))), _BY_HEAD)
            for each in (q, k)
        )
        v = to_heads(v, self.num_v_heads, self.head_v_dim)
        g, beta = (opset.transpose(each, np.array([0, 2, 1])) for each in (g, beta))
        name = state_name(index, "recurrent")
        previous = previous_state(qkv, name, self.recurrent_state, values)
        mixed, values.outputs[name] = delta_rule(q, k, v, g, beta, previous)
        return opset.transpose(mixed, _BY_HEAD)

    def _repeat(self, x: Output) -> Output:
        """`(B, S, key heads, K)` -> `(B, S, H, K)`: value heads that follow each other share a key head."""
        repeats = self.num_v_heads // self.num_k_heads
        if repeats == 1:
            return x
        opset = import_openvino().opset13
        target = np.array([1, 1, self.num_k_heads, repeats, self.head_k_dim])
        wide = opset.broadcast(opset.unsqueeze(x, np.int64(3)), target, broadcast_spec="BIDIRECTIONAL")
        return opset.reshape(wide, np.array([0, 0, self.num_v_heads, self.head_k_dim]), special_zero=True)


def l2_norm(x: Output) -> ov.Node:
    """x / sqrt(sum(x^2) + eps), over the last axis, in the operations that the CPU plugin fuses with the delta rule."""
    opset = import_openvino().opset13
    squares = opset.reduce_sum(opset.multiply(x, x), np.array([-1]), keep_dims=True)
    return opset.multiply(x, opset.divide(np.float32(1), opset.sqrt(opset.add(squares, np.float32(_L2_EPS)))))


def delta_rule(q: ov.Node, k: ov.Node, v: ov.Node, g: ov.Node, beta: ov.Node, state: Output) -> tuple[Output, Output]:
    """Return the outputs `(B, H, S, V)` and the state `(B, H, K, V)` that follows `state`.

    q and k are `(B, H, S, K)`, v `(B, H, S, V)`, g and beta `(B, H, S)`. This is the Loop that optimum-intel makes
    (`convert_recurrent_attention_cell`), of which OpenVINO makes one operation, `GatedDeltaNet`: for that the Loop's
    inputs and outputs must come in this order, and q be divided by a root of its own shape.
    """
    opset = import_openvino().opset13
    q = opset.divide(q, opset.power(opset.convert(dimension(q, 3), "f32"), np.float32(0.5)))
    empty = opset.broadcast(np.float32(0), opset.shape_of(v))
    body, parameters, new, written = _delta_rule_step()
    *of_a_token, state_before, outputs_before = parameters
    loop = opset.loop(opset.convert(dimension(v, 2), "i32"), opset.constant(True, dtype=bool))
    loop.set_function(body)
    for parameter, value in zip(of_a_token, (q, k, v, g, beta), strict=True):
        loop.set_sliced_input(parameter, value.output(0), 0, 1, 1, -1, 2)
    loop.set_merged_input(state_before, state, new)
    loop.set_merged_input(outputs_before, empty.output(0), written)
    loop.set_special_body_ports([0, 0])
    return loop.get_iter_value(written, -1), loop.get_iter_value(new, -1)


def _delta_rule_step() -> tuple[ov.Model, list[ov.Node], Output, Output]:
    """Return the rule for one token: the Loop's body, its parameters but the step's number, new state, and outputs."""
    openvino = import_openvino()
    opset = openvino.opset13
    step = opset.parameter([], np.int32)
    q, k, v = (opset.parameter([-1, -1, 1, -1], np.float32) for _ in range(3))
    g, beta = (opset.parameter([-1, -1, 1], np.float32) for _ in range(2))
    state, outputs = (opset.parameter([-1, -1, -1, -1], np.float32) for _ in range(2))
    last, row, token = np.int32(-1), np.int32(-2), np.int32(2)
    key = opset.unsqueeze(opset.squeeze(k, token), last)
    kept = opset.multiply(state, opset.unsqueeze(opset.exp(g), last))
    known = opset.reduce_sum(opset.multiply(kept, key), row, keep_dims=False)
    correction = opset.multiply(opset.subtract(opset.squeeze(v, token), known), beta)
    new = opset.add(kept, opset.multiply(key, opset.unsqueeze(correction, row)))
    query = opset.unsqueeze(opset.squeeze(q, token), last)
    output = opset.reduce_sum(opset.multiply(new, query), row, keep_dims=True)
    written = opset.scatter_update(outputs, opset.unsqueeze(step, np.int32(0)), output, token)
    parameters = [q, k, v, g, beta, state, outputs]
    body = openvino.Model([opset.constant([True], dtype=bool), new, written], [step, *parameters], "delta_rule")
    return body, parameters, new.output(0), written.output(0)
