"""Idefics3 and SmolVLM: split a large picture into square tiles, add a global view, name each in the prompt.

Geometry, resampling and arithmetic follow transformers' Pillow-based `Idefics3ImageProcessor` step for step, and
the prompt follows `Idefics3Processor` (both of transformers 5.24), so that `detail="high"` gives equal arrays and
equal token ids. A video of SmolVLM2 is a global view for each frame, its time before it: `SmolVLMVideoProcessor` and
`SmolVLMProcessor`, but for Pillow's resampling.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from edgevlm.families.base import RGB, Arrays, Detail, Family, Frames, FrameSampling, ImageBudget, Visual
from edgevlm.families.grounding import Grounding
from edgevlm.families.imaging import fused_normalisation, normalisation, pixel_view, resized

MAX_SIDE = 4096
"""No picture is resized beyond this side: `MAX_IMAGE_SIZE` of the reference."""

POINTS = Grounding("Give the rough coordinates of the {noun} in percent.", ("x ", ", y ", ""), 100, most=1)
"""How edgevlm's bundled model was taught to point; Idefics3 and SmolVLM themselves have no convention for places."""


class Grid(NamedTuple):
    """How a picture was split: `rows` x `cols` tiles, 0 x 0 when it was not; a global view follows."""

    rows: int
    cols: int


class Clip(NamedTuple):
    """When each frame of a video is shown, and how long the whole is."""

    times_s: tuple[float, ...]
    duration_s: float


_LARGEST = Grid(16, 16)
MAX_FRAMES = 768
"""Most frames of a video that may be asked for."""
VIDEO_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'] is string %}{{': ' + message['content']}}{% else %}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The reference's `DEFAULT_CHAT_TEMPLATE`, which it renders prompts with videos with, whatever the checkpoint's is."""
_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


