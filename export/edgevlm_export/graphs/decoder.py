"""A decoder as a list of layers, each of which says what it is made of and what it keeps as OpenVINO state.

Inputs and output are named as optimum-intel names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgevlm.families.base import IMAGE_GROUPS, PER_LAYER_IDS, SLIDING_CACHE_START
from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.attention import Attention, ReusingAttention, causal_biases
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.layers import activation, embedding, linear, rms_norm, scaled, split
from edgevlm_export.graphs.modules import Embedding, Linear, Norm, Tensor
from edgevlm_export.graphs.rope import Rope, rotations
from edgevlm_export.graphs.stages import Graph, Stage, Values
from edgevlm_export.graphs.states import FixedState, State, make_stateful, value_names

if TYPE_CHECKING:
    import openvino as ov


class Mixer(Protocol):
    """What mixes positions in a layer: attention, or a kind with states of its own."""

    @property
    def rope(self) -> Rope | None:
        """The rotation whose cosines and sines it reads."""

    def states(self, index: int) -> dict[str, State]:
        """Return the states of layer `index` by name."""

    def mix(self, x: Output, index: int, values: Values, constants: Constants) -> ov.Node:
        """`(B, S, D)` -> `(B, S, D)`; sets the values of its states."""


@dataclass(frozen=True)
class GatedMLP:
    """down(act(gate(x)) * up(x))."""

    gate_proj: Linear
    up_proj: Linear | None
    """None where its rows follow those of `gate_proj`, in one module."""
    down_proj: Linear
    hidden_act: str


@dataclass(frozen=True)
class PerLayerEmbedding:
    """A small embedding of each token for one layer, which is added to the hidden states as they gate it.

    Tables and projections of all layers are columns or rows of one: this layer has `width` from `index * width` on.
    """

    index: int
    width: int
    table: Embedding
    context: Linear
    """Of the first layer's input, added to the token's."""
    context_norm: Norm
    gate: Linear
    projection: Linear
    norm: Norm
    hidden_act: str


@dataclass(frozen=True)
class Layer:
    """A mixer and an MLP, each behind an RMSNorm and added to what came in, perhaps through another one."""

    name: str
    input_norm: Norm
    mixer: Mixer
    mlp_norm: Norm
    mlp: GatedMLP
    residual_multiplier: float = 1.0
    """Of what mixer and MLP add."""
    mixer_output_norm: Norm | None = None
    """Of what the mixer gives, before it is added."""
    mlp_output_norm: Norm | None = None
    """Of what the MLP gives, before it is added."""
    per_layer: PerLayerEmbedding | None = None
    scalar: Tensor | None = None
    """What comes out is multiplied by it, `(1,)`."""


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
    embedding_multiplier: float = 1.0
    """Of `inputs_embeds`, before the first layer."""
    logits_scaling: float = 1.0
    """What the logits are divided by."""
    groups_images: bool = False
    """Image tokens of one view attend to each other both ways."""
    logit_softcap: float | None = None
    """Logits are bent to lie within it: c tanh(x / c)."""

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        return self.embed_tokens.columns

    @property
    def states(self) -> dict[str, State]:
        """What all layers keep from one call to the next, by name."""
        return {name: state for i, layer in enumerate(self.layers) for name, state in layer.mixer.states(i).items()}

    @property
    def has_fixed_states(self) -> bool:
        """Whether any layer keeps a state that cannot be cut, only restored where it was kept."""
        return any(isinstance(each, FixedState) for each in self.states.values())

    @property
    def windows(self) -> list[int | None]:
        """The sliding windows of its layers, None where one attends to all."""
        mixers = [layer.mixer for layer in self.layers]
        return list(dict.fromkeys(mixer.window for mixer in mixers if isinstance(mixer, Attention | ReusingAttention)))

    @property
    def sliding_window(self) -> int | None:
        """The longest sliding window, None where there is none."""
        return max((window for window in self.windows if window is not None), default=None)

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """Indexes of the layers with a sliding window that have a KV cache."""
        mixers = enumerate(layer.mixer for layer in self.layers)
        return tuple(i for i, mixer in mixers if isinstance(mixer, Attention) and mixer.window is not None)

    @property
    def recurrent(self) -> bool:
        """Whether any state is made of itself."""
        return any(isinstance(state, FixedState) and state.recurrent for state in self.states.values())


def language_graph(decoder: Decoder) -> Graph:
    """Return the language model: inputs_embeds `(B, S, D)` -> logits `(B, S, V)`; finished, it keeps a KV cache.

    Its position_ids are `(B, S)`, or `(axes, B, S)` where RoPE has several axes; `deepstack_embeds.K` `(B, S, D)` are
    added after layer K. `image_group_ids` `(B, S)` number the views whose image tokens
    attend to each other, from 1. The cache of layers with a sliding window lacks the first `sliding_cache_start` `(1,)`
    entries.
    """
    ropes = list({rope.name: rope for layer in decoder.layers if (rope := layer.mixer.rope)}.values())
    start = Stage(partial(rope_and_mask, ropes, decoder.windows, decoder.embedding_multiplier))
    extras = [deepstack_name(index) for index in range(decoder.deepstack)]
    layers: list[Stage] = []
    for index, layer in enumerate(decoder.layers):
        layers.append(Stage(partial(decoder_layer, layer, index), (layer,)))
        layers += [Stage(partial(add_features, name)) for name in extras[index : index + 1]]
    head = Stage(partial(lm_head, decoder), (decoder.norm, decoder.lm_head))
    axes = max((max(rope.axes) + 1 for rope in ropes if rope.axes), default=None)
    numbers = [IMAGE_GROUPS] if decoder.groups_images else []
    numbers += [PER_LAYER_IDS] if any(layer.per_layer for layer in decoder.layers) else []
    inputs = {
        "attention_mask": ("i64", (-1, -1)),
        "position_ids": ("i64", (-1, -1) if axes is None else (axes, -1, -1)),
        **dict.fromkeys(numbers, ("i64", (-1, -1))),
        **({SLIDING_CACHE_START: ("i64", (1,))} if decoder.sliding_layers else {}),
        **dict.fromkeys(["inputs_embeds", *extras], ("f32", (-1, -1, decoder.hidden_size))),
    }
    finish = partial(make_stateful, states=decoder.states)
    return Graph(inputs, [start, *layers, head], "logits", "logits", value_names(decoder.states), finish)


def text_embeddings_graph(decoder: Decoder) -> Graph:
    """Return the embedding table: input `(B, S)` of ids -> inputs_embeds `(B, S, D)`."""

    def look_up(values: Values, constants: Constants) -> None:
        values["inputs_embeds"] = embedding(values["input"], constants, decoder.embed_tokens)

    inputs = {"input": ("i64", (-1, -1))}
    return Graph(inputs, [Stage(look_up, (decoder.embed_tokens,))], "inputs_embeds", "inputs_embeds")


def rope_and_mask(
    ropes: Sequence[Rope],
    windows: Sequence[int | None],
    multiplier: float,
    values: Values,
    constants: Constants,  # noqa: ARG001
) -> None:
    """Set what layers share, cosines and sines of each RoPE and the causal mask of each sliding window, and the first
    `hidden_states`.
    """
    for rope in ropes:
        cos, sin = rope.names
        values[cos], values[sin] = rotations(values["position_ids"], rope)
    groups, first = (values.outputs.get(name) for name in (IMAGE_GROUPS, SLIDING_CACHE_START))
    biases = causal_biases(values["inputs_embeds"], values["attention_mask"], windows, groups, first)
    for name, bias in biases.items():
        values[name] = bias
    values.outputs["hidden_states"] = scaled(values["inputs_embeds"], multiplier)


def decoder_layer(layer: Layer, index: int, values: Values, constants: Constants) -> None:
    """Set `hidden_states` after one layer, and what its states become."""
    opset = import_openvino().opset13
    x = values["hidden_states"]
    mixed = layer.mixer.mix(rms_norm(x, constants, layer.input_norm), index, values, constants)
    if layer.mixer_output_norm:
        mixed = rms_norm(mixed, constants, layer.mixer_output_norm)
    x = opset.add(x, scaled(mixed, layer.residual_multiplier))
    y = gated_mlp(rms_norm(x, constants, layer.mlp_norm), layer.mlp, constants)
    if layer.mlp_output_norm:
        y = rms_norm(y, constants, layer.mlp_output_norm)
    x = opset.add(x, scaled(y, layer.residual_multiplier))
    if layer.per_layer:
        x = add_token(x, layer.per_layer, values, constants)
    if layer.scalar:
        x = opset.multiply(x, constants.vector(layer.scalar.name))
    values["hidden_states"] = named(x, layer.name)


def add_token(x: Output, each: PerLayerEmbedding, values: Values, constants: Constants) -> ov.Node:
    """Return the hidden states with a layer's own embedding of each token added."""
    opset = import_openvino().opset13
    own = slice(each.index * each.width, (each.index + 1) * each.width)
    table, projection = f"{each.table.name}.weight", f"{each.context.name}.weight"
    ids = opset.convert(values[PER_LAYER_IDS], "i32")
    token = opset.gather(constants.part(table, columns=own), ids, np.int32(0))
    token = opset.multiply(token, constants.rounded(each.table.scale, table))
    context = opset.matmul(values["inputs_embeds"], constants.part(projection, rows=own), False, True)
    context = opset.multiply(context, np.float32(each.context.columns**-0.5))
    context = named(rms_norm(context, constants, each.context_norm), f"{each.gate.name}/context")
    both = opset.multiply(opset.add(context, token), np.float32(0.5**0.5))
    gated = opset.multiply(activation(linear(x, constants, each.gate), each.hidden_act), both)
    return opset.add(x, rms_norm(linear(gated, constants, each.projection), constants, each.norm))


