"""A submodel as a sequence of stages, so that it can be built, run and compressed a few layers at a time.

The stages are partitioned into models of bounded size. None of these has OpenVINO state: running one needs none, and
the CPU plugin does not give back the memory of a compiled model whose attention has state. `stitch` joins them and lets
the graph's `finish` add the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output
from edgevlm_export.graphs.modules import Shape, declared

if TYPE_CHECKING:
    import openvino as ov

_PREFIX = "produced."
"""Prefix for the tensor names of stage outputs: duplicate tensor names break IR serialisation."""


@dataclass
class Values:
    """The named values between stages."""

    outputs: dict[str, Output] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Output:
        return self.outputs[name]

    def __setitem__(self, name: str, node: ov.Node) -> None:
        self.outputs[name] = node.output(0)


@dataclass(frozen=True)
class Stage:
    """A stretch of a graph: reads some values and sets others."""

    build: Callable[[Values, Constants], None]
    modules: Sequence[Any] = ()
    """The modules, or dataclasses of modules, whose tensors it reads."""

    @property
    def weights(self) -> int:
        """Number of weights in its matrices."""
        return sum(math.prod(shape) for _, shape in declared(self.modules) if len(shape) > 1)


@dataclass(frozen=True)
class Graph:
    """One submodel: its inputs, its stages in order, and the values that are its outputs."""

    inputs: Mapping[str, tuple[str, Sequence[int]]]
    """Name to element type and shape, -1 where it varies."""
    stages: Sequence[Stage]
    value: str
    output: str
    """The name that the output gets."""
    states: Sequence[str] = ()
    """Values that `finish` turns into state; no stage reads another's."""
    finish: Callable[[ov.Model, Mapping[str, Output]], ov.Model] = lambda model, _: model
    """Makes the whole submodel from the stitched model and its values."""
    others: Sequence[str] = ()
    """Values that are outputs, too, after the first and under their own names."""

    def tensors(self) -> dict[str, Shape]:
        """Return name and shape of every tensor that the stages read."""
        return dict(declared([stage.modules for stage in self.stages]))


def partition(graph: Graph, constants: Constants, limit: int) -> Iterator[ov.Model]:
    """Yield the graph as models of at most `limit` weights, or of one stage where that alone has more.

    Each is built when it is asked for. Its inputs are named as the values, and so are its `outputs_of`.
    """
    values = {name: (dtype, list(shape)) for name, (dtype, shape) in graph.inputs.items()}
    for stages in _portions(graph.stages, limit):
        model = _build(values, stages, constants)
        for name, output in outputs_of(model).items():
            shape = [size.get_length() if size.is_static else -1 for size in output.get_partial_shape()]
            values[name] = (output.get_element_type().get_type_name(), shape)
        yield model


def outputs_of(model: ov.Model) -> dict[str, Output]:
    """Return the outputs of a partition by the names of the values."""
    return {output.get_any_name().removeprefix(_PREFIX): output for output in model.outputs}


def _portions(stages: Sequence[Stage], limit: int) -> Iterator[list[Stage]]:
    portion: list[Stage] = []
    weights = 0
    for stage in stages:
        if weights and weights + stage.weights > limit:
            yield portion
            portion, weights = [], 0
        portion.append(stage)
        weights += stage.weights
    if portion:
        yield portion


def _build(inputs: Mapping[str, tuple[str, list[int]]], stages: Sequence[Stage], constants: Constants) -> ov.Model:
    """Return a model of some stages, whose outputs are all values that they set."""
    openvino = import_openvino()
    values = Values()
    parameters = []
    for name, (dtype, shape) in inputs.items():
        parameter = openvino.op.Parameter(getattr(openvino.Type, dtype), openvino.PartialShape(shape))
        parameter.set_friendly_name(name)
        parameter.output(0).set_names({name})
        parameters.append(parameter)
        values[name] = parameter
    for stage in stages:
        stage.build(values, constants)
    used = [each for each in parameters if each.output(0).get_target_inputs()]
    results = []
    for name, value in values.outputs.items():
        if value.get_node().get_type_name() != "Parameter":
            value.get_tensor().set_names({_PREFIX + name})
            results.append(openvino.opset13.result(value))
    return openvino.Model(results, used)


def stitch(models: Sequence[ov.Model], graph: Graph, name: str) -> ov.Model:
    """Return one finished model of a graph's partitions.

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
        values |= {label: output.get_node().input_value(0) for label, output in outputs_of(model).items()}
    for label, value in values.items():
        value.get_tensor().set_names({label} if label in parameters else set())
    ends = {graph.output: values[graph.value], **{label: values[label] for label in graph.others}}
    for label, end in ends.items():
        end.get_tensor().set_names({label})
    results = [openvino.opset13.result(end) for end in ends.values()]
    order = [parameters[label] for label in graph.inputs]
    return graph.finish(openvino.Model(results, order, name), values)
