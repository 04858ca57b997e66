"""Causal attention with grouped queries, rotary positions and a KV cache."""

from __future__ import annotations

from collections.abc import Iterable
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
    window: int | None = None
    """How many of the last tokens a token attends to, itself among them; None is all.

    Paged attention takes every mask for a causal one: `DecoderTraits.sliding_layers` keeps decoders with windows out.
    """
    v_norm: Norm | None = None
    """RMSNorm over each head's channels of the values."""
    is_reused: bool = False
    """Layers after it attend to its keys and values, too."""

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
        if self.v_norm:
            v = rms_norm(per_head(v, self.num_kv_heads, head_dim), constants, self.v_norm)
        q = to_heads(q, heads, head_dim)
        k, v = (to_heads(each, self.num_kv_heads, head_dim) for each in (k, v))
        if self.rope.adjacent:
            q, k = (halved(each, head_dim, self.rope.rotary_dim) for each in (q, k))
        q, k = (rotate(each, cos, sin, head_dim, self.rope.rotary_dim) for each in (q, k))
        for kind, new in (("key", k), ("value", v)):
            values[cache_name(index, kind)] = named(new, f"{cache_name(index, kind)}/new")
            if self.is_reused:  # a node of its own, so that it is a value of its own between partitions
                values[reused_name(index, kind)] = opset.reshape(new, np.zeros(4, np.int64), special_zero=True)
        mixed = attend(q, k, v, self, values)
        if gate is not None:
            gate = opset.reshape(gate, np.array([0, 0, heads * head_dim]), special_zero=True)
            mixed = opset.multiply(mixed, opset.sigmoid(gate))
        return linear(mixed, constants, self.o_proj)


@dataclass(frozen=True)
class ReusingAttention:
    """Attention to the keys and values of an earlier layer, which it adds none to."""

    q_proj: Linear
    o_proj: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    q_norm: Norm
    source: int
    """Index of the layer whose keys and values they are."""
    scale: float | None = None
    window: int | None = None

    def states(self, index: int) -> dict[str, State]:  # noqa: ARG002
        """Return no states."""
        return {}

    def mix(self, x: Output, index: int, values: Values, constants: Constants) -> ov.Node:  # noqa: ARG002
        """Grouped-query attention `(B, S, D)` -> `(B, S, D)`."""
        cos, sin = (values[name] for name in self.rope.names)
        q = per_head(linear(x, constants, self.q_proj), self.num_heads, self.head_dim)
        q = to_heads(rms_norm(q, constants, self.q_norm), self.num_heads, self.head_dim)
        k, v = (values[reused_name(self.source, kind)] for kind in ("key", "value"))
        mixed = attend(rotate(q, cos, sin, self.head_dim), k, v, self, values)
        return linear(mixed, constants, self.o_proj)


def reused_name(index: int, kind: str) -> str:
    """Return what the keys or values of layer `index` are called that other layers attend to."""
    return f"reused.{index}.{kind}"


def attend(q: Output, k: Output, v: Output, attention: Attention | ReusingAttention, values: Values) -> ov.Node:
    """Return what queries `(B, H, S, d)` get of keys and values `(B, KV heads, T, d)`: `(B, S, H*d)`."""
    opset, head_dim = import_openvino().opset13, attention.head_dim
    k, v = repeat_heads(k, attention), repeat_heads(v, attention)
    scale, bias = np.float32(attention.scale or head_dim**-0.5), values[bias_name(attention.window)]
    mixed = opset.scaled_dot_product_attention(q, k, v, bias, scale, causal=False)
    return from_heads(mixed, attention.num_heads * head_dim)


def repeat_heads(x: Output, attention: Attention | ReusingAttention) -> Output:
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


def bias_name(window: int | None) -> str:
    """Return what the mask of attention with that sliding window is called, or with none."""
    return "attention_bias" if window is None else f"attention_bias.{window}"


def causal_biases(
    inputs_embeds: Output,
    attention_mask: Output,
    windows: Iterable[int | None] = (None,),
    groups: Output | None = None,
    start: Output | None = None,
) -> dict[str, ov.Node]:
    """Return the mask `(B, 1, S, T)` of attention with each of these sliding windows, by `bias_name`.

    Each of S new tokens attends to those of the T cached ones up to itself that are not masked and are in its window;
    and to those after it that are of its group: `groups` `(B, S)` are numbers, 0 for a token of none. Masks with a
    window begin with the cached token `start` `(1,)`, which is the first that those layers hold.

    Order is that of the cache, not of the position ids: entries that were rewound stay in the cache, masked. A window
    does not count them.
    """
    opset = import_openvino().opset13
    total, new = dimension(attention_mask, 1), dimension(inputs_embeds, 1)
    past = opset.subtract(total, new)
    keys, queries = (opset.range(first, total, np.int64(1), "i64") for first in (np.int64(0), past))
    allowed = opset.less_equal(keys, opset.unsqueeze(queries, np.int64(1)))  # (S, T)
    if groups is not None:
        allowed = opset.logical_or(allowed, same_group(groups, past))
    present = opset.unsqueeze(opset.convert(attention_mask, "boolean"), np.array([1, 2]))  # (B, 1, 1, T)
    allowed = opset.logical_and(allowed, present)
    biases = {}
    for window in windows:
        seen = allowed
        if window is not None:
            counts = opset.cum_sum(attention_mask, np.int64(1))  # (B, T)
            seen = opset.logical_and(
                held(allowed, start, 3), in_window(counts, held(counts, start, 1), queries, window)
            )
        biases[bias_name(window)] = attention_bias(seen)
    return biases


def held(x: Output, start: Output | None, axis: int) -> Output:
    """Return what `x` has from `start` `(1,)` on, along an axis."""
    if start is None:
        return x
    end, step = np.array([np.iinfo(np.int64).max]), np.array([1])
    return import_openvino().opset13.slice(x, start, end, step, np.array([axis]))


def in_window(counts: Output, held: Output, queries: Output, window: int) -> ov.Node:
    """Return as a boolean `(B, 1, S, T)` which are among the last `window` tokens that are not masked.

    `counts` `(B, T)` say how many tokens up to each are not masked, `held` those of the ones that are asked about.
    `queries` `(S,)` are the places of the new tokens in the cache.
    """
    opset = import_openvino().opset13
    begins = opset.subtract(opset.gather(counts, queries, np.int64(1)), np.int64(window))  # (B, S)
    return opset.greater(opset.unsqueeze(held, np.array([1, 2])), opset.unsqueeze(begins, np.array([1, 3])))


def same_group(groups: Output, past: Output) -> ov.Node:
    """Return as a boolean `(B, 1, S, T)` whether new tokens are of one group; the `past` cached ones are of none."""
    opset = import_openvino().opset13
    batch, past = (opset.unsqueeze(each, np.int64(0)) for each in (dimension(groups, 0), past))
    keys = opset.concat([opset.broadcast(np.int64(0), opset.concat([batch, past], 0)), groups], 1)  # (B, T)
    mine, others = opset.unsqueeze(groups, np.array([1, 3])), opset.unsqueeze(keys, np.array([1, 2]))
    return opset.logical_and(opset.equal(mine, others), opset.greater(mine, np.int64(0)))
