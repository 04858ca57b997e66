"""ONNX graphs as the other routes make theirs: the KV cache inside, attention as one operation, the same names."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.errors import SourceError
from edgevlm.runtime.core import import_openvino

if TYPE_CHECKING:
    import openvino as ov

    from edgevlm_export.graphs.constants import Output

logger = logging.getLogger(__name__)
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def text_embeddings(model: ov.Model) -> ov.Model:
    """Rename what an embedding table takes and gives."""
    _rename(model.input("input_ids"), "input")
    _rename(model.output("inputs_embeds"), "inputs_embeds")
    return model


def vision(model: ov.Model, image_seq_len: int, hidden_size: int) -> ov.Model:
    """Return the vision submodel with one input, pixel_values `(T, 3, H, W)`, and image_embeds `(T, tokens, hidden)`.

    The published graphs take `(B, T, 3, H, W)` and a mask of the pixels that are no padding, which tiles have none of.
    """
    opset = import_openvino().opset13
    old = model.input("pixel_values").get_node()
    shape = old.get_output_partial_shape(0)
    pixel_values = opset.parameter(shape if len(shape) == 4 else list(shape)[1:], np.float32, name="pixel_values")
    tiles = pixel_values if len(shape) == 4 else opset.unsqueeze(pixel_values, np.int64(0))
    old.output(0).replace(tiles.output(0))
    model.remove_parameter(old)
    model.add_parameters([pixel_values])
    pixel_values.output(0).set_names({"pixel_values"})
    for mask in [each.get_node() for each in model.inputs if "pixel_attention_mask" in each.get_names()]:
        size = opset.shape_of(tiles)
        wanted = opset.gather(size, np.array([0, 1, 3, 4] if len(shape) == 5 else [0, 2, 3]), np.int64(0))
        whole = opset.broadcast(opset.constant(1, mask.get_element_type()), wanted)
        mask.output(0).replace(whole.output(0))
        model.remove_parameter(mask)
    result = model.outputs[0].get_node()
    count = opset.gather(opset.shape_of(pixel_values), np.array([0]), np.int64(0))
    target = opset.concat([count, np.array([image_seq_len, hidden_size])], 0)
    embeds = opset.reshape(result.input_value(0), target, special_zero=False)
    result.input(0).replace_source_output(embeds.output(0))
    model.output(0).get_tensor().set_names({"last_hidden_state"})
    model.validate_nodes_and_infer_types()
    fuse_attention(model)
    model.validate_nodes_and_infer_types()
    return model


def language(model: ov.Model) -> ov.Model:
    """Return the decoder with its past key values as state, of the sequences that a new input `beam_idx` `(B,)` names.

    A decoder that makes its own position ids is refused: it would take masked entries for positions.
    """
    openvino = import_openvino()
    opset = openvino.opset13
    if not any("position_ids" in each.get_names() for each in model.inputs):
        raise SourceError("the decoder has no input position_ids; export it with one")
    past = {name: match for each in model.inputs for name in each.get_names() if (match := _PAST.fullmatch(name))}
    beam_idx = opset.parameter([-1], np.int32, name="beam_idx")
    beam_idx.output(0).set_names({"beam_idx"})
    sinks, stored = [], []
    for name, match in past.items():
        present = model.output(f"present.{match[1]}.{match[2]}").get_node()
        stored.append(present.get_friendly_name())
        variable = f"{name}present.{match[1]}.{match[2]}"
        old = model.input(name).get_node()
        _, heads, _, head_dim = (
            each.get_length() if each.is_static else -1 for each in old.get_output_partial_shape(0)
        )
        if heads < 0 or head_dim < 0:
            raise SourceError(f"the decoder's {name} has no fixed number of heads and channels; export it with both")
        empty = opset.broadcast(
            np.float32(0), opset.concat([opset.shape_of(beam_idx), np.array([heads, 0, head_dim])], 0)
        )
        state = opset.read_value(empty, variable, np.float32, [-1, heads, -1, head_dim])
        old.output(0).replace(opset.gather(state, beam_idx, np.int64(0)).output(0))
        sinks.append(opset.assign(present.input_value(0).get_node(), variable))
    parameters = [each for each in model.get_parameters() if not set(past) & each.output(0).get_names()]
    results = [each for each in model.get_results() if each.get_friendly_name() not in stored]
    stateful = openvino.Model(results, sinks, [*parameters, beam_idx], "language")
    fuse_attention(stateful)
    return stateful


def _rename(output: Any, name: str) -> None:
    output.get_tensor().set_names({name})
    if output.get_node().get_type_name() == "Parameter":
        output.get_node().set_friendly_name(name)


@dataclass(frozen=True)
class _Factor:
    """A tensor with what was done to it on the way to a product."""

    value: Output
    scale: float = 1.0
    swapped: bool = False
    """Whether the last two axes are."""


def fuse_attention(model: ov.Model) -> int:
    """Replace softmax(scale q kT + mask) v by one operation each; return how many there were.

    One that is not recognised is left as it is, right but slow, and told through `logging`.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"]
    fused = sum(_fuse(node) for node in found)
    if fused < len(found):
        logger.warning(
            "%d of %d attentions of %s are of a form that is not known here; they stay several operations, and slower",
            len(found) - fused,
            len(found),
            model.get_friendly_name(),
        )
    return fused


