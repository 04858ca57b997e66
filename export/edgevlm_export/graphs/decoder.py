"""A decoder as a list of layers, each of which says what it is made of; its KV cache is kept as OpenVINO state.

Inputs, output and state are named as optimum-intel names them: the cache of layer i is
`past_key_values.{i}.keypresent.{i}.key` and `….value`, `(B, KV heads, positions, head size)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.layers import (
    activation,
    attention_bias,
    dimension,
    embedding,
    from_heads,
    linear,
    per_head,
    rms_norm,
    split,
    to_heads,
)
from edgevlm_export.graphs.modules import Embedding, Linear, Norm
from edgevlm_export.graphs.rope import Rope, rotate, rotations
from edgevlm_export.graphs.stages import Graph, Stage, Values

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


Mixer: TypeAlias = Attention
"""What mixes positions in a layer; a kind that is not attention stands beside it here, with states of its own."""


@dataclass(frozen=True)
class GatedMLP:
    """down(act(gate(x)) * up(x))."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    hidden_act: str


@dataclass(frozen=True)
class Layer:
    """A mixer and an MLP, each behind an RMSNorm and added to what came in."""

    name: str
    input_norm: Norm
    mixer: Mixer
    mlp_norm: Norm
    mlp: GatedMLP


@dataclass(frozen=True)
class Decoder:
    """An embedding table, layers, a norm, and the LM head, which may be the table."""

    embed_tokens: Embedding
    layers: tuple[Layer, ...]
    norm: Norm
    lm_head: Linear
    deepstack: int = 0
    """After so many of the first layers features of the pictures' earlier layers are added: DeepStack
    (https://arxiv.org/abs/2406.04334)."""

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        return self.embed_tokens.columns


def language_graph(decoder: Decoder) -> Graph:
    """Return the language model: inputs_embeds `(B, S, D)` -> logits `(B, S, V)`; finished, it keeps a KV cache.

    Its position_ids are `(B, S)`, or `(axes, B, S)` where RoPE has several axes; `deepstack_embeds.K` `(B, S, D)` are
    added after layer K.
    """
    ropes = _ropes(decoder)
    start = Stage(partial(rope_and_mask, ropes))
    extras = [deepstack_name(index) for index in range(decoder.deepstack)]
    layers: list[Stage] = []
    for index, layer in enumerate(decoder.layers):
        layers.append(Stage(partial(decoder_layer, layer, index, ropes), (layer,)))
        layers += [Stage(partial(add_features, name)) for name in extras[index : index + 1]]
    head = Stage(partial(lm_head, decoder), (decoder.norm, decoder.lm_head))
    axes = max((max(rope.axes) + 1 for rope in ropes if rope.axes), default=None)
    inputs = {
        "attention_mask": ("i64", (-1, -1)),
        "position_ids": ("i64", (-1, -1) if axes is None else (axes, -1, -1)),
        **dict.fromkeys(["inputs_embeds", *extras], ("f32", (-1, -1, decoder.hidden_size))),
    }
    states = _states(decoder)
    finish = partial(make_stateful, states=states)
    return Graph(inputs, [start, *layers, head], "logits", "logits", list(states), finish)


def text_embeddings_graph(decoder: Decoder) -> Graph:
    """Return the embedding table: input `(B, S)` of ids -> inputs_embeds `(B, S, D)`."""

    def look_up(values: Values, constants: Constants) -> None:
        values["inputs_embeds"] = embedding(values["input"], constants, decoder.embed_tokens)

    inputs = {"input": ("i64", (-1, -1))}
    return Graph(inputs, [Stage(look_up, (decoder.embed_tokens,))], "inputs_embeds", "inputs_embeds")


def rope_and_mask(ropes: Sequence[Rope], values: Values, constants: Constants) -> None:  # noqa: ARG001
    """Set what all layers share: cosines and sines of each RoPE, and the causal mask."""
    for rope, (cos, sin) in zip(ropes, map(_rotation_names, range(len(ropes))), strict=True):
        values[cos], values[sin] = rotations(values["position_ids"], rope)
    values["attention_bias"] = causal_bias(values["inputs_embeds"], values["attention_mask"])
    values.outputs["hidden_states"] = values["inputs_embeds"]


def _ropes(decoder: Decoder) -> list[Rope]:
    """Return the decoder's RoPEs, those that several layers share once."""
    ropes: list[Rope] = []
    for layer in decoder.layers:
        if not any(layer.mixer.rope is rope for rope in ropes):
            ropes.append(layer.mixer.rope)
    return ropes


def _rotation_names(index: int) -> tuple[str, str]:
    return (f"cos.{index}", f"sin.{index}") if index else ("cos", "sin")


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


def decoder_layer(layer: Layer, index: int, ropes: Sequence[Rope], values: Values, constants: Constants) -> None:
    """Set `hidden_states` after one layer, and its new keys and values as states."""
    opset = import_openvino().opset13
    x = values["hidden_states"]
    normal = rms_norm(x, constants, layer.input_norm)
    rotation = next(number for number, rope in enumerate(ropes) if rope is layer.mixer.rope)
    cos, sin = (values[name] for name in _rotation_names(rotation))
    x = opset.add(x, attention(normal, layer.mixer, index, cos, sin, values, constants))
    normal = rms_norm(x, constants, layer.mlp_norm)
    values["hidden_states"] = named(opset.add(x, gated_mlp(normal, layer.mlp, constants)), layer.name)


def deepstack_name(index: int) -> str:
    """Return what the features are called that are added after one layer of the decoder."""
    return f"deepstack_embeds.{index}"


