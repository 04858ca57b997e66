"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a picture at its own shape is one view, positions lie on three axes.

Sizes, resampling and arithmetic follow transformers' Pillow-based `Qwen2VLImageProcessor`, the prompt follows
`Qwen2VLProcessor`, the encoder's index inputs `vision_utils.py`, and positions `get_rope_index` (all of transformers
5.24), so that `detail="high"` gives equal arrays, token ids and positions.

A patch is `patch_size` pixels square. The encoder merges `merge_size` x `merge_size` patches to one image token, and
takes the patches packed: those of a token one after another, the tokens row by row.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.errors import ImageError
from edgevlm.families.base import (
    IMAGE_EMBEDS,
    PIXEL_VALUES,
    RGB,
    Array,
    Arrays,
    Detail,
    Family,
    ImageBudget,
    LanguageInputs,
    View,
    Visual,
)
from edgevlm.families.grounding import Grounding, json_boxes
from edgevlm.families.imaging import Lookup, normalisation

AUTO_TOKENS, LOW_TOKENS = 1280, 256
"""Most image tokens at `detail="auto"`, the maximum of `Qwen2VLImageProcessor`'s own defaults, and at `"low"`."""
MAX_ASPECT_RATIO = 200
"""Pictures with a longer side beyond this multiple of the shorter are refused, as in the reference's `smart_resize`."""

GROUNDING = {
    "qwen2_vl": Grounding(
        "Please provide the bounding box coordinate of the region this sentence describes: {phrase}",
        ("<|box_start|>(", ",", "),(", ",", ")<|box_end|>"),
        1000,
    ),
    "qwen2_5_vl": json_boxes("Locate {phrase}, output its bbox coordinates using JSON format.", None),
    "qwen3_vl": json_boxes(
        'Locate every instance that belongs to the following categories: "{noun}".'
        " Report bbox coordinates in JSON format.",
        1000,
    ),
}
"""Boxes by model type: per mille in tokens of their own (arXiv:2409.12191, section 2.2); pixels of the resized picture
(Qwen2.5-VL, arXiv:2502.13923, section 2.2.2) and per mille (Qwen3-VL) in JSON, asked for as in Qwen's own cookbooks."""


class Grid(NamedTuple):
    """Rows and columns of a picture's image tokens."""

    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        """How many image tokens the picture has."""
        return self.rows * self.cols


class QwenVL(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        model_type = facts["model_type"]
        self.patch_size = int(facts["patch_size"])
        self.frames = int(facts["temporal_patch_size"])
        self.merge_size = int(facts["merge_size"])
        self.unit = self.patch_size * self.merge_size
        """Side of the square of pixels that becomes one image token."""
        self.min_pixels, self.max_pixels = max(1, int(facts["min_pixels"])), int(facts["max_pixels"])
        self.least_tokens = math.ceil(self.min_pixels / self.unit**2)
        self.resample = Image.Resampling(int(facts["resample"]))
        self.lookup = normalisation(facts)
        self.table_side = int(facts["table_side"]) if model_type == "qwen3_vl" else None
        self.window_size = int(facts["window_size"]) if model_type == "qwen2_5_vl" else None
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])
        self.grounding = GROUNDING[model_type]
        self.vision_start, self.vision_end = str(facts["vision_start"]), str(facts["vision_end"])

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the one view of a picture `(H, W, 3)`, its sides multiples of `unit`.

        `high` is what the checkpoint's own processor does: it enlarges a picture of fewer than `min_pixels`, and
        shrinks one of more than `max_pixels`. `auto` and `low` also shrink a picture of more than `AUTO_TOKENS` or
        `LOW_TOKENS`, and a budget one of more image tokens than that. Raises `ImageError` for a picture that is too
        long for its width.
        """
        budget.check(self.least_tokens)
        height, width = image.shape[:2]
        grid = self._grid(height, width, self._most_tokens(budget))
        size = (grid.cols * self.unit, grid.rows * self.unit)
        pixels = np.asarray(Image.fromarray(image).resize(size, self.resample))
        return Visual([View(pixels, partial(self._encoder_inputs, pixels))], grid)

    def resized(self, height: int, width: int, budget: ImageBudget) -> tuple[int, int]:
        """Return the height and width of the one view of a picture. Raises `ImageError`."""
        grid = self._grid(height, width, self._most_tokens(budget))
        return grid.rows * self.unit, grid.cols * self.unit

    def image_text(self, layout: Hashable) -> str:
        """Return the picture's image tokens; those around them are the template's."""
        assert isinstance(layout, tuple)
        return self.image_token * Grid(*layout).tokens

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.vision_start + self.image_token + self.vision_end

    def language_inputs(
        self, ids: npt.NDArray[np.int64], layouts: Sequence[Hashable], features: Sequence[Arrays]
    ) -> LanguageInputs:
        """Return the positions `(3, n)` of a prompt, and features for deeper layers `(n, D)` by name.

        The latter are the encoder's outputs besides `image_embeds`, zero at text.
        """
        shown = ids == self.image_token_id
        extras: dict[str, Array] = {}
        for name in (name for name in (features[0] if features else {}) if name != IMAGE_EMBEDS):
            rows = np.concatenate([each[name] for each in features])
            extras[name] = np.zeros((len(ids), *rows.shape[1:]), rows.dtype)
            extras[name][shown] = rows
        return LanguageInputs(mrope_positions(shown, list(_grids(layouts))), extras)

    def _most_tokens(self, budget: ImageBudget) -> int | None:
        """Return how many image tokens a picture may have beside what the checkpoint allows; None is no bound."""
        most: dict[Detail, int | None] = {"auto": AUTO_TOKENS, "low": LOW_TOKENS, "high": None}
        bounds = [each for each in (most[budget.detail], budget.max_image_tokens) if each is not None]
        return max(self.least_tokens, min(bounds)) if bounds else None

    def _grid(self, height: int, width: int, most: int | None) -> Grid:
        """Return the grid of a picture: the reference's with the checkpoint's bounds, or with `most` image tokens.

        The reference oversteps its bounds where they leave little room. If it does, the grid is that within the bounds
        which is nearest to the picture's shape.
        """
        grid = smart_grid(height, width, self.unit, self.min_pixels, self.max_pixels)
        if most is None or grid.tokens <= most:
            return grid
        grid = smart_grid(height, width, self.unit, self.min_pixels, most * self.unit**2)
        if self.least_tokens <= grid.tokens <= most:
            return grid
        return nearest_grid(height, width, self.least_tokens, most)

    def _encoder_inputs(self, pixels: RGB) -> dict[str, Array]:
        """Return the encoder's inputs for a view `(H, W, 3)` of N patches and M image tokens, a batch of one.

        All have `pixel_values` `(1, N, C * T * P * P)` and `patch_positions` `(1, N, 2)`. Qwen3-VL has `table_indices`
        and `table_weights` `(1, 4, N)` besides, Qwen2.5-VL `window_index` `(1, M)` and `window_ids` `(1, N)`.
        """
        rows, cols = (side // self.patch_size for side in pixels.shape[:2])
        order = packed_order(rows, cols, self.merge_size)
        inputs: dict[str, Array] = {
            PIXEL_VALUES: packed_pixels(pixels, order, self.patch_size, self.frames, self.lookup),
            "patch_positions": np.stack(np.divmod(order, cols), axis=-1),
        }
        if self.table_side is not None:
            indices, weights = table_corners(rows, cols, self.table_side)
            inputs |= {"table_indices": indices[:, order], "table_weights": weights[:, order]}
        if self.window_size is not None:
            grid = Grid(rows // self.merge_size, cols // self.merge_size)
            index, ids = windows(grid, self.window_size // self.merge_size // self.patch_size)
            inputs |= {"window_index": index, "window_ids": np.repeat(ids, self.merge_size**2)}
        return {name: array[None] for name, array in inputs.items()}


def _grids(layouts: Sequence[Hashable]) -> Iterator[Grid]:
    for layout in layouts:
        assert isinstance(layout, tuple)
        yield Grid(*layout)


def smart_grid(height: int, width: int, unit: int, min_pixels: int, max_pixels: int) -> Grid:
    """Return the grid of squares of `unit` pixels that a picture is resized to, by the reference's `smart_resize`.

    Each side is rounded, halves to even. Where that makes too many pixels, the sides are scaled to have `max_pixels`
    and rounded down; where too few, to have `min_pixels` and rounded up. Raises `ImageError`.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"the picture is {width} x {height} pixels, and this model takes none that is more than {MAX_ASPECT_RATIO}"
            " times longer in one direction than in the other; crop it"
        )
    rows, cols = round(height / unit), round(width / unit)
    pixels = rows * cols * unit**2
    if pixels > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        return Grid(*(max(1, math.floor(side / scale / unit)) for side in (height, width)))
    if pixels < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return Grid(*(math.ceil(side * scale / unit) for side in (height, width)))
    return Grid(rows, cols)


def nearest_grid(height: int, width: int, least: int, most: int) -> Grid:
    """Return the grid of `least` to `most` squares that distorts a picture least, the largest of those alike."""
    best, smallest = Grid(1, least), math.inf
    for rows in range(1, most + 1):
        lowest, highest = math.ceil(least / rows), most // rows
        if lowest > highest:
            continue
        grid = Grid(rows, min(max(round(rows * width / height), lowest), highest))
        distortion = abs(math.log(grid.cols * height / (grid.rows * width)))
        if distortion < smallest or (distortion == smallest and grid.tokens > best.tokens):
            best, smallest = grid, distortion
    return best


def packed_order(rows: int, cols: int, merge_size: int) -> npt.NDArray[np.int64]:
    """Return `(N,)`: the place in raster order, `row * cols + col`, of each packed patch of `rows` x `cols`."""
    blocks = np.arange(rows * cols).reshape(rows // merge_size, merge_size, cols // merge_size, merge_size)
    return blocks.transpose(0, 2, 1, 3).reshape(-1)


def packed_pixels(
    pixels: RGB, order: npt.NDArray[np.int64], patch_size: int, frames: int, lookup: Lookup
) -> npt.NDArray[np.float32]:
    """Return `(N, C * T * P * P)`: the patches of `(H, W, 3)`, normalised, a still for each of T = `frames` frames."""
    rows, cols = (side // patch_size for side in pixels.shape[:2])
    grid = pixels.reshape(rows, patch_size, cols, patch_size, 3).transpose(0, 2, 4, 1, 3)
    patches = grid.reshape(-1, 3, patch_size, patch_size)[order]
    values = np.empty((len(order), 3, frames, patch_size, patch_size), np.float32)
    for channel in range(3):
        values[:, channel] = lookup[channel][patches[:, channel]][:, None]
    return values.reshape(len(order), -1)


def table_corners(rows: int, cols: int, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the rows of a position table for each patch in raster order, and their weights, both `(4, N)`.

    The table has `side` x `side` rows and is stretched over the picture, bilinear, corners aligned:
    `get_vision_interpolation_indices_and_weights`.
    """
    (down, tall), (across, wide) = _taps(rows, side), _taps(cols, side)
    indices = down[:, None, :, None] * side + across[None, :, None, :]
    weights = tall[:, None, :, None] * wide[None, :, None, :]
    return indices.reshape(4, -1), weights.reshape(4, -1)


def _taps(count: int, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the two entries of an axis of `side` that each of `count` places lies between, and their weights.

    Both are `(2, count)`. Computed in float32, in the reference's order of operations.
    """
    places = np.arange(count, dtype=np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
    low = np.floor(places)
    offsets = np.arange(2, dtype=np.float32)[:, None]
    weights = np.float32(1) - np.abs(places - low - offsets)
    return np.minimum(low.astype(np.int64) + np.arange(2)[:, None], side - 1), weights


def windows(grid: Grid, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the image tokens window by window, and the number of each one's window, both `(M,)`.

    Windows of `side` x `side` image tokens lie row by row; those at the right and lower edges may be smaller. Within
    one the tokens keep their order: `get_vision_window_index`.
    """
    rows, cols = np.divmod(np.arange(grid.tokens), grid.cols)
    numbers = rows // side * math.ceil(grid.cols / side) + cols // side
    index = np.argsort(numbers, kind="stable")
    return index, numbers[index]


def mrope_positions(shown: npt.NDArray[np.bool_], grids: Sequence[Grid]) -> npt.NDArray[np.int64]:
    """Return positions on the axes of time, height and width, `(3, n)`, where image tokens are where `shown` `(n,)`.

    Text counts on, equally on every axis. A picture stands still in time, its image tokens differ by row and column,
    and what follows it is `max(rows, cols)` after its first (M-RoPE, arXiv:2409.12191, section 2.1).
    """
    places = np.flatnonzero(shown)
    ends = np.cumsum([grid.tokens for grid in grids], dtype=np.int64)
    steps = np.where(shown, 0, 1)
    steps[places[ends - 1]] = [max(grid) for grid in grids]
    positions = np.tile(np.cumsum(steps) - steps, (3, 1))
    for grid, end in zip(grids, ends, strict=True):
        positions[1:, places[end - grid.tokens : end]] += np.indices(grid).reshape(2, -1)
    return positions