def _fuse(softmax: ov.Node) -> bool:
    opset = import_openvino().opset13
    mixed = _only_product(softmax)
    if mixed is None:
        return False
    scores, mask = _scores(softmax.input_value(0))
    product = scores.value.get_node()
    if product.get_type_name() != "MatMul" or mixed.get_attributes()["transpose_b"]:
        return False
    q, k = _factor(product.input_value(0)), _factor(product.input_value(1))
    if q.swapped or k.swapped == product.get_attributes()["transpose_b"] or not _is_4d(q.value):
        return False
    scale = np.float32(scores.scale * q.scale * k.scale)
    keys, values = _repeated(k.value), _repeated(mixed.input_value(1))
    bias = opset.constant(np.zeros((1, 1, 1, 1), np.float32)) if mask is None else mask
    whole = opset.scaled_dot_product_attention(q.value, keys, values, bias, scale, causal=False)
    whole.set_friendly_name(f"{mixed.get_friendly_name()}/attention")
    mixed.output(0).replace(whole.output(0))
    return True


def _only_product(node: ov.Node) -> ov.Node | None:
    """Return the MatMul that alone reads a value, as its first factor, or None."""
    readers = list(node.output(0).get_target_inputs())
    if len(readers) != 1 or readers[0].get_index() != 0:
        return None
    reader = readers[0].get_node()
    if _is_cast(reader):
        return _only_product(reader)
    return reader if reader.get_type_name() == "MatMul" else None


def _is_cast(node: ov.Node) -> bool:
    """Tell whether a node converts float32 to float32, as exporters leave them behind."""
    return bool(node.get_type_name() == "Convert" and node.get_input_element_type(0) == node.get_output_element_type(0))


def _scores(value: Output) -> tuple[_Factor, Output | None]:
    """Return the scaled product and the mask that is added to it, if any."""
    node = value.get_node()
    if node.get_type_name() != "Add":
        return _factor(value), None
    for index in (0, 1):
        found = _factor(node.input_value(index))
        if found.value.get_node().get_type_name() == "MatMul":
            return found, node.input_value(1 - index)
    return _factor(value), None


def _factor(value: Output) -> _Factor:
    """Follow a tensor back through multiplications by a number and swaps of the last two axes."""
    opset = import_openvino().opset13
    node = value.get_node()
    kind = node.get_type_name()
    if _is_cast(node):
        return _factor(node.input_value(0))
    if kind in ("Multiply", "Divide"):
        number = _number(node.input_value(1))
        if number is not None:
            inner = _factor(node.input_value(0))
            return _Factor(inner.value, inner.scale * (number if kind == "Multiply" else 1 / number), inner.swapped)
    if kind == "Transpose" and node.input_value(1).get_node().get_type_name() == "Constant":
        order = [int(axis) for axis in node.input_value(1).get_node().data.ravel()]
        if order == [0, 1, 3, 2]:
            inner = _factor(node.input_value(0))
            return _Factor(inner.value, inner.scale, not inner.swapped)
        if order == [0, 2, 3, 1]:  # heads brought forward, and swapped, in one
            forward = opset.transpose(node.input_value(0), np.array([0, 2, 1, 3]))
            return _Factor(forward.output(0), swapped=True)
    return _Factor(value)


def _is_4d(value: Output) -> bool:
    rank = value.get_partial_shape().rank
    return bool(rank.is_static and rank.get_length() == 4)


def _number(value: Output) -> float | None:
    """Return the one number that a value always is, or None."""
    node = value.get_node()
    if node.get_type_name() != "Constant" or node.data.size != 1:
        return None
    return float(node.data.ravel()[0])


def _repeated(value: Output) -> Output:
    """Say the repeat of grouped keys or values as the CPU plugin knows it: constant but for batch and length."""
    opset = import_openvino().opset13
    source = value
    for kind in ("Reshape", "Broadcast", "Unsqueeze"):
        if source.get_node().get_type_name() != kind:
            return value
        source = source.get_node().input_value(0)
    if not _is_4d(source) or not _is_4d(value):
        return value
    few, many = source.get_partial_shape(), value.get_partial_shape()
    if any(each.is_dynamic for each in (few[1], few[3], many[1])):
        return value
    heads, kv_heads, head_dim = many[1].get_length(), few[1].get_length(), few[3].get_length()
    _read_length_from(source, value, heads)
    target = np.array([1, kv_heads, heads // kv_heads, 1, head_dim])
    wide = opset.broadcast(opset.unsqueeze(source, np.int64(2)), target, broadcast_spec="BIDIRECTIONAL")
    return opset.reshape(wide, np.array([0, heads, -1, head_dim]), special_zero=True).output(0)


def _read_length_from(source: Output, repeated: Output, heads: int) -> None:
    """Let who asks for the size of repeated keys ask before the repeat, which then is attention's alone."""
    opset = import_openvino().opset13
    asking = [each.get_node() for each in repeated.get_target_inputs() if each.get_node().get_type_name() == "ShapeOf"]
    for node in asking:
        size = opset.shape_of(source, node.get_output_element_type(0).get_type_name())
        parts = [opset.gather(size, np.array([index]), np.int64(0)) for index in (0, 2, 3)]
        kind = size.get_output_element_type(0)
        wanted = opset.concat([parts[0], opset.constant([heads], kind), *parts[1:]], 0)
        node.output(0).replace(wanted.output(0))
