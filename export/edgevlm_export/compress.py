"""NNCF weight compression of one submodel."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

from edgevlm.runtime.core import import_openvino
from edgevlm_export.options import UNCOMPRESSED, Int4Recipe, Precision
from edgevlm_export.signal_stack import signal_stack_kept

if TYPE_CHECKING:
    import openvino as ov

SMOOTHING = 0.5
"""How much of the activations' range SmoothQuant moves into the weights, as its paper has it (Xiao et al. 2023).

With NNCF's 0.95, channels that are quiet in the calibration's pictures and loud in others are cut off: calibrated on 12
pictures the bundled model loses 0.7 points of right answers, on 24 with 0.5 none. Image tokens that show parts have a
squared error of 0.4 to 0.5 % of their square with the one, 0.04 % with the other (on 24 and 0.95, 0.06 to 0.07 %).
"""


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
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
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
