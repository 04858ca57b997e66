"""PaddleOCR-VL: a page or an element of one at its own shape, packed and placed as in Qwen-VL, is one view of SigLIP.

Sizes, resampling and arithmetic follow transformers' Pillow-based `PaddleOCRVLImageProcessor`, the prompt follows
`PaddleOCRVLProcessor` (both of transformers 5.24), so that `detail="high"` gives equal token ids and positions. The
reference has the patches row by row and joins those of an image token after the encoder; here they come packed, as
Qwen-VL's do, each with the values that it has there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from edgevlm.families.base import RGB
from edgevlm.families.grids import Grid
from edgevlm.families.qwen_vl import QwenVL

SMALL_PAGE = 1500
"""Pixels of a page's longer side below which it is enlarged for spotting."""


class PaddleOcrVL(QwenVL):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    auto_tokens = None
    """Small print needs the pixels that a page has; the image processor never enlarges one above its least size."""
    aligns_corners = False
    page_prompts = MappingProxyType(
        {
            "page": "OCR:",
            "text": "OCR:",
            "table": "Table Recognition:",
            "formula": "Formula Recognition:",
            "chart": "Chart Recognition:",
            "spotting": "Spotting:",
            "seal": "Seal Recognition:",
        }
    )
    """Those of its model cards, the only ones that it was trained with, the last two from PaddleOCR-VL-1.5 on."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__(facts)
        self.table_side = int(facts["table_side"])

    def page_picture(self, page: RGB, task: str) -> RGB:
        """Return the page; for spotting a small one is twice as large, as PaddleOCR-VL-1.5's model card has it."""
        height, width = page.shape[:2]
        if task != "spotting" or max(height, width) >= SMALL_PAGE:
            return page
        return np.asarray(Image.fromarray(page).resize((2 * width, 2 * height), Image.Resampling.LANCZOS))

    def _smart_grid(self, height: int, width: int, most: int | None = None) -> Grid:
        """As Qwen-VL's, but a side of less than an image token is enlarged to one first, the other in proportion."""
        if height < self.unit:
            height, width = self.unit, round(width * self.unit / height)
        if width < self.unit:
            height, width = round(height * self.unit / width), self.unit
        return super()._smart_grid(height, width, most)
