"""NNCF weight compression of one submodel."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import constant, named
from edgevlm_export.options import UNCOMPRESSED, Int4Recipe, Precision
from edgevlm_export.signal_stack import signal_stack_kept
from edgevlm_export.source.safetensors_reader import RawTensor
from edgevlm_export.verify import Array

if TYPE_CHECKING:
    import openvino as ov

SMOOTHING = 0.5
"""How much of the activations' range SmoothQuant moves into the weights, as its paper has it (Xiao et al. 2023).

With NNCF's 0.95, channels that are quiet in the calibration's pictures and loud in others are cut off: calibrated on 12
pictures the bundled model loses 0.7 points of right answers, on 24 with 0.5 none. Image tokens that show parts have a
squared error of 0.4 to 0.5 % of their square with the one, 0.04 % with the other (on 24 and 0.95, 0.06 to 0.07 %).
"""


BLOCK_WEIGHTS = 32_000_000
"""Weights of a matrix that are compressed at once to INT8: 0.13 GB in float32, of which NNCF holds several copies."""


def compress(
    model: ov.Model, precision: Precision, recipe: Int4Recipe, samples: Sequence[Mapping[str, Any]] | None = None
) -> ov.Model:
    """Return `model` compressed; `samples` hold model inputs for the precisions and recipes that need data."""
    if precision in UNCOMPRESSED:
        return model
    if samples:
        asked = {name for each in model.inputs for name in each.get_names()}
        samples = [{name: value for name, value in sample.items() if name in asked} for sample in samples]
    with signal_stack_kept(), redirect_stdout(StringIO()):  # NNCF draws progress bars and tables there
        return _compress(model, precision, recipe, samples)


def _compress(
    model: ov.Model, precision: Precision, recipe: Int4Recipe, samples: Sequence[Mapping[str, Any]] | None
) -> ov.Model:
    nncf = import_nncf()
    if precision == "w8a8":
        assert samples is not None
        return nncf.quantize(
            model,
            nncf.Dataset(list(samples)),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,  # activations with a zero point: GELU's outputs are one-sided
            subset_size=len(samples),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # It takes a third of the time and finds nothing to correct behind a MatMul.
                disable_bias_correction=True,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=SMOOTHING),
            ),
        )
    if precision == "int8":
        return _to_int8(nncf, _large_tables_in_int8(nncf, model))
    mode = nncf.CompressWeightsMode.INT4_SYM if recipe.sym else nncf.CompressWeightsMode.INT4_ASYM
    dataset = nncf.Dataset(list(samples)) if samples else None
    return nncf.compress_weights(
        model,
        mode=mode,
        ratio=recipe.ratio,
        group_size=recipe.group_size,
        all_layers=recipe.all_layers,
        dataset=dataset,
        subset_size=len(samples) if samples else 1,
        awq=recipe.awq or None,
        scale_estimation=(recipe.scale_estimation and dataset is not None) or None,
        gptq=(recipe.gptq and dataset is not None) or None,
        advanced_parameters=_advanced(),
    )


def _to_int8(nncf: Any, model: ov.Model) -> ov.Model:
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def _large_tables_in_int8(nncf: Any, model: ov.Model) -> ov.Model:
    """Return `model` with each matrix of more than `BLOCK_WEIGHTS` weights in INT8, compressed some rows at a time.

    A row's values depend on that row alone, so they are those that NNCF makes of the whole matrix, which it holds
    several times over in float32; it leaves alone what is in INT8 already.
    """
    openvino, opset = import_openvino(), import_openvino().opset13
    for table in [node for node in model.get_ops() if _is_large(node) and _has_scaled_rows(node)]:
        name, (rows, columns) = table.get_friendly_name(), table.shape
        weights = openvino.Tensor(openvino.Type.i8, [rows, columns])
        scales = openvino.Tensor(openvino.Type.f16, [rows, 1])
        step = max(1, BLOCK_WEIGHTS // columns)
        for block in (slice(start, start + step) for start in range(0, rows, step)):
            weights.data[block], scales.data[block] = _rows_in_int8(nncf, table, block)
        integers, by_row = (openvino.op.Constant(each, True) for each in (weights, scales))
        values = opset.multiply(opset.convert(named(integers, name), "f16"), named(by_row, f"{name}/scale"))
        for target in table.output(0).get_target_inputs():
            is_16_bit = target.get_node().get_type_name() == "Convert"
            target.replace_source_output((values if is_16_bit else opset.convert(values, "f32")).output(0))
    return model


def _is_large(node: ov.Node) -> bool:
    is_float = node.get_type_name() == "Constant" and node.get_element_type().is_real()
    return is_float and len(node.shape) == 2 and node.shape[0] * node.shape[1] > BLOCK_WEIGHTS


def _has_scaled_rows(node: ov.Node) -> bool:
    """Tell whether NNCF gives each row of a matrix a scale, by what reads it: not where its columns come out."""
    for target in node.output(0).get_target_inputs():
        user = target.get_node()
        kind = user.get_type_name()
        if kind == "Convert":
            if not _has_scaled_rows(user):
                return False
        elif not (kind == "Gather" or (kind == "MatMul" and user.get_attributes()["transpose_b"])):
            return False
    return True


def _rows_in_int8(nncf: Any, table: ov.Node, rows: slice) -> tuple[Array, Array]:
    """Return some rows of a matrix as NNCF compresses them: int8 weights, and a float16 scale for each row."""
    openvino, opset = import_openvino(), import_openvino().opset13
    values = RawTensor(table.data[rows], table.get_element_type().get_type_name())  # of bfloat16 the bits
    ids = opset.parameter([-1], np.int32)
    found = opset.gather(constant(values, table.get_friendly_name()), ids, np.int32(0))
    model = _to_int8(nncf, openvino.Model([opset.result(found)], [ids]))
    by_type = {node.get_element_type(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    return np.array(by_type[openvino.Type.i8].data), np.array(by_type[openvino.Type.f16].data)


def _advanced() -> Any:
    """A group size that does not divide the channels is lowered until it does, and given up for INT8 below 32.

    Scale estimation stops after two refinements and makes no grid search: on SmolVLM-256M's shape NNCF's own five
    and five take longer and end further from the reference (docs/int4.md).
    """
    from nncf.quantization.advanced_parameters import (
        AdvancedCompressionParameters,
        AdvancedScaleEstimationParameters,
        GroupSizeFallbackMode,
    )

    return AdvancedCompressionParameters(
        group_size_fallback_mode=GroupSizeFallbackMode.ADJUST,
        scale_estimation_params=AdvancedScaleEstimationParameters(initial_steps=2, scale_steps=0),
    )


def import_nncf() -> Any:
    """Import NNCF after OpenVINO's telemetry, which it would use too, has been cut off."""
    import_openvino()
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf
