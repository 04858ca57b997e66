"""LFM2-VL and LFM2.5-VL: a picture at about its own shape, and before that in square tiles where it is a large one.

Sizes, tiles and arithmetic follow transformers' `Lfm2VlImageProcessor`, the prompt follows `Lfm2VlProcessor`, and the
stretched position table `Siglip2VisionEmbeddings` (all of transformers 5.24), so that `detail="high"` gives equal sizes
and token ids. That image processor resizes with torchvision; here it is Pillow, one level from it at the most.

A patch is `encoder_patch_size` pixels square. The encoder joins `downsample_factor`^2 patches to one image token, and
takes the patches packed: those of a token one after another, the tokens row by row.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.families.base import PIXEL_VALUES, RGB, Array, Family, ImageBudget, View, Visual
from edgevlm.families.grids import Grid, nearest_grid
from edgevlm.families.imaging import Lookup, fused_normalisation, resized
from edgevlm.families.packing import packed_order
from edgevlm.families.tiling import nearest_grid as nearest_tiles

LOW_TOKENS = 256
"""Most image tokens at `detail="low"`."""


class Split(NamedTuple):
    """How a picture is shown: `rows` x `cols` tiles, or none; image tokens of the view of the whole, or none."""

    rows: int
    cols: int
    whole: Grid


class Splitting(NamedTuple):
    """How a large picture is split."""

    tile_size: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    """The whole picture follows its tiles."""
    max_pixels_tolerance: float
    """A picture is large if it has so many times the pixels of the largest view of a whole one."""


class Lfm2VL(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.patch_size = int(facts["encoder_patch_size"])
        self.merge_size = int(facts["downsample_factor"])
        self.unit = self.patch_size * self.merge_size
        """Side of the square of pixels that becomes one image token."""
        self.min_tokens, self.max_tokens = int(facts["min_image_tokens"]), int(facts["max_image_tokens"])
        self.splitting = Splitting(**facts["splitting"]) if facts["splitting"] else None
        self.table_side = int(facts["table_side"])
        self.resample = Image.Resampling(int(facts["resample"]))
        self.lookup = fused_normalisation(facts)
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])
        self.start, self.end = str(facts["image_start_token"]), str(facts["image_end_token"])
        self.thumbnail = str(facts["image_thumbnail_token"])

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the tiles of a picture `(H, W, 3)`, if it is split, and the view of the whole, its sides multiples of
        `unit`.

        `high` is what the checkpoint's own processor does. `auto` takes of the grids of tiles those that the picture
        has the pixels for, or the view of the whole alone where none of them is nearer to its shape than a square;
        `low` is that view, of at most `LOW_TOKENS`. A budget of tokens first leaves out tiles, then makes the whole
        smaller.
        """
        budget.check(self.min_tokens)
        height, width = image.shape[:2]
        split = self._split(height, width, budget)
        views: list[RGB] = []
        if split.rows and self.splitting:
            side = self.splitting.tile_size
            gridded = resized(image, (split.rows * side, split.cols * side), self.resample)
            places = [(row * side, col * side) for row in range(split.rows) for col in range(split.cols)]
            views += [np.ascontiguousarray(gridded[top : top + side, left : left + side]) for top, left in places]
        if split.whole.tokens:
            views.append(resized(image, (split.whole.rows * self.unit, split.whole.cols * self.unit), self.resample))
        return Visual([View(pixels, partial(self._encoder_inputs, pixels)) for pixels in views], split)

    def image_text(self, layout: Hashable) -> str:
        """Return the image block of the prompt: each tile's place and image tokens, then those of the whole."""
        assert isinstance(layout, Split)
        whole = self.image_token * layout.whole.tokens
        if not layout.rows:
            return self.start + whole + self.end
        places = [(row, col) for row in range(1, layout.rows + 1) for col in range(1, layout.cols + 1)]
        tiles = [f"<|img_row_{row}_col_{col}|>{self.image_token * self._tile_tokens}" for row, col in places]
        return self.start + "".join(tiles) + (self.thumbnail + whole if whole else "") + self.end

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        whole = self.image_text(Split(0, 0, Grid(1, 1)))
        if self.splitting is None:
            return whole
        return whole + self.image_text(Split(self.splitting.max_tiles, self.splitting.max_tiles, Grid(1, 1)))

    def _split(self, height: int, width: int, budget: ImageBudget) -> Split:
        """Return how a picture is shown within the budget."""
        whole = smart_grid(height, width, self.unit, self.min_tokens, self.max_tokens)
        if self.splitting and self._is_large(height, width):
            shown = self._whole(height, width, whole, ImageBudget()) if self.splitting.use_thumbnail else Grid(0, 0)
            most = self._most_tiles(height * width, shown, budget)
            least = self.splitting.min_tiles if most == self.splitting.max_tiles else 1
            tiles = nearest_tiles(height, width, self.splitting.tile_size, least, most)
            if tiles.rows * tiles.cols >= self.splitting.min_tiles:
                return Split(tiles.rows, tiles.cols, shown)
        return Split(0, 0, self._whole(height, width, whole, budget))

    def _most_tiles(self, pixels: int, shown: Grid, budget: ImageBudget) -> int:
        """Return how many tiles a picture may have at most, beside the thumbnail `shown`."""
        assert self.splitting
        most = 0 if budget.detail == "low" else self.splitting.max_tiles
        if budget.detail == "auto":
            most = min(most, pixels // self.splitting.tile_size**2)
        if budget.max_image_tokens is not None:
            most = min(most, (budget.max_image_tokens - shown.tokens) // self._tile_tokens)
        return most if budget.max_views is None else min(most, budget.max_views - bool(shown.tokens))

    def _whole(self, height: int, width: int, grid: Grid, budget: ImageBudget) -> Grid:
        """Return the image tokens of a picture that is one view: `grid`, the reference's, where it is within bounds.

        The reference oversteps its own for a long strip, and fails where that is split. Where it does, and a budget
        forbids it, the grid is that which is nearest to the picture's shape.
        """
        by_detail = {"high": math.inf, "auto": self.max_tokens, "low": min(self.max_tokens, LOW_TOKENS)}
        most = min(by_detail[budget.detail], budget.max_image_tokens or math.inf)
        if grid.tokens <= most:
            return grid
        bound = max(self.min_tokens, int(most))
        grid = smart_grid(height, width, self.unit, self.min_tokens, bound)
        if self.min_tokens <= grid.tokens <= bound:
            return grid
        return nearest_grid(height, width, self.min_tokens, bound)

    def _is_large(self, height: int, width: int) -> bool:
        """Tell whether a picture is split; `_is_image_too_large` of the reference."""
        assert self.splitting
        rounded = [max(self.patch_size, round(side / self.unit) * self.unit) for side in (height, width)]
        return math.prod(rounded) > self.max_tokens * self.unit**2 * self.splitting.max_pixels_tolerance

    @property
    def _tile_tokens(self) -> int:
        """Image tokens of a tile."""
        assert self.splitting
        return (self.splitting.tile_size // self.unit) ** 2

    def _encoder_inputs(self, pixels: RGB) -> dict[str, Array]:
        """Return the encoder's inputs for a view `(H, W, 3)` of N patches, a batch of one.

        `pixel_values` is `(1, N, P * P * 3)`, `table_indices` and `table_weights` are `(1, taps, N)`.
        """
        rows, cols = (side // self.patch_size for side in pixels.shape[:2])
        order = packed_order(rows, cols, self.merge_size)
        indices, weights = stretched_table(rows, cols, self.table_side)
        inputs: dict[str, Array] = {
            PIXEL_VALUES: packed_pixels(pixels, order, self.patch_size, self.lookup),
            "table_indices": indices[:, order],
            "table_weights": weights[:, order],
        }
        return {name: array[None] for name, array in inputs.items()}


def smart_grid(height: int, width: int, unit: int, least: int, most: int) -> Grid:
    """Return the image tokens of a picture that is one view, by the reference's `smart_resize`.

    Each side is rounded, halves to even, to squares of `unit` pixels. Where that makes more than `most` tokens, the
    sides are scaled to have as many and rounded down; where fewer than `least`, scaled to have as many and rounded up.
    """
    grid = Grid(*(max(1, round(side / unit)) for side in (height, width)))
    if grid.tokens > most:
        scale = math.sqrt((height * width) / (most * unit**2))
        return Grid(*(max(1, math.floor(side / scale / unit)) for side in (height, width)))
    if grid.tokens < least:
        scale = math.sqrt(least * unit**2 / (height * width))
        return Grid(*(math.ceil(side * scale / unit) for side in (height, width)))
    return grid


def packed_pixels(
    pixels: RGB, order: npt.NDArray[np.int64], patch_size: int, lookup: Lookup
) -> npt.NDArray[np.float32]:
    """Return `(N, P * P * 3)`: the patches of a picture `(H, W, 3)` in `order`, normalised."""
    rows, cols = (side // patch_size for side in pixels.shape[:2])
    grid = pixels.reshape(rows, patch_size, cols, patch_size, 3).transpose(0, 2, 1, 3, 4)
    values: npt.NDArray[np.float32] = lookup[np.arange(3), grid.reshape(rows * cols, -1, 3)[order]]
    return values.reshape(len(order), -1)


def stretched_table(rows: int, cols: int, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the rows of a position table for each patch in raster order, and their weights, both `(taps, N)`.

    The table has `side` x `side` rows and is stretched over the picture, bilinear, corners not aligned, with
    antialiasing: `resize_positional_embeddings`.
    """
    (row_indices, row_weights), (col_indices, col_weights) = (_taps(count, side) for count in (rows, cols))
    indices = row_indices[:, None, :, None] * side + col_indices[None, :, None, :]
    weights = row_weights[:, None, :, None] * col_weights[None, :, None, :]
    return indices.reshape(-1, rows * cols), weights.reshape(-1, rows * cols)


def _taps(count: int, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return which of `length` places make each of `count`, and their weights, both `(taps, count)`; in float32."""
    half, one = np.float32(0.5), np.float32(1)
    scale = np.float32(length) / np.float32(count)
    centers = (np.arange(count, dtype=np.float32) + half) * scale - half
    distances = np.abs(np.arange(length, dtype=np.float32) - centers[:, None])
    weights = np.maximum(one - distances / max(scale, one), np.float32(0))
    weights /= weights.sum(axis=1, keepdims=True)
    most = int(np.count_nonzero(weights, axis=1).max())
    indices = np.sort(np.argsort(-weights, axis=1, kind="stable")[:, :most], axis=1)
    return indices.T, np.take_along_axis(weights, indices, axis=1).T
