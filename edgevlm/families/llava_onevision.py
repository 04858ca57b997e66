"""LLaVA-OneVision: a picture as a whole and in tiles, of which only those patches become tokens that show something.

Geometry, resampling and arithmetic follow transformers' Pillow-based `LlavaOnevisionImageProcessor`, the prompt follows
`LlavaOnevisionProcessor`, and what becomes of the encoder's outputs `LlavaOnevisionModel.pack_image_features` (all of
transformers 5.24), so that `detail="high"` gives equal arrays, token ids and features.

The encoder gives the patches of a view, and after them `image_newline`: what a picture that is one view ends with, and
each row of a picture that is in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.families.base import IMAGE_EMBEDS, RGB, Array, Arrays, Family, ImageBudget, Visual
from edgevlm.families.imaging import normalisation, pixel_view
from edgevlm.families.llava import background, padded_to_square


class Grid(NamedTuple):
    """How a picture was split: `rows` x `cols` tiles after the view of the whole, or 0 x 0 for that alone."""

    rows: int = 0
    cols: int = 0
    top: int = 0
    """Rows of patches that are padding, above and again below."""
    left: int = 0
    """Columns of patches that are padding, left and again right."""


class LlavaOnevision(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        preprocessing = facts["preprocessing"]
        self.tile = int(preprocessing["tile"])
        self.view_size = (self.tile, self.tile)
        self.grids = tuple((int(height), int(width)) for height, width in preprocessing["image_grid_pinpoints"])
        self.background = background(preprocessing)
        self.resample = Image.Resampling(int(preprocessing["resample"]))
        self.lookup = normalisation(preprocessing)
        self.side = int(facts["patches_per_side"])
        self.most_tiles = int(facts["max_tiles_of_features"])
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])

    def budget_for(self, budget: ImageBudget, images: int) -> ImageBudget:
        """Return a budget of one view for each of several pictures, as in training and in the reference."""
        return replace(budget, detail="low") if images > 1 else budget

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the view of the whole picture `(H, W, 3)`, and the tiles after it.

        `high` is what the checkpoint's own processor does with a picture alone, `low` what it does with one of several:
        one view, padded to a square. `auto` takes of the grids those that the picture has the pixels for, and one view
        where it has not enough for a tile. A budget of tokens leaves those grids that become no more of them.
        """
        budget.check(self._tokens(Grid()))
        height, width = image.shape[:2]
        target = self._target(height, width, budget)
        if target is None:
            square = padded_to_square(image, self.background)
            return Visual([pixel_view(self._resized(square, self.tile, self.tile), self.lookup)], Grid())
        whole = Image.fromarray(image)
        canvas = self._canvas(whole, *target)
        grid = self._grid(height, width, *target)
        rows, cols = grid.rows, grid.cols
        places = [(row * self.tile, col * self.tile) for row in range(rows) for col in range(cols)]
        tiles = [canvas[top : top + self.tile, left : left + self.tile] for top, left in places]
        views = [self._resized(whole, self.tile, self.tile), *tiles]
        return Visual([pixel_view(np.ascontiguousarray(view), self.lookup) for view in views], grid)

    def image_text(self, layout: Hashable) -> str:
        """Return the picture's image tokens, as many as `assemble` makes features."""
        assert isinstance(layout, tuple)
        return self.image_token * self._tokens(Grid(*layout))

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.image_token

    def assemble(self, layout: Hashable, outputs: Sequence[Arrays]) -> dict[str, Array]:
        """Join the views' patches `(side^2 + 1, D)`: those of the whole picture, then the tiles' row by row.

        The tiles' patches lie as in the picture, without padding, and are shrunk where they are more than the model
        reads; `image_newline` ends each row.
        """
        assert isinstance(layout, tuple)
        grid, (whole, *tiles) = Grid(*layout), (each[IMAGE_EMBEDS] for each in outputs)
        if not tiles:
            return {IMAGE_EMBEDS: whole}
        side, width = self.side, whole.shape[-1]
        patches = np.stack([tile[:-1] for tile in tiles]).reshape(grid.rows, grid.cols, side, side, width)
        patches = patches.transpose(0, 2, 1, 3, 4).reshape(grid.rows * side, grid.cols * side, width)
        shown = patches[grid.top : len(patches) - grid.top, grid.left : patches.shape[1] - grid.left]
        rows, cols = self._lines(grid)
        lines = np.empty((rows, cols + 1, width), np.float32)
        lines[:, :cols] = resized(shown, rows, cols)
        lines[:, cols] = whole[-1]
        return {IMAGE_EMBEDS: np.concatenate([whole[:-1], lines.reshape(-1, width)])}

    def _most(self, pixels: int, budget: ImageBudget) -> int:
        """Return how many tiles a picture may have at most, the view of the whole not counted."""
        most = 0 if budget.detail == "low" else max(height * width for height, width in self.grids) // self.tile**2
        if budget.detail == "auto":
            most = min(most, pixels // self.tile**2)
        return most if budget.max_views is None else min(most, budget.max_views - 1)

    def _target(self, height: int, width: int, budget: ImageBudget) -> tuple[int, int] | None:
        """Return the size of the grid that shows most of the picture, of those alike the one with the least padding.

        None where no grid is within the budget.
        """
        best, shown, wasted = None, 0, math.inf
        most, limit = self._most(height * width, budget), budget.max_image_tokens or math.inf
        for target in self.grids:
            if target[0] * target[1] > most * self.tile**2 or self._tokens(self._grid(height, width, *target)) > limit:
                continue
            scale = min(target[1] / width, target[0] / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            waste = target[0] * target[1] - effective
            if effective > shown or (effective == shown and waste < wasted):
                best, shown, wasted = target, effective, waste
        return best

    def _canvas(self, whole: Image.Image, height: int, width: int) -> RGB:
        """Return the picture as large as it fits into the grid, in the middle of it, on black."""
        across, down = width / whole.width, height / whole.height
        if across < down:
            inner = (min(math.ceil(whole.height * across), height), width)
        else:
            inner = (height, min(math.ceil(whole.width * down), width))
        canvas = np.zeros((height, width, 3), np.uint8)
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        canvas[top : top + inner[0], left : left + inner[1]] = self._resized(whole, *inner)
        return canvas

    def _resized(self, image: Image.Image, height: int, width: int) -> RGB:
        return np.asarray(image.resize((width, height), self.resample))

    def _tokens(self, grid: Grid) -> int:
        """Return how many image tokens a picture laid out like this has."""
        rows, cols = self._lines(grid)
        return self.side**2 + (rows * (cols + 1) if grid.rows else 1)

    def _grid(self, height: int, width: int, grid_height: int, grid_width: int) -> Grid:
        """Return how a picture lies in a grid of so many pixels."""
        rows, cols = grid_height // self.tile, grid_width // self.tile
        return Grid(rows, cols, *self._padding(height, width, rows, cols))

    def _padding(self, height: int, width: int, rows: int, cols: int) -> tuple[int, int]:
        """Return how many rows of patches above, and columns left, show nothing of a picture; `unpad_image`."""
        tall, wide = rows * self.side, cols * self.side
        if width / height > wide / tall:
            return (tall - int(round(height * (wide / width), 7))) // 2, 0
        return 0, (wide - int(round(width * (tall / height), 7))) // 2

    def _lines(self, grid: Grid) -> tuple[int, int]:
        """Return the rows and columns of patches that the model reads of the tiles, shrunk where they are too many."""
        rows, cols = grid.rows * self.side - 2 * grid.top, grid.cols * self.side - 2 * grid.left
        ratio = math.sqrt(rows * cols / (self.most_tiles * self.side**2))
        return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)


def resized(grid: npt.NDArray[np.float32], rows: int, cols: int) -> npt.NDArray[np.float32]:
    """Return `(h, w, D)` as `(rows, cols, D)`, bilinear as torch does it: corners not aligned, no antialiasing."""
    if grid.shape[:2] == (rows, cols):
        return grid
    low, high, part = _taps(grid.shape[0], rows)
    grid = grid[low] * (1 - part)[:, None, None] + grid[high] * part[:, None, None]
    low, high, part = _taps(grid.shape[1], cols)
    return np.asarray(grid[:, low] * (1 - part)[:, None] + grid[:, high] * part[:, None], np.float32)


def _taps(length: int, count: int) -> tuple[Array, Array, npt.NDArray[np.float32]]:
    """Return the two places that each of `count` values lies between, and how far it is from the first of them.

    Computed in float32, as torch does it: in float64 some values would differ by 4e-6.
    """
    half, scale = np.float32(0.5), np.float32(length) / np.float32(count)
    places = np.maximum((np.arange(count, dtype=np.float32) + half) * scale - half, np.float32(0))
    low = places.astype(np.int64)
    return low, np.minimum(low + 1, length - 1), places - low.astype(np.float32)
