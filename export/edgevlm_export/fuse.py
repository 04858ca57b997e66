"""Passes over an OpenVINO graph, before compression and independent of the family."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from edgevlm.runtime.core import import_openvino

if TYPE_CHECKING:
    import openvino as ov

_Key: TypeAlias = tuple[Any, ...]


def fuse_sibling_matmuls(model: ov.Model) -> int:
    """Replace MatMuls that multiply one input with several constant matrices by a single MatMul and a split.

    q/k/v and gate/up are such siblings. A small model on a CPU is bound by the number of nodes, not by bytes, so one
    wide product beats three narrow ones. Biases go along when every sibling has one. Returns the number of groups.
    """
    groups: dict[_Key, list[ov.Node]] = defaultdict(list)
    for node in model.get_ordered_ops():
        if (key := _sibling_key(node)) is not None:
            groups[key].append(node)
    siblings = [group for group in groups.values() if len(group) > 1]
    for group in siblings:
        _fuse(group)
    model.validate_nodes_and_infer_types()
    return len(siblings)


def _sibling_key(node: ov.Node) -> _Key | None:
    """Return what siblings have in common, or None for a node that cannot be fused."""
    if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
        return None
    weight = _weight(node)
    if weight is None or len(weight.shape) != 2:
        return None
    transpose_b = node.get_attributes()["transpose_b"]
    source = node.input_value(0)
    inner = weight.shape[1 if transpose_b else 0]
    has_bias = _bias_add(node) is not None
    return (
        source.get_node().get_name(),
        source.get_index(),
        transpose_b,
        inner,
        str(weight.get_element_type()),
        has_bias,
    )


def _weight(node: ov.Node) -> Any | None:
    """Return the Constant behind a MatMul's second input, also through a Convert from a 16-bit type."""
    source = node.input_value(1).get_node()
    if source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    return source if source.get_type_name() == "Constant" else None


def _bias_add(node: ov.Node) -> ov.Node | None:
    """Return the Add of a constant row that is a MatMul's only consumer."""
    targets = list(node.output(0).get_target_inputs())
    if len(targets) != 1 or targets[0].get_node().get_type_name() != "Add":
        return None
    add = targets[0].get_node()
    bias = _weight(add) if targets[0].get_index() == 0 else None
    width = node.get_output_partial_shape(0)[-1]
    if bias is None or width.is_dynamic or bias.get_byte_size() == 0:
        return None
    shape = list(bias.shape)
    return add if shape and shape[-1] == width.get_length() and np.prod(shape[:-1]) == 1 else None


def _fuse(group: list[ov.Node]) -> None:
    opset = import_openvino().opset13
    transpose_b = group[0].get_attributes()["transpose_b"]
    axis = 0 if transpose_b else 1
    name = group[0].get_friendly_name()
    widths = [_weight(node).shape[axis] for node in group]  # type: ignore[union-attr]
    weight = _concatenate([_weight(node) for node in group], axis, f"{name}/fused_weight")
    fused = opset.matmul(group[0].input_value(0), weight, False, transpose_b)
    fused.set_friendly_name(f"{name}/fused")
    ends = group
    biases = [_bias_add(node) for node in group]
    if all(add is not None for add in biases):
        ends = [add for add in biases if add is not None]
        bias = _concatenate([_weight(add) for add in ends], -1, f"{name}/fused_bias")
        fused = opset.add(fused, bias)
        fused.set_friendly_name(f"{name}/fused_bias_add")
    split = opset.variadic_split(fused, -1, widths)
    split.set_friendly_name(f"{name}/split")
    for index, node in enumerate(ends):
        node.output(0).replace(split.output(index))


def _concatenate(constants: list[Any], axis: int, name: str) -> ov.Node:
    """Return one Constant of all, in their own element type, converted to float32 where the graph had converted."""
    openvino = import_openvino()
    kind = constants[0].get_element_type()
    arrays = [constant.data for constant in constants]  # a bf16 array comes as float16 bits, which copy unchanged
    if axis == -1:
        arrays = [array.reshape(1, 1, -1) for array in arrays]
    joined = np.concatenate(arrays, axis=axis)
    tensor = openvino.Tensor(kind, openvino.Shape(list(joined.shape)))
    tensor.data[...] = joined
    constant = openvino.op.Constant(tensor, True)
    constant.set_friendly_name(name)
    if kind == openvino.Type.f32:
        return constant
    convert = openvino.opset13.convert(constant, "f32")
    convert.set_friendly_name(f"{name}/convert")
    return convert
