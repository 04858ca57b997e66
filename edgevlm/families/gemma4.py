"""Gemma 4 (E2B, E4B): a picture at about its own shape, as one view, its patches pooled to image tokens.

Sizes, resampling and arithmetic follow transformers' Pillow-based `Gemma4ImageProcessor`, and the prompt follows
`Gemma4Processor` (both of transformers 5.24), so that `detail="high"` gives equal token ids, and equal arrays but for
padding and the order of patches. Sound and videos are left out.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.families.base import (
    PER_LAYER_IDS,
    PIXEL_VALUES,
    RGB,
    Array,
    Arrays,
    Family,
    ImageBudget,
    LanguageInputs,
    View,
    Visual,
)
from edgevlm.families.grids import Grid
from edgevlm.families.imaging import normalisation, normalised
from edgevlm.families.packing import packed_order

LOW_TOKENS = 70
"""The least `max_soft_tokens` that the model was trained with."""


class Gemma4(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        preprocessing = facts["preprocessing"]
        self.patch_size, self.pooled = int(preprocessing["patch_size"]), int(preprocessing["pooling_kernel_size"])
        self.unit = self.patch_size * self.pooled
        """Side of the square of pixels that becomes one image token."""
        self.most_tokens = int(preprocessing["max_soft_tokens"])
        self.resample = Image.Resampling(int(preprocessing["resample"]))
        self.lookup = normalisation(preprocessing)
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id, self.pad_token_id = int(facts["image_token_id"]), int(facts["pad_token_id"])
        self.boi_token, self.eoi_token = str(facts["boi_token"]), str(facts["eoi_token"])

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the one view of a picture `(H, W, 3)`, its sides multiples of `unit`.

        `high` is what the checkpoint's own processor does: it enlarges or shrinks a picture to as many image tokens as
        fit. `auto` never enlarges it, nor does `low`, which takes `LOW_TOKENS` at most.
        """
        budget.check(1)
        height, width = image.shape[:2]
        most, room = self.most_tokens, max(1, height * width // self.unit**2)
        if budget.detail != "high":
            most = min(most, room, LOW_TOKENS if budget.detail == "low" else room)
        grid = pooled_grid(height, width, self.unit, most)
        if budget.max_image_tokens is not None and grid.tokens > budget.max_image_tokens:
            grid = pooled_grid(height, width, self.unit, budget.max_image_tokens)
        size = (grid.cols * self.unit, grid.rows * self.unit)
        pixels = np.asarray(Image.fromarray(image).resize(size, self.resample))
        return Visual([View(pixels, partial(self._encoder_inputs, pixels))], grid)

    def image_text(self, layout: Hashable) -> str:
        """Return the image block of the prompt."""
        assert isinstance(layout, Grid)
        return self.boi_token + self.image_token * layout.tokens + self.eoi_token

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.image_text(Grid(1, 1))

    def language_inputs(
        self,
        ids: npt.NDArray[np.int64],
        layouts: Sequence[Hashable],
        features: Sequence[Arrays],
    ) -> LanguageInputs:
        """Return the positions of a prompt, and the ids whose per-layer embeddings its tokens have."""
        own = np.where(self.image_rows(ids), self.pad_token_id, ids)
        return LanguageInputs(super().language_inputs(ids, layouts, features).positions, {PER_LAYER_IDS: own})

    def _encoder_inputs(self, pixels: RGB) -> dict[str, Array]:
        """Return the encoder's inputs for a view: `pixel_values` `(1, N, P * P * 3)`, `patch_positions` `(1, N, 2)`."""
        rows, cols = (side // self.patch_size for side in pixels.shape[:2])
        order = packed_order(rows, cols, self.pooled)
        values = normalised(pixels, self.lookup)[0].reshape(3, rows, self.patch_size, cols, self.patch_size)
        patches = values.transpose(1, 3, 2, 4, 0).reshape(rows * cols, -1)[order]
        return {PIXEL_VALUES: patches[None], "patch_positions": np.stack([order % cols, order // cols], axis=-1)[None]}


def pooled_grid(height: int, width: int, unit: int, most: int) -> Grid:
    """Return the grid of at most `most` squares of `unit` pixels that is largest at a picture's shape.

    `get_aspect_ratio_preserving_size` of the reference.
    """
    factor = math.sqrt(most * unit**2 / (height * width))
    rows, cols = (math.floor(factor * side / unit) for side in (height, width))
    if rows == cols == 0:
        return Grid(1, 1)
    if rows == 0:
        return Grid(1, min(width // height, most))
    if cols == 0:
        return Grid(min(height // width, most), 1)
    return Grid(rows, cols)
