"""LightOnOCR: a page at its own shape is one view of Pixtral's transformer.

Sizes, resampling and arithmetic follow transformers' Pillow-based `PixtralImageProcessor`, and the prompt follows
`LightOnOcrProcessor` (both of transformers 5.24), so that `detail="high"` gives equal arrays and equal token ids.

A patch is `patch_size` pixels square, and `merge_size` x `merge_size` of them make an image token. An odd last row or
column of patches makes none, as in the reference.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from edgevlm.families.base import PAGE_PROMPTS, PIXEL_VALUES, RGB, Array, Family, ImageBudget, View, Visual
from edgevlm.families.grids import Grid
from edgevlm.families.imaging import normalisation
from edgevlm.families.packing import packed_order, packed_pixels

LOW_TOKENS = 256
"""Most image tokens at `detail="low"`."""


class LightOnOcr(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    page_prompts = MappingProxyType(dict.fromkeys(PAGE_PROMPTS, ""))
    """It was trained with the page alone."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.patch_size, self.merge_size = int(facts["patch_size"]), int(facts["merge_size"])
        self.unit, self.longest_edge = int(facts["unit"]), int(facts["longest_edge"])
        self.resample = Image.Resampling(int(facts["resample"]))
        self.lookup = normalisation(facts)
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the one view of a page `(H, W, 3)`, its sides multiples of `unit`.

        `high` and `auto` are what the checkpoint's own processor does, which shrinks a page to `longest_edge` and
        enlarges none. `low` also shrinks one of more than `LOW_TOKENS` image tokens, and a budget one of more than
        that. A page of less than an image token, which the reference does not take, is enlarged to one.
        """
        height, width = image.shape[:2]
        bounds = (budget.max_image_tokens, LOW_TOKENS if budget.detail == "low" else None)
        most = min((each for each in bounds if each is not None), default=None)
        rows, cols = self._patches(height, width, self._edge(height, width, most))
        size = (cols * self.patch_size, rows * self.patch_size)
        pixels = np.asarray(Image.fromarray(image).resize(size, self.resample))
        return Visual([View(pixels, partial(self._encoder_inputs, pixels))], self._grid(rows, cols))

    def image_text(self, layout: Hashable) -> str:
        """Return the image tokens of a page; those around them are the template's."""
        assert isinstance(layout, Grid)
        return self.image_token * layout.tokens

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.image_token

    def _edge(self, height: int, width: int, most: int | None) -> int:
        """Return the longest side that a page may have, for at most `most` image tokens."""

        def tokens(edge: int) -> int:
            return self._grid(*self._patches(height, width, edge)).tokens

        return self.longest_edge if most is None else bisect_right(range(1, self.longest_edge + 1), most, key=tokens)

    def _patches(self, height: int, width: int, edge: int) -> tuple[int, int]:
        """Return rows and columns of patches, the reference's but for the least: `get_resize_output_image_size`."""
        ratio = max(height / edge, width / edge)
        sides = (math.floor(side / ratio) if ratio > 1 else side for side in (height, width))
        units = (math.ceil(side / self.unit) * self.unit // self.patch_size for side in sides)
        rows, cols = (max(each, self.merge_size) for each in units)
        return rows, cols

    def _grid(self, rows: int, cols: int) -> Grid:
        return Grid(rows // self.merge_size, cols // self.merge_size)

    def _encoder_inputs(self, pixels: RGB) -> dict[str, Array]:
        """Return the encoder's inputs for a view of N patches in raster order and M image tokens, a batch of one.

        They are `pixel_values` `(1, N, C * P * P)`, `patch_positions` `(1, N, 2)`, and `merge_index`, the patches of
        each image token, `(1, merge_size^2 * M)`.
        """
        rows, cols = (side // self.patch_size for side in pixels.shape[:2])
        places = np.arange(rows * cols)
        whole_rows, whole_cols = (count // self.merge_size * self.merge_size for count in (rows, cols))
        row, col = np.divmod(packed_order(whole_rows, whole_cols, self.merge_size), whole_cols)
        inputs = {
            PIXEL_VALUES: packed_pixels(pixels, places, self.patch_size, 1, self.lookup),
            "patch_positions": np.stack(np.divmod(places, cols), axis=-1),
            "merge_index": row * cols + col,
        }
        return {name: array[None] for name, array in inputs.items()}
