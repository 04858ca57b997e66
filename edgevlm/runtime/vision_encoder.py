"""The vision submodel, encoder and connector: a view's inputs to `image_embeds` and features for deeper layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.families.base import IMAGE_EMBEDS, View
from edgevlm.runtime.arithmetic import ChosenArithmetic
from edgevlm.runtime.inference import infer

if TYPE_CHECKING:
    import openvino as ov


class VisionEncoder:
    """The compiled vision submodel."""

    def __init__(self, compiled: ov.CompiledModel, arithmetic: ChosenArithmetic) -> None:
        self._compiled = compiled
        self.arithmetic = arithmetic
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
