"""The vision submodel, encoder and connector: a view's inputs to `image_embeds` and features for deeper layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.families.base import IMAGE_EMBEDS, PIXEL_VALUES, Arrays, View
from edgevlm.runtime.core import import_openvino
from edgevlm.runtime.inference import infer

if TYPE_CHECKING:
    import openvino as ov


def make_static(model: ov.Model, constants: Arrays, view_size: tuple[int, int] | None) -> ov.Model:
    """Replace inputs by `constants`, and make shapes static where all views have one `(height, width)`."""
    opset = import_openvino().opset13
    for parameter in model.get_parameters():
        names = parameter.output(0).get_names()
        for name in names & set(constants):
            constant = opset.constant(constants[name], dtype=parameter.get_element_type())
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
    if view_size:
        model.reshape({PIXEL_VALUES: [1, 3, *view_size]})
    return model


class VisionEncoder:
    """The compiled vision submodel."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled
        first, *rest = (output.get_any_name() for output in compiled.outputs)
        self._names = {first: IMAGE_EMBEDS, **{name: name for name in rest}}

    def encode(self, views: Iterable[View]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the outputs of each view, `image_embeds` `(tokens, hidden)` the first of them.

        One infer request encodes the views one after another, so that the memory of activations is that of one view.
        """
        request = self._compiled.create_infer_request()
        for view in views:
            outputs = infer(request, dict(view.inputs()))
            yield {self._names[key.get_any_name()]: np.array(value[0]) for key, value in outputs.items()}
