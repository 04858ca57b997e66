"""From the vision transformer's patches to the language model's image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Output

if TYPE_CHECKING:
    import openvino as ov


def pixel_shuffle(x: Output, side: int, width: int, factor: int) -> ov.Node:
    """Fold `factor` x `factor` neighbouring patches into one: `(B, side^2, D)` -> `(B, side^2/f^2, D*f^2)`."""
    opset = import_openvino().opset13
    few = side // factor
    x = opset.reshape(x, np.array([-1, side, few, width * factor]), special_zero=False)
    x = opset.transpose(x, np.array([0, 2, 1, 3]))
    x = opset.reshape(x, np.array([0, few, few, width * factor**2]), special_zero=True)
    x = opset.transpose(x, np.array([0, 2, 1, 3]))
    return opset.reshape(x, np.array([0, few**2, width * factor**2]), special_zero=True)


def average_pool(x: Output, side: int, width: int, factor: int) -> ov.Node:
    """Average `factor` x `factor` neighbouring patches: `(B, side^2, D)` -> `(B, side^2/f^2, D)`."""
    opset = import_openvino().opset13
    few = side // factor
    x = opset.reshape(x, np.array([-1, factor, few, factor, width]), special_zero=False)
    x = opset.reduce_mean(x, np.array([1, 3]), keep_dims=False)  # (B * few, few, D)
    return opset.reshape(x, np.array([-1, few**2, width]), special_zero=False)
