"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: a picture at its own shape is one view, positions lie on three axes.

A video is one view for each temporal patch of `frames` frames. Which frames, their sizes and arithmetic follow
`Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor`, resampling Pillow, one level from torchvision's at the most.

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
    PIXEL_VALUES,
    RGB,
    Array,
    Arrays,
    Detail,
    Family,
    Frames,
    FrameSampling,
    ImageBudget,
    LanguageInputs,
    View,
    Visual,
)
from edgevlm.families.grids import Grid, nearest_grid
from edgevlm.families.grounding import Grounding, json_boxes
from edgevlm.families.imaging import Lookup, fused_normalisation, normalisation, resized
from edgevlm.families.packing import packed_order, packed_pixels

AUTO_TOKENS, LOW_TOKENS = 1280, 256
"""Most image tokens at `detail="auto"`, the maximum of `Qwen2VLImageProcessor`'s own defaults, and at `"low"`."""
AUTO_VIDEO_TOKENS, LOW_VIDEO_TOKENS = 256, 64
"""Most image tokens of a temporal patch at `detail="auto"` and `"low"`."""
SAMPLED_FPS = 2.0
"""Frames sampled for each second: `fps` of `Qwen3VLVideoProcessor`, and of qwen-vl-utils for all of them."""
MIN_FRAMES, MAX_FRAMES, AUTO_FRAMES = 4, 768, 64
"""Fewest and most frames sampled by rate, as in both video processors, and most unless `detail="high"` or asked for."""
MAX_ASPECT_RATIO = 200
"""Pictures with a longer side beyond this multiple of the shorter are refused, as in the reference's `smart_resize`."""

_OF_QWEN3 = ("qwen3_vl", "qwen3_5")
"""What has a table of positions, stretched over the picture, and timestamps in videos."""
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
GROUNDING["qwen3_5"] = GROUNDING["qwen3_vl"]
"""Boxes by model type: per mille in tokens of their own (arXiv:2409.12191, section 2.2); pixels of the resized picture
(Qwen2.5-VL, arXiv:2502.13923, section 2.2.2) and per mille (Qwen3-VL and Qwen3.5) in JSON, asked for as in Qwen's own
cookbooks."""


class Clip(NamedTuple):
    """Grid of each temporal patch of a video, and when they are shown."""

    grid: Grid
    times_s: tuple[float, ...]
    """The middle of each temporal patch."""
    interval_s: float
    """From one temporal patch to the next."""


