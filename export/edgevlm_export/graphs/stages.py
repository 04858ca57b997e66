"""A part of a model as a row of blocks, so that it can be built, run and compressed a few layers at a time.

A piece keeps no state: nothing that runs it needs any, and OpenVINO's CPU plugin does not give back the memory of a
compiled model whose attention has a state. What the whole model needs is added when its pieces have been joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from edgevlm.runtime.core import import_openvino

if TYPE_CHECKING:
    import openvino as ov

Output: TypeAlias = Any
"""An `openvino.Output`."""

_PRODUCED = "produced."
"""What the tensor of an output is named beside: an IR with two tensors of one name reads wrongly."""


@dataclass
class Flow:
    """The named values between blocks."""

    values: dict[str, Output] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Output:
        return self.values[name]

    def __setitem__(self, name: str, node: ov.Node) -> None:
        self.values[name] = node.output(0)


@dataclass(frozen=True)
class Block:
    """A stretch of a graph: reads values from the flow and puts others there."""

    build: Callable[[Flow], None]
    weights: int = 0
    """How many weights it holds."""


@dataclass(frozen=True)
class Graph:
    """One part of a model: its inputs, its blocks one after another, and the value that comes out."""

    inputs: Mapping[str, tuple[str, Sequence[int]]]
    """Name to element type and shape, -1 where it varies."""
    blocks: Sequence[Block]
    value: str
    """The value that is the part's output."""
    output: str
    """The name that the output has."""
    finish: Callable[[ov.Model], ov.Model] = lambda model: model
    """What makes of the joined pieces the whole model."""


def pieces(graph: Graph, limit: int) -> Iterator[ov.Model]:
    """Yield the graph as models of at most `limit` weights, or of one block where that alone has more.

    A piece's inputs are named as the values, its outputs are `produced`; it is built when it is asked for.
    """
    values = {name: (kind, list(shape)) for name, (kind, shape) in graph.inputs.items()}
    for blocks in _portions(graph.blocks, limit):
        model = _build(values, blocks)
        for name, output in produced(model).items():
            shape = [size.get_length() if size.is_static else -1 for size in output.get_partial_shape()]
            values[name] = (output.get_element_type().get_type_name(), shape)
        yield model


def produced(model: ov.Model) -> dict[str, Output]:
    """Return the outputs of a piece by the names of the values."""
    return {output.get_any_name().removeprefix(_PRODUCED): output for output in model.outputs}


def _portions(blocks: Sequence[Block], limit: int) -> Iterator[list[Block]]:
    portion: list[Block] = []
    held = 0
    for block in blocks:
        if held and held + block.weights > limit:
            yield portion
            portion, held = [], 0
        portion.append(block)
        held += block.weights
    if portion:
        yield portion


def _build(inputs: Mapping[str, tuple[str, list[int]]], blocks: Sequence[Block]) -> ov.Model:
    """Return a model of some blocks, whose outputs are all values that they put into the flow."""
    openvino = import_openvino()
    flow = Flow()
    parameters = []
    for name, (kind, shape) in inputs.items():
        parameter = openvino.op.Parameter(getattr(openvino.Type, kind), openvino.PartialShape(shape))
        parameter.set_friendly_name(name)
        parameter.output(0).set_names({name})
        parameters.append(parameter)
        flow[name] = parameter
    for block in blocks:
        block.build(flow)
    used = [each for each in parameters if each.output(0).get_target_inputs()]
    results = []
    for name, value in flow.values.items():
        if value.get_node().get_type_name() != "Parameter":
            value.get_tensor().set_names({_PRODUCED + name})
            results.append(openvino.opset13.result(value))
    return openvino.Model(results, used)


def join(models: Sequence[ov.Model], graph: Graph, name: str) -> ov.Model:
    """Return one finished model of the pieces.

    Each takes its inputs from the outputs of those before, or from the graph's.
    """
    openvino = import_openvino()
    parameters: dict[str, Any] = {}
    values: dict[str, Output] = {}
    for model in models:
        for parameter in model.get_parameters():
            label = parameter.get_friendly_name()
            if label in values:
                parameter.output(0).replace(values[label])
            else:
                parameters[label] = parameter
                values[label] = parameter.output(0)
        values |= {label: output.get_node().input_value(0) for label, output in produced(model).items()}
    for label, value in values.items():
        value.get_tensor().set_names({label} if label in parameters else set())
    end = values[graph.value]
    end.get_tensor().set_names({graph.output})
    order = [parameters[label] for label in graph.inputs]
    return graph.finish(openvino.Model([openvino.opset13.result(end)], order, name))