def add_features(name: str, values: Values, constants: Constants) -> None:  # noqa: ARG001
    """Set `hidden_states` with the features called `name` added, which are 0 but at image tokens."""
    values["hidden_states"] = import_openvino().opset13.add(values["hidden_states"], values[name])


def attention(
    x: Output, mixer: Attention, index: int, cos: Output, sin: Output, values: Values, constants: Constants
) -> ov.Node:
    """Grouped-query attention `(B, S, D)` -> `(B, S, D)`; the layer's new keys and values become states."""
    opset = import_openvino().opset13
    heads, kv_heads, head_dim = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    qkv = linear(x, constants, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    q, k, v = split(qkv, [mixer.q_proj.rows, mixer.k_proj.rows, mixer.v_proj.rows])
    if mixer.q_norm and mixer.k_norm:
        q = rms_norm(per_head(q, heads, head_dim), constants, mixer.q_norm)
        k = rms_norm(per_head(k, kv_heads, head_dim), constants, mixer.k_norm)
    q, k, v = to_heads(q, heads, head_dim), to_heads(k, kv_heads, head_dim), to_heads(v, kv_heads, head_dim)
    q, k = rotate(q, cos, sin, head_dim), rotate(k, cos, sin, head_dim)
    values[state_name(index, "key")] = named(k, f"{state_name(index, 'key')}/new")
    values[state_name(index, "value")] = named(v, f"{state_name(index, 'value')}/new")
    k, v = repeat_heads(k, mixer), repeat_heads(v, mixer)
    scale = np.float32(head_dim**-0.5)
    mixed = opset.scaled_dot_product_attention(q, k, v, values["attention_bias"], scale, causal=False)
    return linear(from_heads(mixed, heads * head_dim), constants, mixer.o_proj)


def state_name(index: int, kind: str) -> str:
    """Return what one layer's cache of keys or values is called."""
    return f"past_key_values.{index}.{kind}present.{index}.{kind}"


def _states(decoder: Decoder) -> dict[str, Attention]:
    """Return each KV state by its name, with the attention that it belongs to."""
    return {
        state_name(index, kind): layer.mixer for index, layer in enumerate(decoder.layers) for kind in ("key", "value")
    }


def make_stateful(model: ov.Model, values: Mapping[str, Output], states: Mapping[str, Attention]) -> ov.Model:
    """Return the model with every layer attending to earlier calls' keys and values too.

    `values` holds each state's new keys or values `(B, KV heads, S, d)`. `beam_idx` selects the
    sequences to go on with.
    """
    openvino = import_openvino()
    beam_idx = openvino.op.Parameter(openvino.Type.i32, openvino.PartialShape([-1]))
    beam_idx.set_friendly_name("beam_idx")
    beam_idx.output(0).set_names({"beam_idx"})
    sinks = [add_kv_state(values[name], name, beam_idx, mixer) for name, mixer in states.items()]
    return openvino.Model(model.get_results(), sinks, [*model.get_parameters(), beam_idx], model.get_friendly_name())


def add_kv_state(new: Output, name: str, beam_idx: ov.Node, mixer: Attention) -> ov.Node:
    """Put the cached keys or values before the new ones for all that read these; return the Assign that stores both."""
    opset = import_openvino().opset13
    readers = [each for each in new.get_target_inputs() if each.get_node().get_type_name() != "Result"]
    heads, head_dim = mixer.num_kv_heads, mixer.head_dim
    empty = opset.broadcast(np.float32(0), opset.concat([opset.shape_of(beam_idx), np.array([heads, 0, head_dim])], 0))
    past = opset.read_value(empty, name, np.float32, [-1, heads, -1, head_dim])
    present = opset.concat([opset.gather(past, beam_idx, np.int64(0)), new], -2)
    for reader in readers:
        reader.replace_source_output(present.output(0))
    return opset.assign(present, name)


def repeat_heads(x: Output, mixer: Attention) -> Output:
    """`(B, KV heads, T, d)` -> `(B, heads, T, d)`.

    The CPU plugin fuses attention with the cache only where this is a bidirectional Broadcast to a target whose heads,
    repeats and head size are constants.
    """
    opset = import_openvino().opset13
    kv_heads, head_dim = mixer.num_kv_heads, mixer.head_dim
    repeats = mixer.num_heads // kv_heads
    if repeats == 1:
        return x
    target = np.array([1, kv_heads, repeats, 1, head_dim])
    wide = opset.broadcast(opset.unsqueeze(x, np.int64(2)), target, broadcast_spec="BIDIRECTIONAL")
    return opset.reshape(wide, np.array([0, mixer.num_heads, -1, head_dim]), special_zero=True)


def gated_mlp(x: Output, mlp: GatedMLP, constants: Constants) -> ov.Node:
    """down(act(gate(x)) * up(x))."""
    opset = import_openvino().opset13
    both = linear(x, constants, mlp.gate_proj, mlp.up_proj)
    gate, up = split(both, [mlp.gate_proj.rows, mlp.up_proj.rows])
    return linear(opset.multiply(activation(gate, mlp.hidden_act), up), constants, mlp.down_proj)


def lm_head(decoder: Decoder, values: Values, constants: Constants) -> None:
    """Set `logits` `(B, S, V)`: the last norm, and the scores of all tokens."""
    opset = import_openvino().opset13
    normal = rms_norm(values["hidden_states"], constants, decoder.norm)
    weight = constants.matrix(f"{decoder.lm_head.name}.weight")
    values["logits"] = named(opset.matmul(normal, weight, False, True), "lm_head")