def deepstack_name(index: int) -> str:
    """Return what the features are called that are added after one layer of the decoder."""
    return f"deepstack_embeds.{index}"


def add_features(name: str, values: Values, constants: Constants) -> None:  # noqa: ARG001
    """Set `hidden_states` with the features called `name` added, which are 0 but at image tokens."""
    values["hidden_states"] = import_openvino().opset13.add(values["hidden_states"], values[name])


def gated_mlp(x: Output, mlp: GatedMLP, constants: Constants) -> ov.Node:
    """down(act(gate(x)) * up(x))."""
    opset = import_openvino().opset13
    both = linear(x, constants, mlp.gate_proj, *([mlp.up_proj] if mlp.up_proj else []))
    gate, up = split(both, [mlp.down_proj.columns] * 2)
    return linear(opset.multiply(activation(gate, mlp.hidden_act), up), constants, mlp.down_proj)


def lm_head(decoder: Decoder, values: Values, constants: Constants) -> None:
    """Set `logits` `(B, S, V)`: the last norm, and the scores of all tokens."""
    opset = import_openvino().opset13
    normal = rms_norm(values["hidden_states"], constants, decoder.norm)
    weight = constants.matrix(f"{decoder.lm_head.name}.weight")
    logits = named(opset.matmul(normal, weight, False, True), "lm_head")
    if decoder.logits_scaling != 1:
        logits = opset.divide(logits, np.float32(decoder.logits_scaling))
    if cap := decoder.logit_softcap:
        logits = opset.multiply(opset.tanh(opset.divide(logits, np.float32(cap))), np.float32(cap))
    values["logits"] = logits
