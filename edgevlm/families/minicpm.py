"""MiniCPM-V 4.6: a picture as one view at its own shape, and where it has the pixels for it in slices besides.

Sizes, slices, resampling and arithmetic follow transformers' Pillow-based `MiniCPMV4_6ImageProcessor`, the prompt its
`MiniCPMV4_6Processor`, and where patches stand `get_vision_nearest_position_ids` (all of transformers 5.24), so that
`detail="high"` gives equal arrays and token ids.

An image token is made of 4 x 4 patches: the encoder merges 2 x 2 on its way, and 2 x 2 of these at its end. It takes
patches packed: those of an image token one after another, window by window, the tokens row by row.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.families.base import (
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
from edgevlm.families.grids import Grid, nearest_grid
from edgevlm.families.imaging import normalisation
from edgevlm.families.packing import packed_pixels

MERGED = 4
"""Patches along each side of an image token."""


class Slices(NamedTuple):
    """Image tokens of the whole picture, and of its slices, which lie in rows and columns."""

    whole: Grid
    rows: int = 0
    cols: int = 0
    each: Grid = Grid(0, 0)

    @property
    def tokens(self) -> int:
        """How many image tokens there are."""
        return self.whole.tokens + self.rows * self.cols * self.each.tokens


class MiniCPM(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        preprocessing = facts["preprocessing"]
        self.patch_size, self.table_side = int(facts["patch_size"]), int(facts["table_side"])
        self.unit = self.patch_size * MERGED
        """Side of the square of pixels that becomes one image token."""
        self.resolution, self.max_slices = int(preprocessing["scale_resolution"]), int(preprocessing["max_slice_nums"])
        self.least_tokens = max(1, (self.resolution // self.unit) ** 2 // 4)
        self.resample = Image.Resampling(int(preprocessing["resample"]))
        self.lookup = normalisation(preprocessing)
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])
        self.numbers_images = bool(facts["use_image_id"])
        self.image_tags, self.slice_tags, self.id_tags = (
            (str(facts[f"{name}_start_token"]), str(facts[f"{name}_end_token"]))
            for name in ("image", "slice", "image_id")
        )

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the whole picture `(H, W, 3)` as a view, and its slices after it.

        `high` and `auto` are what the checkpoint's own processor does, which slices a picture that has the pixels for
        it; `low` is the whole alone. A budget takes fewer slices, and fewer image tokens of the whole.
        """
        budget.check(self.least_tokens)
        layout = self._layout(image.shape[0], image.shape[1], budget)
        pixels = [self._resized(image, layout.whole)]
        if layout.rows:
            rows, cols, each = layout.rows, layout.cols, layout.each
            sliced = self._resized(image, Grid(rows * each.rows, cols * each.cols))
            height, width = each.rows * self.unit, each.cols * self.unit
            pixels += [
                sliced[row * height : (row + 1) * height, col * width : (col + 1) * width]
                for row in range(rows)
                for col in range(cols)
            ]
        return Visual([View(each, partial(self._encoder_inputs, each)) for each in pixels], layout)

    def image_text(self, layout: Hashable) -> str:
        """Return the image tokens of the whole and of the slices, row by row, between their tags."""
        assert isinstance(layout, Slices)
        text = self._tagged(self.image_tags, layout.whole)
        return text + "\n".join([self._tagged(self.slice_tags, layout.each) * layout.cols] * layout.rows)

    def image_texts(self, layouts: Sequence[Hashable]) -> list[str]:
        """Return the text of each picture, its number in the prompt before it."""
        before, after = self.id_tags
        numbers = [f"{before}{number}{after}" if self.numbers_images else "" for number in range(len(layouts))]
        return [number + self.image_text(layout) for number, layout in zip(numbers, layouts, strict=True)]

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.image_token.join(["", *self.id_tags, *self.image_tags, *self.slice_tags])

    def language_inputs(
        self,
        ids: npt.NDArray[np.int64],
        layouts: Sequence[Hashable],  # noqa: ARG002
        features: Sequence[Arrays],  # noqa: ARG002
    ) -> LanguageInputs:
        """Return the positions `(3, n)`: the decoder has three axes, and this family counts on all of them alike."""
        return LanguageInputs(np.tile(np.arange(len(ids), dtype=np.int64), (3, 1)))

    def _tagged(self, tags: tuple[str, str], grid: Grid) -> str:
        return tags[0] + self.image_token * grid.tokens + tags[1]

    def _layout(self, height: int, width: int, budget: ImageBudget) -> Slices:
        """Return the reference's layout with as many slices as the budget allows."""
        views = math.inf if budget.max_views is None else budget.max_views
        tokens = math.inf if budget.max_image_tokens is None else budget.max_image_tokens
        for most in range(1 if budget.detail == "low" else self.max_slices, 0, -1):
            layout = self._sliced(height, width, most)
            if layout.rows * layout.cols < views and layout.tokens <= tokens:
                return layout
        whole = self._best_grid(height, width, enlarge=True)
        most = int(min(tokens, whole.tokens))
        return Slices(whole if whole.tokens <= tokens else nearest_grid(height, width, self.least_tokens, most))

    def _sliced(self, height: int, width: int, most: int) -> Slices:
        """Return the reference's layout with at most so many slices."""
        split = slice_grid(height, width, self.resolution, most)
        if split is None:
            return Slices(self._best_grid(height, width, enlarge=True))
        rows, cols = split
        refined = (divisible(height, rows) / rows, divisible(width, cols) / cols)
        whole, each = self._best_grid(height, width), self._best_grid(*refined, enlarge=True)
        return Slices(whole, rows, cols, each)

    def _best_grid(self, height: float, width: float, *, enlarge: bool = False) -> Grid:
        """Return the image tokens of a view at about the resolution: `find_best_resize`; `enlarge` to reach it, too."""
        if height * width > self.resolution**2 or enlarge:
            aspect_ratio = width / height
            height = int(self.resolution / math.sqrt(aspect_ratio))
            width = int(height * aspect_ratio)
        return Grid(*(divisible(side, self.unit) // self.unit for side in (height, width)))

    def _resized(self, image: RGB, grid: Grid) -> RGB:
        size = (grid.cols * self.unit, grid.rows * self.unit)
        return np.asarray(Image.fromarray(image).resize(size, self.resample))

    def _encoder_inputs(self, pixels: RGB) -> dict[str, Array]:
        """Return the encoder's inputs for a view `(H, W, 3)` of N patches, a batch of one.

        `pixel_values` are `(1, N, 3 * P * P)`, `patch_position_ids` `(1, N)`.
        """
        rows, cols = (side // self.patch_size for side in pixels.shape[:2])
        order, places = packed_order(rows, cols), nearest_positions(rows, cols, self.table_side)
        values = packed_pixels(pixels, order, self.patch_size, 1, self.lookup)
        return {PIXEL_VALUES: values[None], "patch_position_ids": places[order][None]}


def divisible(length: float, divisor: int) -> int:
    """Return the multiple of `divisor` that is nearest to a length, halves to even, one at least: `ensure_divide`."""
    return max(round(length / divisor) * divisor, divisor)


def slice_grid(height: int, width: int, resolution: int, most: int) -> tuple[int, int] | None:
    """Return rows and columns of the slices of a picture, None for one that is not sliced: `get_sliced_grid`.

    About one slice for each `resolution` squared pixels, in the grid whose shape is nearest to the picture's.
    """
    count = min(math.ceil(width * height / resolution**2), most)
    if count <= 1:
        return None
    counts = [each for each in (count - 1, count, count + 1) if 1 < each <= most]
    grids = [(rows, each // rows) for each in counts for rows in range(1, each + 1) if each % rows == 0]
    log_ratio = math.log(width / height)
    return min(grids, key=lambda grid: (abs(log_ratio - math.log(grid[1] / grid[0])), -grid[0]))


def packed_order(rows: int, cols: int) -> npt.NDArray[np.int64]:
    """Return `(N,)`: the place in raster order of each packed patch of `rows` x `cols`."""
    places = np.arange(rows * cols).reshape(rows // MERGED, 2, 2, cols // MERGED, 2, 2)
    return places.transpose(0, 3, 1, 4, 2, 5).reshape(-1)


def nearest_positions(rows: int, cols: int, side: int) -> npt.NDArray[np.int64]:
    """Return `(N,)`: the row of a table of `side` x `side` positions for each patch in raster order.

    The table is stretched over the picture; computed in float32, in the reference's order of operations.
    """
    step = 1 / side
    edges = (step + np.arange(math.ceil((1 - step) / step)) * step).astype(np.float32)
    down, across = (
        np.searchsorted(edges, np.arange(count, dtype=np.float32) / np.float32(count), side="right")
        for count in (rows, cols)
    )
    return np.asarray(down[:, None] * side + across, np.int64).reshape(-1)
