"""What a layer keeps from one call to the next, as explicit OpenVINO state.

Names are those of optimum-intel: the cache of layer i is `past_key_values.{i}.keypresent.{i}.key` and `….value`, or,
for a state that does not grow, `cache_params.past.{kind}.{i}cache_params.present.{kind}.{i}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Output, named
from edgevlm_export.graphs.layers import dimension
from edgevlm_export.graphs.stages import Values

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True)
class KVCache:
    """Keys or values `(B, heads, T, head_dim)`, which grow by those of every call.

    A stage sets the value of this name to the new ones, `(B, heads, S, head_dim)`, and reads that value.
    """

    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class FixedState:
    """A state `(B, *shape)` that every call replaces, zeros at first: of a convolution or a recurrence.

    A stage reads `previous_state` and sets the value of the state's name to what follows it.
    """

    shape: tuple[int, ...]


State: TypeAlias = KVCache | FixedState


def cache_name(index: int, kind: str) -> str:
    """Return what one layer's cache of keys or values is called."""
    return f"past_key_values.{index}.{kind}present.{index}.{kind}"


def state_name(index: int, kind: str) -> str:
    """Return what one layer's state of a fixed size is called, such as `conv` or `recurrent`."""
    return f"cache_params.past.{kind}.{index}cache_params.present.{kind}.{index}"


def previous_name(name: str) -> str:
    """Return what the value is called that a fixed state had before this call."""
    return f"{name}/previous"


def value_names(states: Mapping[str, State]) -> list[str]:
    """Return the names of all values between stages that belong to states."""
    fixed = [previous_name(name) for name, state in states.items() if isinstance(state, FixedState)]
    return [*states, *fixed]


def previous_state(x: Output, name: str, state: FixedState, values: Values) -> Output:
    """Return the state of that name before this call, for as many sequences as `x` `(B, ...)` has: zeros as yet.

    `make_stateful` puts what the last call left in its place.
    """
    opset = import_openvino().opset13
    batch = opset.unsqueeze(dimension(x, 0), np.int64(0))
    zeros = opset.broadcast(np.float32(0), opset.concat([batch, np.array(state.shape)], 0))
    values[previous_name(name)] = named(zeros, previous_name(name))
    return values[previous_name(name)]


def make_stateful(model: ov.Model, values: Mapping[str, Output], states: Mapping[str, State]) -> ov.Model:
    """Return the model with every layer going on from earlier calls.

    `values` holds what the stages set for each state. `beam_idx` selects the sequences to go on with.
    """
    openvino = import_openvino()
    beam_idx = openvino.op.Parameter(openvino.Type.i32, openvino.PartialShape([-1]))
    beam_idx.set_friendly_name("beam_idx")
    beam_idx.output(0).set_names({"beam_idx"})
    sinks = [
        _grow(values[name], name, beam_idx, state)
        if isinstance(state, KVCache)
        else _replace(values[previous_name(name)], values[name], name, beam_idx, state)
        for name, state in states.items()
    ]
    return openvino.Model(model.get_results(), sinks, [*model.get_parameters(), beam_idx], model.get_friendly_name())


def _past(name: str, beam_idx: ov.Node, initial: tuple[int, ...], shape: tuple[int, ...]) -> ov.Node:
    """Return a state as the last call left it, at first zeros of the shape `(B, *initial)`."""
    opset = import_openvino().opset13
    zeros = opset.broadcast(np.float32(0), opset.concat([opset.shape_of(beam_idx), np.array(initial)], 0))
    return opset.gather(opset.read_value(zeros, name, np.float32, [-1, *shape]), beam_idx, np.int64(0))


def _grow(new: Output, name: str, beam_idx: ov.Node, cache: KVCache) -> ov.Node:
    """Put the cached keys or values before the new ones for all that read these; return the Assign that stores both."""
    opset = import_openvino().opset13
    readers = _readers(new)
    heads, head_dim = cache.num_heads, cache.head_dim
    past = _past(name, beam_idx, (heads, 0, head_dim), (heads, -1, head_dim))
    present = opset.concat([past, new], -2)
    for reader in readers:
        reader.replace_source_output(present.output(0))
    return opset.assign(present, name)


def _replace(previous: Output, new: Output, name: str, beam_idx: ov.Node, state: FixedState) -> ov.Node:
    """Let what the last call left stand for `previous`; return the Assign that stores `new`."""
    past = _past(name, beam_idx, state.shape, state.shape)
    for reader in _readers(previous):
        reader.replace_source_output(past.output(0))
    opset, node = import_openvino().opset13, new.get_node()
    only = node if node.get_output_size() == 1 else opset.concat([new], 0)  # an Assign takes a node of one output
    return opset.assign(only, name)


def _readers(value: Output) -> list[ov.Input]:
    return [each for each in value.get_target_inputs() if each.get_node().get_type_name() != "Result"]
