"""The vision part: encoder and connector, pixel_values -> image_embeds, one tile at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgevlm.device import import_openvino

if TYPE_CHECKING:
    import openvino as ov


def specialise_vision(model: ov.Model, constants: Mapping[str, npt.NDArray[Any]], tile: tuple[int, int]) -> ov.Model:
    """Fix the vision model to one tile of `tile` = (height, width): static shapes, unchanging inputs made constants."""
    opset = import_openvino().opset13
    for parameter in model.get_parameters():
        names = parameter.output(0).get_names()
        for name in names & set(constants):
            constant = opset.constant(constants[name], dtype=parameter.get_element_type())
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
    model.reshape({"pixel_values": [1, 3, *tile]})
    return model


class VisionEncoder:
    """The compiled vision part."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled
        self._tokens, self._hidden = list(compiled.output(0).shape)[1:]

    def encode(self, pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the image_embeds `(T, tokens, hidden)` of `pixel_values` `(T, 3, H, W)`.

        Tiles are encoded one after another: they do not depend on each other, and activations stay bounded.
        """
        request = self._compiled.create_infer_request()
        image_embeds = np.empty((len(pixel_values), self._tokens, self._hidden), np.float32)
        for index in range(len(pixel_values)):
            outputs = request.infer({"pixel_values": pixel_values[index : index + 1]}, share_inputs=True)
            image_embeds[index] = outputs[0][0]
        return image_embeds