class Block(NamedTuple):
    """Image tokens that positions are counted for at once: a grid for each place on the axis of time."""

    grid: Grid
    times: tuple[int, ...] = (0,)

    @property
    def tokens(self) -> int:
        """How many image tokens there are."""
        return self.grid.tokens * len(self.times)


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
        self.table_side = int(facts["table_side"]) if model_type in _OF_QWEN3 else None
        self.window_size = int(facts["window_size"]) if model_type == "qwen2_5_vl" else None
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])
        self.grounding = GROUNDING[model_type]
        self.vision_start, self.vision_end = str(facts["vision_start"]), str(facts["vision_end"])
        self.has_timestamps = model_type in _OF_QWEN3
        """A video's temporal patches are told apart by text, and its bounds of pixels hold for all frames together."""
        if "video" in facts:
            self._set_up_video(facts["video"])

    def _set_up_video(self, video: Mapping[str, Any]) -> None:
        """Take the facts about videos, which exports of older versions lack."""
        self.video_placeholder = self.video_token = str(video["token"])
        self.video_token_id = int(video["token_id"])
        self.video_pixels = max(1, int(video["min_pixels"])), int(video["max_pixels"])
        self.video_resample = Image.Resampling(int(video["resample"]))
        self.video_lookup = fused_normalisation(video)
        self.tokens_per_second = float(video["tokens_per_second"]) if "tokens_per_second" in video else None

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
        return Visual([View(pixels, partial(self._encoder_inputs, pixels, self.lookup))], grid)

    def sample_frames(self, total: int, rate: float, sampling: FrameSampling, budget: ImageBudget) -> Sequence[int]:
        """Return which of `total` frames are looked at, by the reference's `sample_frames`.

        Where that takes none, or more than there are, all are taken. `max_views` bounds the temporal patches.
        """
        most = MAX_FRAMES if budget.detail == "high" or sampling != FrameSampling() else AUTO_FRAMES
        if budget.max_views is not None:
            most = min(most, budget.max_views * self.frames)
        sample = sample_evenly if self.has_timestamps else partial(sample_by_step, step=self.frames)
        seconds = total / rate
        count = seconds * (sampling.fps or SAMPLED_FPS) if sampling.frames is None else min(sampling.frames, most)
        return sample(total, count, most, asked=sampling.frames is not None)

    def frame_size(self, height: int, width: int, count: int, budget: ImageBudget) -> tuple[int, int]:
        """Return height and width of the views of `count` frames, by the reference's `smart_resize` of videos.

        Every temporal patch has at most `AUTO_VIDEO_TOKENS` or `LOW_VIDEO_TOKENS`, unless `detail="high"`, and at most
        `max_image_tokens`.
        """
        count = max(count, self.frames)
        min_pixels, max_pixels = self.video_pixels
        shared = count if self.has_timestamps else 1
        least = math.ceil(min_pixels / shared / self.unit**2)
        budget.check(least)
        most = most_tokens(budget, AUTO_VIDEO_TOKENS, LOW_VIDEO_TOKENS, least)
        grid = self._video_grid(height, width, count, max_pixels)
        if most is not None and grid.tokens > most:
            grid = self._video_grid(height, width, count, most * self.unit**2 * shared)
            grid = grid if least <= grid.tokens <= most else nearest_grid(height, width, least, most)
        return grid.rows * self.unit, grid.cols * self.unit

    def resize_frame(self, image: RGB, size: tuple[int, int]) -> RGB:
        """Return a frame `(H, W, 3)` at `size`, height and width."""
        return resized(image, size, self.video_resample)

    def preprocess_video(self, frames: Frames) -> Visual:
        """Return a view for each temporal patch; the last frame is repeated to fill one."""
        missing = -len(frames.pixels) % self.frames
        pixels = [*frames.pixels, *[frames.pixels[-1]] * missing]
        times = [*frames.times_s, *[frames.times_s[-1]] * missing]
        starts = range(0, len(pixels), self.frames)
        patches = [np.stack(pixels[start : start + self.frames]) for start in starts]
        middles = tuple((times[start] + times[start + self.frames - 1]) / 2 for start in starts)
        height, width = pixels[0].shape[:2]
        clip = Clip(Grid(height // self.unit, width // self.unit), middles, self.frames / frames.rate)
        return Visual([View(patch, partial(self._encoder_inputs, patch, self.video_lookup)) for patch in patches], clip)

    def is_video(self, layout: Hashable) -> bool:
        """Tell whether a layout is that of a video."""
        return isinstance(layout, Clip)

    def resized(self, height: int, width: int, budget: ImageBudget) -> tuple[int, int]:
        """Return the height and width of the one view of a picture. Raises `ImageError`."""
        grid = self._grid(height, width, self._most_tokens(budget))
        return grid.rows * self.unit, grid.cols * self.unit

    def image_text(self, layout: Hashable) -> str:
        """Return the image tokens of a picture or a video; those around them are the template's.

        Qwen3-VL and Qwen3.5 have the time of each temporal patch before it: `replace_video_token` of its processor.
        """
        if isinstance(layout, Clip):
            tokens = self.video_token * layout.grid.tokens
            if not self.has_timestamps:
                return tokens * len(layout.times_s)
            block = self.vision_start + tokens + self.vision_end
            return "".join(f"<{time:.1f} seconds>{block}" for time in layout.times_s)
        assert isinstance(layout, Grid)
        return self.image_token * layout.tokens

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        video = self.video_token if self.video_placeholder is not None else ""
        return self.vision_start + self.image_token + video + self.vision_end

    def language_inputs(
        self, ids: npt.NDArray[np.int64], layouts: Sequence[Hashable], features: Sequence[Arrays]
    ) -> LanguageInputs:
        """Return the positions `(3, n)` of a prompt, and features for deeper layers."""
        blocks = [block for layout in layouts for block in self._blocks(layout)]
        return LanguageInputs(mrope_positions(self.image_rows(ids), blocks), self.deeper_features(ids, features))

    def _blocks(self, layout: Hashable) -> Iterator[Block]:
        """Yield the blocks of a picture or a video, whose places in time only Qwen2.5-VL counts in seconds."""
        if isinstance(layout, Grid):
            yield Block(layout)
            return
        assert isinstance(layout, Clip)
        if self.has_timestamps:
            yield from [Block(layout.grid)] * len(layout.times_s)
            return
        interval = np.float32(1)
        if self.tokens_per_second is not None:
            interval = np.float32(self.tokens_per_second) * np.float32(layout.interval_s)
        times = (np.arange(len(layout.times_s), dtype=np.float32) * interval).astype(np.int64)
        yield Block(layout.grid, tuple(times.tolist()))

    def _video_grid(self, height: int, width: int, count: int, max_pixels: int) -> Grid:
        """Return the grid of each temporal patch of `count` frames, within the checkpoint's bounds or `max_pixels`."""
        min_pixels = self.video_pixels[0]
        if not self.has_timestamps:
            return smart_grid(height, width, self.unit, min_pixels, max_pixels)
        return smart_video_grid((count, height, width), self.frames, self.unit, min_pixels, max_pixels)

    def _most_tokens(self, budget: ImageBudget) -> int | None:
        return most_tokens(budget, AUTO_TOKENS, LOW_TOKENS, self.least_tokens)

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

    def _encoder_inputs(self, pixels: RGB, lookup: Lookup) -> dict[str, Array]:
        """Return the encoder's inputs for a view of N patches and M image tokens, a batch of one.

        The view is a picture `(H, W, 3)`, or T frames `(T, H, W, 3)`.

        All have `pixel_values` `(1, N, C * T * P * P)` and `patch_positions` `(1, N, 2)`. Qwen3-VL and Qwen3.5 have
        `table_indices` and `table_weights` `(1, 4, N)` besides, Qwen2.5-VL `window_index` `(1, M)` and `window_ids`
        `(1, N)`.
        """
        rows, cols = (side // self.patch_size for side in pixels.shape[-3:-1])
        order = packed_order(rows, cols, self.merge_size)
        inputs: dict[str, Array] = {
            PIXEL_VALUES: packed_pixels(pixels, order, self.patch_size, self.frames, lookup),
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


def most_tokens(budget: ImageBudget, auto: int, low: int, least: int) -> int | None:
    """Return how many image tokens a view may have beside what the checkpoint allows, `least` at least; None: any."""
    by_detail: dict[Detail, int | None] = {"auto": auto, "low": low, "high": None}
    bounds = [each for each in (by_detail[budget.detail], budget.max_image_tokens) if each is not None]
    return max(least, min(bounds)) if bounds else None


def smart_grid(
    height: int, width: int, unit: int, min_pixels: int, max_pixels: int, count: int = 1, frames: int = 1
) -> Grid:
    """Return the grid of squares of `unit` pixels that a picture is resized to, by the reference's `smart_resize`.

    Each side is rounded, halves to even. Where that makes too many pixels, the sides are scaled to have `max_pixels`
    and rounded down; where too few, to have `min_pixels` and rounded up. The bounds hold for `count` pictures together,
    `frames` of which make a temporal patch. Raises `ImageError` for a picture that is too long for its width.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"the picture is {width} x {height} pixels, and this model takes none that is more than {MAX_ASPECT_RATIO}"
            " times longer in one direction than in the other; crop it"
        )
    grid = Grid(round(height / unit), round(width / unit))
    pixels = round(count / frames) * frames * grid.tokens * unit**2
    if pixels > max_pixels:
        scale = math.sqrt(count * height * width / max_pixels)
        return Grid(*(max(1, math.floor(side / scale / unit)) for side in (height, width)))
    if pixels < min_pixels:
        scale = math.sqrt(min_pixels / (count * height * width))
        return Grid(*(math.ceil(side * scale / unit) for side in (height, width)))
    return grid


def smart_video_grid(shape: tuple[int, int, int], frames: int, unit: int, min_pixels: int, max_pixels: int) -> Grid:
    """Return the grid of each temporal patch of a video `shape`, frames by height by width: Qwen3-VL's `smart_resize`.

    As `smart_grid`, but a frame of less than `unit` is enlarged first, and the bounds hold for all frames together.
    """
    count, height, width = shape
    if min(height, width) < unit:
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
    return smart_grid(height, width, unit, min_pixels, max_pixels, count, frames)


def sample_by_step(total: int, count: float, most: int, *, asked: bool, step: int) -> list[int]:
    """Return the places of about `count` of `total` frames: `Qwen2VLVideoProcessor.sample_frames`.

    A multiple of `step` are taken, and `MIN_FRAMES` at least, unless they are `asked` for or there are fewer.
    """
    if asked:
        taken = round(count / step) * step
    else:
        taken = math.floor(min(max(count, MIN_FRAMES), most // step * step, total) / step) * step
    taken = min(max(taken, step), total)
    stride = total / taken
    places = (np.arange(math.ceil(total / stride)) * stride).astype(np.float32).astype(np.int64)
    return [place for place in places.tolist() if place < total]


def sample_evenly(total: int, count: float, most: int, *, asked: bool) -> list[int]:
    """Return the places of `count` of `total` frames, first and last among them: `Qwen3VLVideoProcessor`'s.

    `MIN_FRAMES` are taken at least, unless they are `asked` for or there are fewer.
    """
    taken = min(int(count) if asked else max(int(count), MIN_FRAMES), most, total)
    places: list[int] = np.linspace(0, total - 1, taken).round().astype(np.int64).tolist()
    return places


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


def mrope_positions(shown: npt.NDArray[np.bool_], blocks: Sequence[Block]) -> npt.NDArray[np.int64]:
    """Return positions on the axes of time, height and width, `(3, n)`, where image tokens are where `shown` `(n,)`.

    Text counts on, equally on every axis. A picture stands still in time, its image tokens differ by row and column,
    and what follows it is `max(rows, cols)` after its first (M-RoPE, arXiv:2409.12191, section 2.1). That holds
    after a video, too, whose temporal patches differ in time.
    """
    places = np.flatnonzero(shown)
    ends = np.cumsum([block.tokens for block in blocks], dtype=np.int64)
    steps = np.where(shown, 0, 1)
    steps[places[ends - 1]] = [max(block.grid) for block in blocks]
    positions = np.tile(np.cumsum(steps) - steps, (3, 1))
    for block, end in zip(blocks, ends, strict=True):
        own = places[end - block.tokens : end]
        positions[0, own] += np.repeat(np.asarray(block.times, np.int64), block.grid.tokens)
        positions[1:, own] += np.tile(np.indices(block.grid).reshape(2, -1), len(block.times))
    return positions
