"""Causal attention with grouped queries, rotary positions and a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.layers import (
    attention_bias,
    dimension,
    from_heads,
    linear,
    per_head,
    rms_norm,
    split,
    to_heads,
)
from edgevlm_export.graphs.modules import Linear, Norm
from edgevlm_export.graphs.rope import Rope, halved, rotate
from edgevlm_export.graphs.stages import Values
from edgevlm_export.graphs.states import KVCache, State, cache_name

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True)
class Attention:
    """Causal attention with grouped queries and rotary positions."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    """RMSNorms over each head's channels, before the rotation."""
    scale: float | None = None
    """What scores are multiplied by, 1 / sqrt(head_dim) where it is None."""
    gated: bool = False
    """q_proj makes a gate of each head behind its query, by whose sigmoid the head's output is multiplied."""

    def states(self, index: int) -> dict[str, State]:
        """Return the states of layer `index` by name."""
        cache = KVCache(self.num_kv_heads, self.head_dim)
        return {cache_name(index, kind): cache for kind in ("key", "value")}

    def mix(self, x: Output, index: int, values: Values, constants: Constants) -> ov.Node:
        """Grouped-query attention `(B, S, D)` -> `(B, S, D)`; the layer's new keys and values become states."""
        opset = import_openvino().opset13
        heads, head_dim = self.num_heads, self.head_dim
        cos, sin = (values[name] for name in self.rope.names)
        qkv = linear(x, constants, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = split(qkv, [self.q_proj.rows, self.k_proj.rows, self.v_proj.rows])
        gate = None
        if self.gated:
            q, gate = split(per_head(q, heads, 2 * head_dim), [head_dim] * 2)
        if self.q_norm and self.k_norm:
            q = rms_norm(per_head(q, heads, head_dim), constants, self.q_norm)
            k = rms_norm(per_head(k, self.num_kv_heads, head_dim), constants, self.k_norm)
        q = to_heads(q, heads, head_dim)
        k, v = (to_heads(each, self.num_kv_heads, head_dim) for each in (k, v))
        if self.rope.adjacent:
            q, k = (halved(each, head_dim, self.rope.rotary_dim) for each in (q, k))
        q, k = (rotate(each, cos, sin, head_dim, self.rope.rotary_dim) for each in (q, k))
        for kind, new in (("key", k), ("value", v)):
            values[cache_name(index, kind)] = named(new, f"{cache_name(index, kind)}/new")
        k, v = repeat_heads(k, self), repeat_heads(v, self)
        scale = np.float32(self.scale or head_dim**-0.5)
        mixed = opset.scaled_dot_product_attention(q, k, v, values["attention_bias"], scale, causal=False)
        mixed = from_heads(mixed, heads * head_dim)
        if gate is not None:
            gate = opset.reshape(gate, np.array([0, 0, heads * head_dim]), special_zero=True)
            mixed = opset.multiply(mixed, opset.sigmoid(gate))
        return linear(mixed, constants, self.o_proj)


def repeat_heads(x: Output, attention: Attention) -> Output:
    """`(B, KV heads, T, d)` -> `(B, heads, T, d)`.

    The CPU plugin fuses attention with the cache only where this is a bidirectional Broadcast to a target whose heads,
    repeats and head size are constants.
    """
    opset = import_openvino().opset13
    kv_heads, head_dim = attention.num_kv_heads, attention.head_dim
    repeats = attention.num_heads // kv_heads
    if repeats == 1:
        return x
    target = np.array([1, kv_heads, repeats, 1, head_dim])
    wide = opset.broadcast(opset.unsqueeze(x, np.int64(2)), target, broadcast_spec="BIDIRECTIONAL")
    return opset.reshape(wide, np.array([0, attention.num_heads, -1, head_dim]), special_zero=True)


def causal_bias(inputs_embeds: Output, attention_mask: Output) -> ov.Node:
    """`(B, 1, S, T)`: each of S new positions attends to those of the T cached ones up to itself that are not masked.

    Order is that of the cache, not of the position ids: entries that were rewound stay in the cache, masked.
    """
    opset = import_openvino().opset13
    total, new = dimension(attention_mask, 1), dimension(inputs_embeds, 1)
    keys = opset.range(np.int64(0), total, np.int64(1), "i64")
    queries = opset.unsqueeze(opset.range(opset.subtract(total, new), total, np.int64(1), "i64"), np.int64(1))
    causal = opset.less_equal(keys, queries)  # (S, T)
    present = opset.unsqueeze(opset.convert(attention_mask, "boolean"), np.array([1, 2]))  # (B, 1, 1, T)
    return attention_bias(opset.logical_and(causal, present))
