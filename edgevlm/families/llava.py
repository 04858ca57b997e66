"""LLaVA (1.5 and interleave): one view of a picture, resized and cropped as its vision tower's processor does it.

Resampling and arithmetic follow transformers' Pillow-based `CLIPImageProcessor`, `LlavaImageProcessor` and
`SiglipImageProcessor`, and the prompt follows `LlavaProcessor` (all of transformers 5.24), so that pixel values and
token ids are equal. There is no more and no less detail to be had: all settings give the same view.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import isqrt
from typing import Any

import numpy as np
from PIL import Image

from edgevlm.families.base import MAX_PIXELS, RGB, Family, ImageBudget, Visual
from edgevlm.families.imaging import normalisation, pixel_view

WHOLE = "whole"
"""The layout of a picture that is one view."""


class Llava(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        preprocessing = facts["preprocessing"]
        self.side = int(preprocessing["side"])
        self.view_size = (self.side, self.side)
        self.shortest_edge = int(preprocessing["shortest_edge"] or 0)
        self.pad = bool(preprocessing["pad"])
        self.background = background(preprocessing)
        self.resample = Image.Resampling(int(preprocessing["resample"]))
        self.lookup = normalisation(preprocessing)
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])
        self.tokens_per_view = int(facts["image_seq_len"])

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the one view of a picture `(H, W, 3)`: all of it, or the square in its middle."""
        budget.check(self.tokens_per_view)
        whole = padded_to_square(image, self.background) if self.pad else Image.fromarray(image)
        view = self._crop(whole) if self.shortest_edge else whole.resize((self.side, self.side), self.resample)
        return Visual([pixel_view(np.asarray(view), self.lookup)], WHOLE)

    def image_text(self, layout: Hashable) -> str:  # noqa: ARG002
        """Return the picture's image tokens."""
        return self.image_token * self.tokens_per_view

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.image_token

    def _crop(self, whole: Image.Image) -> Image.Image:
        """Return the square in the middle of the picture whose shorter side has become `shortest_edge`.

        A picture that would get more than `MAX_PIXELS` by that is cropped as it is resized, which comes to the same but
        for rounding.
        """
        side, short, long = self.side, min(whole.size), max(whole.size)
        longer = int(self.shortest_edge * long / short)
        width, height = (self.shortest_edge, longer) if whole.width <= whole.height else (longer, self.shortest_edge)
        left, top = (width - side) // 2, (height - side) // 2
        if width * height > MAX_PIXELS:
            across, down = whole.width / width, whole.height / height
            box = (left * across, top * down, (left + side) * across, (top + side) * down)
            return whole.resize((side, side), self.resample, box)
        return whole.resize((width, height), self.resample).crop((left, top, left + side, top + side))


def background(preprocessing: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the mean colour, which normalisation makes nothing of, rounded down."""
    mean = np.broadcast_to(np.asarray(preprocessing["image_mean"], np.float64), 3)
    red, green, blue = (int(each * 255) for each in mean)
    return red, green, blue


def padded_to_square(image: RGB, colour: tuple[int, int, int]) -> Image.Image:
    """Return the picture `(H, W, 3)` in the middle of a square.

    The square has at most `MAX_PIXELS`: a picture too long for that is shrunk first.
    """
    whole = Image.fromarray(image)
    longest = isqrt(MAX_PIXELS)
    if max(whole.size) > longest:
        shrink = longest / max(whole.size)
        whole = whole.resize((max(1, int(whole.width * shrink)), max(1, int(whole.height * shrink))))
    side = max(whole.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(whole, ((side - whole.width) // 2, (side - whole.height) // 2))
    return square
