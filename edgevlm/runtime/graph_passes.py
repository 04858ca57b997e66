"""What is changed in a submodel's graph as it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino

if TYPE_CHECKING:
    import openvino as ov

LOGITS_TO_KEEP = "logits_to_keep"


def keep_last_logits(model: ov.Model, axis: int = 1) -> ov.Model:
    """Add an input `logits_to_keep` (int64 `(1,)`): the head then reads only that many last positions.

    They lie along `axis`: 1 of `(B, S, hidden)`, 0 of paged attention's `(S, 1, hidden)`. At prefill this spares
    `sequence - 1` rows of the largest matrix product in a small model.
    """
    openvino = import_openvino()
    opset = openvino.opset13
    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    keep = opset.parameter([1], np.int64, name=LOGITS_TO_KEEP)
    keep.output(0).set_names({LOGITS_TO_KEEP})
    one = np.array([1], np.int64)
    start = opset.multiply(keep, np.array([-1], np.int64))
    stop = np.array([np.iinfo(np.int32).max], np.int64)
    kept = opset.slice(head.input_value(0), start, stop, one, np.array([axis], np.int64))
    head.input(0).replace_source_output(kept.output(0))
    model.add_parameters([keep])
    model.validate_nodes_and_infer_types()
    return model


def drop_activation_quantization(model: ov.Model) -> ov.Model:
    """Bypass every FakeQuantize of an activation; one of weights, whose input is constant, stays."""
    constant = _constant_nodes(model)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize" and node.get_name() not in constant:
            node.output(0).replace(node.input_value(0))
    model.validate_nodes_and_infer_types()
    return model


def _constant_nodes(model: ov.Model) -> set[str]:
    """Return the names of the nodes that depend on no input."""
    names: set[str] = set()
    for node in model.get_ordered_ops():
        sources = [value.get_node().get_name() for value in node.input_values()]
        if node.get_type_name() == "Constant" or (sources and names.issuperset(sources)):
            names.add(node.get_name())
    return names


def decompress_weights(model: ov.Model) -> ov.Model:
    """Fold compressed weights, and all else that is constant, into float32 constants."""
    import_openvino()
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    return model