class Idefics3(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        preprocessing = facts["preprocessing"]
        self.longest_edge = int(preprocessing["longest_edge"])
        self.tile = int(preprocessing["tile"])
        self.view_size = (self.tile, self.tile)
        self.split = bool(preprocessing["do_image_splitting"])
        self.resample = Image.Resampling(int(preprocessing["resample"]))
        self.lookup = normalisation(preprocessing)
        self.patch_size = int(facts["patch_size"])
        self.position_grid = int(facts["position_grid"])
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])
        self.fake_token = str(facts["fake_image_token"])
        self.global_token = str(facts["global_image_token"])
        self.tokens_per_view = int(facts["image_seq_len"])
        self.constants = self._constants()
        # The bundled model, or one tuned from it: in no published Idefics3 each patch is an image token.
        if self.tokens_per_view == (self.tile // self.patch_size) ** 2:
            self.grounding = POINTS
        if "video" in facts:
            self._set_up_video(facts["video"])

    def _set_up_video(self, video: Mapping[str, Any]) -> None:
        """Take the facts about videos, which SmolVLM2 alone has."""
        self.video_placeholder = str(video["token"])
        self.video_template = VIDEO_TEMPLATE.replace("<image>", self.image_token).replace(
            "<video>", self.video_placeholder
        )
        self.video_edge = int(video["longest_edge"])
        self.video_fps, self.video_frames = float(video["fps"]), int(video["max_frames"])
        self.video_resample = Image.Resampling(int(video["resample"]))
        self.video_lookup = fused_normalisation(video)

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the tiles of a picture `(H, W, 3)`, and the global view after them.

        `high` is what the checkpoint's own processor does, which enlarges a small picture to the full grid; `auto`
        never enlarges the longer side, and gives a picture that does not fill the full grid the one nearest to its
        shape; `low` is the global view only. A budget of tokens lowers the grid until it fits.
        """
        height, width = image.shape[:2]
        detail = budget.detail
        longest_edge = self._longest_edge(height, width, detail, self.max_views(budget))
        whole = Image.fromarray(image)
        if longest_edge is None:
            # The reference resizes twice here too, first to the longest edge and then to the square.
            small = self._resize(whole, *_fit(height, width, self.longest_edge))
            return self._visual([self._resize(small, self.tile, self.tile)], Grid(0, 0))
        small = self._resize(whole, *_fit(height, width, longest_edge))
        grid_height, grid_width = self._grid(small.height, small.width, longest_edge, detail)
        gridded = self._resize(small, grid_height, grid_width)
        rows, cols = grid_height // self.tile, grid_width // self.tile
        if rows == cols == 1:
            return self._visual([gridded], Grid(0, 0))
        crops = [
            gridded.crop((c * self.tile, r * self.tile, (c + 1) * self.tile, (r + 1) * self.tile))
            for r in range(rows)
            for c in range(cols)
        ]
        return self._visual([*crops, self._resize(gridded, self.tile, self.tile)], Grid(rows, cols))

    def sample_frames(self, total: int, rate: float, sampling: FrameSampling, budget: ImageBudget) -> Sequence[int]:
        """Return which of `total` frames are looked at, by the reference's `sample_frames`.

        Of a long video the first and last second are left out. `sampling.frames` are spread from the first frame to the
        last, however short the video is.
        """
        most = MAX_FRAMES if sampling.frames is not None else self.video_frames
        if budget.max_views is not None:
            most = min(most, budget.max_views)
        first, last, duration = 0, total - 1, total / rate
        if sampling.frames is not None:
            count = min(sampling.frames, most, total)
        else:
            fps = sampling.fps or self.video_fps
            count = max(1, min(round(fps * duration), most))
            if duration - 2 > most * fps:
                first, last = int(rate), min(int(total - rate), last)
        if first >= last:
            first, last = 0, total - 1
        places: list[int] = np.unique(np.linspace(first, last, count, dtype=np.int64)).tolist()
        return places

    def frame_size(self, height: int, width: int, count: int, budget: ImageBudget) -> tuple[int, int]:  # noqa: ARG002
        """Return the size of the one tile that each frame is."""
        budget.check(self.tokens_per_view)
        return self.tile, self.tile

    def resize_frame(self, image: RGB, size: tuple[int, int]) -> RGB:
        """Return a frame `(H, W, 3)` at `size`; the reference resizes twice, first to the longest edge of videos."""
        height, width = _fit(image.shape[0], image.shape[1], min(self.video_edge, MAX_SIDE))
        return resized(resized(image, (height, width), self.video_resample), size, self.video_resample)

    def preprocess_video(self, frames: Frames) -> Visual:
        """Return a view for each frame."""
        views = [pixel_view(pixels, self.video_lookup) for pixels in frames.pixels]
        return Visual(views, Clip(tuple(frames.times_s), frames.duration_s))

    def is_video(self, layout: Hashable) -> bool:
        """Tell whether a layout is that of a video."""
        return isinstance(layout, Clip)

    def _video_text(self, clip: Clip) -> str:
        """Return the block of a video: `replace_video_token` of the reference."""
        frames = "".join(
            f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{self.image_text(Grid(0, 0))}"
            for time in clip.times_s
        )
        count, duration = in_words(len(clip.times_s)), timedelta(seconds=int(clip.duration_s))
        intro = f"You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
        return f"{intro}{frames}\n\n"

    def image_text(self, layout: Hashable) -> str:
        """Return the image block of the prompt: each tile named by row and column, the global view last."""
        if isinstance(layout, Clip):
            return self._video_text(layout)
        assert isinstance(layout, tuple)
        grid = Grid(*layout)
        image_tokens = self.image_token * self.tokens_per_view
        lines = [
            "".join(f"{self.fake_token}<row_{r + 1}_col_{c + 1}>{image_tokens}" for c in range(grid.cols)) + "\n"
            for r in range(grid.rows)
        ]
        separator = "\n" if lines else ""
        return "".join(lines) + f"{separator}{self.fake_token}{self.global_token}{image_tokens}{self.fake_token}"

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.image_text(_LARGEST)

    def _constants(self) -> Arrays:
        """Return the mask and position ids of one full tile: `(1, P, P)` bool and `(1, P * P)` int64.

        A tile of P x P patches takes its positions from a G x G table: row (and column) i stands at i * G // P. These
        are the positions that published weights were trained with; transformers 4.55.1 to 4.57 compute them one too low
        in float32 (docs/reference.md).
        """
        patches = self.tile // self.patch_size
        places = np.arange(patches, dtype=np.int64) * self.position_grid // patches
        positions = (places[:, None] * self.position_grid + places[None, :]).reshape(1, -1)
        return {"patch_attention_mask": np.ones((1, patches, patches), np.bool_), "patch_position_ids": positions}

    def _longest_edge(self, height: int, width: int, detail: Detail, max_views: int | None) -> int | None:
        """Return the longer side to resize to before splitting, or None for the global view only."""
        if not self.split or detail == "low" or max_views == 1:
            return None
        longest_edge = self.longest_edge
        if detail == "auto":
            longest_edge = min(longest_edge, max(height, width) // self.tile * self.tile)
        while max_views is not None and longest_edge > self.tile:
            if self._tile_count(height, width, longest_edge, detail) <= max_views:
                break
            longest_edge -= self.tile
        lowered = detail == "auto" or max_views is not None
        return None if lowered and longest_edge <= self.tile else longest_edge

    def _tile_count(self, height: int, width: int, longest_edge: int, detail: Detail) -> int:
        grid_height, grid_width = self._grid(*_fit(height, width, longest_edge), longest_edge, detail)
        tiles = (grid_height // self.tile) * (grid_width // self.tile)
        return tiles + 1 if tiles > 1 else 1

    def _grid(self, height: int, width: int, longest_edge: int, detail: Detail) -> tuple[int, int]:
        """Return the size in whole tiles: the nearest for `auto` below the full grid, else as the reference rounds."""
        if detail == "auto" and longest_edge < self.longest_edge:
            return _nearest(height, self.tile), _nearest(width, self.tile)
        return _to_grid(height, width, self.tile)

    def _resize(self, image: Image.Image, height: int, width: int) -> Image.Image:
        return image.resize((width, height), resample=self.resample)

    def _visual(self, tiles: list[Image.Image], grid: Grid) -> Visual:
        return Visual([pixel_view(np.asarray(tile), self.lookup) for tile in tiles], grid)


def in_words(number: int) -> str:
    """Return a number below 1000 in English, as num2words writes it."""
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    if number < 100:
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")


def _fit(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """Return the size with the longer side at `longest_edge`, the shorter made even, neither beyond `MAX_SIDE`."""
    aspect_ratio = width / height
    if width >= height:
        width = longest_edge
        height = int(width / aspect_ratio)
        height += height % 2
    else:
        height = longest_edge
        width = int(height * aspect_ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    if max(height, width) > MAX_SIDE:
        aspect_ratio = width / height
        if width >= height:
            height, width = int(MAX_SIDE / aspect_ratio), MAX_SIDE
        else:
            height, width = MAX_SIDE, int(MAX_SIDE * aspect_ratio)
    return max(height, 1), max(width, 1)


def _nearest(side: int, tile: int) -> int:
    """Return the multiple of `tile` nearest to `side`, at least one."""
    return max(1, (side + tile // 2) // tile) * tile


def _to_grid(height: int, width: int, tile: int) -> tuple[int, int]:
    """Return the size with both sides raised to multiples of `tile`, the longer first, as the reference rounds."""
    aspect_ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect_ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect_ratio) / tile) * tile
    return height, width
