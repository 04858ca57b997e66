"""GLM-OCR: a page or an element of one at its own shape, packed and placed as in Qwen-VL, is one view.

Sizes, resampling and arithmetic follow transformers' Pillow-based `Glm46VImageProcessor`, the prompt follows
`Glm46VProcessor` (both of transformers 5.24), so that `detail="high"` gives equal arrays, token ids and positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from edgevlm.families.grids import Grid
from edgevlm.families.qwen_vl import QwenVL, smart_video_grid


class GlmOcr(QwenVL):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    auto_tokens = None
    """Small print needs the pixels that a page has."""
    page_prompts = MappingProxyType(
        {
            "page": "Text Recognition:",
            "text": "Text Recognition:",
            "table": "Table Recognition:",
            "formula": "Formula Recognition:",
        }
    )
    """Those of its model card."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__(facts)
        self.least_tokens = math.ceil(self.min_pixels / self.frames / self.unit**2)

    def _smart_grid(self, height: int, width: int, most: int | None = None) -> Grid:
        """As Qwen3-VL's of a video of one temporal patch: the bounds hold for its frames together."""
        max_pixels = self.max_pixels if most is None else most * self.unit**2 * self.frames
        shape = (self.frames, height, width)
        return smart_video_grid(shape, self.frames, self.unit, self.min_pixels, max_pixels)
