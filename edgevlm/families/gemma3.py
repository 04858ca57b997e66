"""Gemma 3: one view of a picture, and crops of a long one where the checkpoint asks for pan-and-scan.

Crops, resampling and arithmetic follow transformers' Pillow-based `Gemma3ImageProcessor`, and the prompt follows
`Gemma3Processor` (both of transformers 5.24), so that `detail="high"` gives equal arrays and equal token ids. Image
tokens of a view attend to each other both ways: `get_block_sequence_ids_for_mask`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.families.base import IMAGE_GROUPS, RGB, Arrays, Family, ImageBudget, LanguageInputs, Visual
from edgevlm.families.imaging import normalisation, pixel_view

WHOLE, CROPS = "Here is the original image ", " and here are some crops to help you see better "
"""What the prompt says before a picture that is cropped, and before its crops."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


class PanAndScan(NamedTuple):
    """Which pictures are cropped, and into how many crops, which lie in a row along the longer side."""

    min_crop_size: int
    max_num_crops: int
    min_ratio_to_activate: float

    def boxes(self, height: int, width: int, most: int | None) -> list[Box]:
        """Return the crops of a picture, none or `most` at most, where that is a number."""
        long, short = max(height, width), min(height, width)
        if long / short < self.min_ratio_to_activate:
            return []
        count = min(math.floor(long / self.min_crop_size), math.floor(long / short + 0.5))
        count = min(max(2, count), self.max_num_crops)
        if most is not None and most < count:
            count = most if most > 1 else 0  # one crop would be the whole picture
        length = math.ceil(long / max(count, 1))
        if count < 1 or min(length, short) < self.min_crop_size:
            return []
        ends = [(start, min(start + length, long)) for start in range(0, long, length)]
        return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in ends]


class Gemma3(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        preprocessing = facts["preprocessing"]
        self.side = int(preprocessing["side"])
        self.view_size = (self.side, self.side)
        self.resample = Image.Resampling(int(preprocessing["resample"]))
        self.lookup = normalisation(preprocessing)
        asked = preprocessing["pan_and_scan"]
        self.pan_and_scan = PanAndScan(**asked) if asked else None
        self.placeholder = self.boi_token = str(facts["boi_token"])
        self.eoi_token, self.image_token = str(facts["eoi_token"]), str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])
        self.tokens_per_view = int(facts["image_seq_len"])

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the view of a whole picture `(H, W, 3)`, and those of its crops after it.

        There are crops under pan-and-scan alone, with `high` and `auto`; a budget lowers their number.
        """
        views, whole = self.max_views(budget), Image.fromarray(image)
        boxes: list[Box] = []
        if self.pan_and_scan and budget.detail != "low":
            boxes = self.pan_and_scan.boxes(whole.height, whole.width, None if views is None else views - 1)
        shown = [each.resize((self.side, self.side), self.resample) for each in (whole, *map(whole.crop, boxes))]
        return Visual([pixel_view(np.asarray(each), self.lookup) for each in shown], len(boxes))

    def image_text(self, layout: Hashable) -> str:
        """Return the image block of the prompt, in words where the picture is cropped."""
        assert isinstance(layout, int)
        view = f"\n\n{self.boi_token}{self.image_token * self.tokens_per_view}{self.eoi_token}\n\n"
        return WHOLE + view + CROPS + " ".join([view] * layout) if layout else view

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.boi_token + self.image_token + self.eoi_token

    def language_inputs(
        self,
        ids: npt.NDArray[np.int64],
        layouts: Sequence[Hashable],
        features: Sequence[Arrays],
    ) -> LanguageInputs:
        """Return the positions of a prompt, and the view that each image token is of, counted from 1."""
        shown = self.image_rows(ids)
        begins = shown & ~np.append(False, shown[:-1])
        groups = np.where(shown, np.cumsum(begins), 0)
        return LanguageInputs(super().language_inputs(ids, layouts, features).positions, {IMAGE_GROUPS: groups})
