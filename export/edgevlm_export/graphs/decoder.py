"""A decoder as Llama, Mistral, Qwen2 and Qwen3 have it, its KV cache kept as OpenVINO state.

Inputs, output and state are named as optimum-intel names them: the cache of layer i is
`past_key_values.{i}.keypresent.{i}.key` and `….value`, `(B, KV heads, positions, head size)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.layers import (
    Constants,
    activation,
    attention_bias,
    dimension,
    embedding,
    from_heads,
    linear,
    named,
    per_head,
    rms_norm,
    split,
    to_heads,
)
from edgevlm_export.graphs.rope import Rope, rotate, rotations
from edgevlm_export.graphs.stages import Block, Flow, Graph, Output

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True)
class Decoder:
    """The sizes and choices of a decoder, named as Hugging Face configs name them."""

    prefix: str
    """What the names of its weights begin with, up to `embed_tokens`."""
    head: str
    """The module whose weight is the LM head: `lm_head`, or the embedding table it is tied to."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        kv = self.num_key_value_heads * self.head_dim
        return self.num_attention_heads * self.head_dim, kv, kv

    def layer(self, index: int) -> str:
        """Return what the names of a layer's weights begin with."""
        return f"{self.prefix}.layers.{index}"


def shapes(decoder: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor that the decoder has in a checkpoint."""
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    q, kv, _ = decoder.widths
    yield f"{decoder.prefix}.embed_tokens.weight", (decoder.vocab_size, hidden)
    for index in range(decoder.num_hidden_layers):
        at = decoder.layer(index)
        products = {
            "self_attn.q_proj": (q, hidden, decoder.qkv_bias),
            "self_attn.k_proj": (kv, hidden, decoder.qkv_bias),
            "self_attn.v_proj": (kv, hidden, decoder.qkv_bias),
            "self_attn.o_proj": (hidden, q, decoder.o_bias),
            "mlp.gate_proj": (inner, hidden, decoder.mlp_bias),
            "mlp.up_proj": (inner, hidden, decoder.mlp_bias),
            "mlp.down_proj": (hidden, inner, decoder.mlp_bias),
        }
        for module, (rows, columns, bias) in products.items():
            yield f"{at}.{module}.weight", (rows, columns)
            if bias:
                yield f"{at}.{module}.bias", (rows,)
        for module in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{module}.weight", (hidden,)
        if decoder.qk_norm:
            yield f"{at}.self_attn.q_norm.weight", (decoder.head_dim,)
            yield f"{at}.self_attn.k_norm.weight", (decoder.head_dim,)
    yield f"{decoder.prefix}.norm.weight", (hidden,)
    yield f"{decoder.head}.weight", (decoder.vocab_size, hidden)


def language_graph(decoder: Decoder, constants: Constants) -> Graph:
    """Return the language model: inputs_embeds `(B, S, D)` -> logits `(B, S, V)`; finished, it keeps a KV cache."""
    q, kv, _ = decoder.widths
    hidden = decoder.hidden_size
    in_layer = hidden * (2 * q + 2 * kv + 3 * decoder.intermediate_size)
    layers = [
        Block(lambda flow, index=index: decoder_layer(flow, decoder, constants, index), in_layer)  # type: ignore[misc]
        for index in range(decoder.num_hidden_layers)
    ]
    start = Block(lambda flow: beginning(flow, decoder))
    head = Block(lambda flow: lm_head(flow, decoder, constants), hidden * decoder.vocab_size)
    inputs = {
        "attention_mask": ("i64", (-1, -1)),
        "position_ids": ("i64", (-1, -1)),
        "inputs_embeds": ("f32", (-1, -1, hidden)),
    }
    return Graph(inputs, [start, *layers, head], "logits", "logits", partial(make_stateful, decoder=decoder))


def text_embeddings_graph(decoder: Decoder, constants: Constants) -> Graph:
    """Return the embedding table: input `(B, S)` of ids -> inputs_embeds `(B, S, D)`."""

    def look_up(flow: Flow) -> None:
        flow["inputs_embeds"] = embedding(flow["input"], constants, f"{decoder.prefix}.embed_tokens")

    block = Block(look_up, decoder.vocab_size * decoder.hidden_size)
    return Graph({"input": ("i64", (-1, -1))}, [block], "inputs_embeds", "inputs_embeds")


def beginning(flow: Flow, decoder: Decoder) -> None:
    """What all layers share: the rotations of RoPE, and who may attend to whom."""
    flow["cos"], flow["sin"] = rotations(flow["position_ids"], decoder.rope)
    flow["attention_bias"] = causal_bias(flow["inputs_embeds"], flow["attention_mask"])
    flow.values["hidden_states"] = flow["inputs_embeds"]


def causal_bias(inputs_embeds: Output, attention_mask: Output) -> ov.Node:
    """`(B, 1, S, T)`: each of S new positions sees those of the T cached ones up to itself that are not masked.

    Order is that of the cache, not of the position ids: entries that were rewound stay in the cache, masked.
    """
    opset = import_openvino().opset13
    total, new = dimension(attention_mask, 1), dimension(inputs_embeds, 1)
    keys = opset.range(np.int64(0), total, np.int64(1), "i64")
    queries = opset.unsqueeze(opset.range(opset.subtract(total, new), total, np.int64(1), "i64"), np.int64(1))
    causal = opset.less_equal(keys, queries)  # (S, T)
    present = opset.unsqueeze(opset.convert(attention_mask, "boolean"), np.array([1, 2]))  # (B, 1, 1, T)
    return attention_bias(opset.logical_and(causal, present))


def decoder_layer(flow: Flow, decoder: Decoder, constants: Constants, index: int) -> None:
    """Attention and gated MLP, each behind an RMSNorm and added to what came in."""
    opset = import_openvino().opset13
    at, x = decoder.layer(index), flow["hidden_states"]
    normal = rms_norm(x, constants, f"{at}.input_layernorm", decoder.rms_norm_eps)
    x = opset.add(x, attention(normal, flow, decoder, constants, index))
    normal = rms_norm(x, constants, f"{at}.post_attention_layernorm", decoder.rms_norm_eps)
    flow["hidden_states"] = named(opset.add(x, gated_mlp(normal, decoder, constants, f"{at}.mlp")), at)


def attention(x: Output, flow: Flow, decoder: Decoder, constants: Constants, index: int) -> ov.Node:
    """Grouped-query attention; keys and values are named as the layer's KV cache will be."""
    opset = import_openvino().opset13
    at = f"{decoder.layer(index)}.self_attn"
    qkv = linear(x, constants, f"{at}.q_proj", f"{at}.k_proj", f"{at}.v_proj")
    q, k, v = split(qkv, decoder.widths)
    heads, kv_heads, head_dim = decoder.num_attention_heads, decoder.num_key_value_heads, decoder.head_dim
    if decoder.qk_norm:
        q = rms_norm(per_head(q, heads, head_dim), constants, f"{at}.q_norm", decoder.rms_norm_eps)
        k = rms_norm(per_head(k, kv_heads, head_dim), constants, f"{at}.k_norm", decoder.rms_norm_eps)
    q, k, v = to_heads(q, heads, head_dim), to_heads(k, kv_heads, head_dim), to_heads(v, kv_heads, head_dim)
    q, k = rotate(q, flow["cos"], flow["sin"], head_dim), rotate(k, flow["cos"], flow["sin"], head_dim)
    k = repeat_heads(named(k, cache_name(index, "key")), decoder)
    v = repeat_heads(named(v, cache_name(index, "value")), decoder)
    scale = np.float32(head_dim**-0.5)
    mixed = opset.scaled_dot_product_attention(q, k, v, flow["attention_bias"], scale, causal=False)
    return linear(from_heads(mixed, heads * head_dim), constants, f"{at}.o_proj")


def cache_name(index: int, kind: str) -> str:
    """Return what one layer's cache of keys or values is called."""
    return f"past_key_values.{index}.{kind}present.{index}.{kind}"


def make_stateful(model: ov.Model, decoder: Decoder) -> ov.Model:
    """Return the model with every layer attending to earlier calls' keys and values too.

    `beam_idx` picks the sequences to go on with.
    """
    openvino = import_openvino()
    beam_idx = openvino.op.Parameter(openvino.Type.i32, openvino.PartialShape([-1]))
    beam_idx.set_friendly_name("beam_idx")
    beam_idx.output(0).set_names({"beam_idx"})
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    names = [cache_name(index, kind) for index in range(decoder.num_hidden_layers) for kind in ("key", "value")]
    sinks = [cached(nodes[name], beam_idx, decoder) for name in names]
    return openvino.Model(model.get_results(), sinks, [*model.get_parameters(), beam_idx], model.get_friendly_name())


def cached(new: ov.Node, beam_idx: ov.Node, decoder: Decoder) -> ov.Node:
    """Put the cache called as `new` is before it, for all that read it; return what stores it."""
    opset = import_openvino().opset13
    readers, name = new.output(0).get_target_inputs(), new.get_friendly_name()
    new.set_friendly_name(f"{name}/new")
    heads, head_dim = decoder.num_key_value_heads, decoder.head_dim
    empty = opset.broadcast(np.float32(0), opset.concat([opset.shape_of(beam_idx), np.array([heads, 0, head_dim])], 0))
    past = opset.read_value(empty, name, np.float32, [-1, heads, -1, head_dim])
    present = opset.concat([opset.gather(past, beam_idx, np.int64(0)), new], -2)
    for reader in readers:
        reader.replace_source_output(present.output(0))
    return opset.assign(present, name)


def repeat_heads(x: Output, decoder: Decoder) -> ov.Node:
    """`(B, KV heads, T, d)` -> `(B, heads, T, d)`.

    The CPU plugin fuses attention with the cache only where this is a bidirectional Broadcast to a target whose heads,
    repeats and head size are constants.
    """
    opset = import_openvino().opset13
    kv_heads, head_dim = decoder.num_key_value_heads, decoder.head_dim
    repeats = decoder.num_attention_heads // kv_heads
    if repeats == 1:
        return x
    target = np.array([1, kv_heads, repeats, 1, head_dim])
    wide = opset.broadcast(opset.unsqueeze(x, np.int64(2)), target, broadcast_spec="BIDIRECTIONAL")
    return opset.reshape(wide, np.array([0, decoder.num_attention_heads, -1, head_dim]), special_zero=True)


def gated_mlp(x: Output, decoder: Decoder, constants: Constants, at: str) -> ov.Node:
    """down(act(gate(x)) * up(x))."""
    opset = import_openvino().opset13
    both = linear(x, constants, f"{at}.gate_proj", f"{at}.up_proj")
    gate, up = split(both, [decoder.intermediate_size] * 2)
    return linear(opset.multiply(activation(gate, decoder.hidden_act), up), constants, f"{at}.down_proj")


def lm_head(flow: Flow, decoder: Decoder, constants: Constants) -> None:
    """The last norm and the scores of all tokens, `(B, S, V)`."""
    opset = import_openvino().opset13
    normal = rms_norm(flow["hidden_states"], constants, f"{decoder.prefix}.norm", decoder.rms_norm_eps)
    flow["logits"] = named(opset.matmul(normal, constants.matrix(f"{decoder.head}.weight"), False, True), "lm_head")
