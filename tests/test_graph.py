"""Graph passes: the numbers stay, the nodes become fewer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import VLM
from edgevlm.runtime.core import core, import_openvino
from edgevlm_export.fuse import fuse_sibling_matmuls
from tests.conftest import F32
from tests.helpers.graphs import check_fused, runtime_kinds

ov = import_openvino()
opset = ov.opset13
RANDOM = np.random.default_rng(3)
WIDTHS = (8, 4, 4)


def weights(width: int, inner: int = 16) -> np.ndarray:
    return RANDOM.normal(size=(width, inner)).astype(np.float32)


def constant(array: np.ndarray, kind: str) -> Any:
    """Return the array as a graph would hold it: float32, or 16 bits and a Convert."""
    if kind == "f32":
        return opset.constant(array)
    bits = array.astype(np.float16) if kind == "f16" else (array.view(np.uint32) >> 16).astype(np.uint16)
    tensor = ov.Tensor(getattr(ov.Type, kind), ov.Shape(list(array.shape)))
    tensor.data[...] = bits.view(np.float16)
    return opset.convert(ov.op.Constant(tensor, True), "f32")


def siblings(kind: str = "f32", bias: bool = False, transpose_b: bool = True) -> Any:
    """Return a model of three products of one input, each with its own result."""
    data = opset.parameter([1, -1, 16], np.float32, name="data")
    ends = []
    for width in WIDTHS:
        matrix = weights(width) if transpose_b else weights(width).T.copy()
        node = opset.matmul(data, constant(matrix, kind), False, transpose_b)
        if bias:
            node = opset.add(node, constant(RANDOM.normal(size=(1, 1, width)).astype(np.float32), kind))
        ends.append(opset.relu(node))
    return ov.Model(ends, [data])


def run(model: Any, data: np.ndarray) -> list[np.ndarray]:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(value) for value in compiled([data]).values()]


def count(model: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_siblings_become_one_product(kind: str, bias: bool, transpose_b: bool) -> None:
    model = siblings(kind, bias, transpose_b)
    data = RANDOM.normal(size=(1, 5, 16)).astype(np.float32)
    before = run(model, data)
    assert fuse_sibling_matmuls(model) == 1
    assert (count(model)["MatMul"], count(model)["VariadicSplit"], count(model)["Add"]) == (1, 1, int(bias))
    for want, got in zip(before, run(model, data), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert fuse_sibling_matmuls(model) == 0


def test_what_cannot_be_fused_is_left_alone() -> None:
    data = opset.parameter([1, -1, 16], np.float32)
    other = opset.parameter([1, -1, 16], np.float32)
    products = [
        opset.matmul(data, opset.constant(weights(8)), False, True),
        opset.matmul(data, opset.constant(weights(16)), False, False),  # another layout
        opset.matmul(other, opset.constant(weights(8)), False, True),  # another input
        opset.matmul(data, opset.transpose(other, [0, 2, 1]), False, False),  # no constant
    ]
    model = ov.Model(products, [data, other])
    assert fuse_sibling_matmuls(model) == 0
    assert count(model)["MatMul"] == len(products)


def test_names_stay_unique(exported: Path) -> None:
    for path in exported.glob("openvino_*_model.xml"):
        names = [node.get_friendly_name() for node in core().read_model(path).get_ordered_ops()]
        assert len(names) == len(set(names)), path.name


VIA_OPTIMUM = pytest.param("exported_via_optimum", marks=pytest.mark.optimum)


@pytest.mark.parametrize("route", ["exported", VIA_OPTIMUM, "exported_int4"])
def test_the_language_model_runs_fused(route: str, request: pytest.FixtureRequest) -> None:
    check_fused(request.getfixturevalue(route))


@pytest.mark.parametrize("route", ["exported", VIA_OPTIMUM])
def test_the_vision_part_runs_fused(route: str, request: pytest.FixtureRequest) -> None:
    """Two layers: four products each and the connector's."""
    vlm = VLM(request.getfixturevalue(route), F32)
    kinds = runtime_kinds(vlm.vision._compiled)
    assert kinds["FullyConnected"] == 2 * 4 + 1
    assert kinds["MVN"] == 2 * 2 + 1
    assert kinds["Softmax"] == 0
