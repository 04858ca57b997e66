"""InternVL (3 and 3.5): split a picture into the grid of square tiles nearest to its shape, add a thumbnail.

Grid, resampling and arithmetic follow transformers' Pillow-based `GotOcr2ImageProcessor`, which splits always where
`InternVLProcessor` calls it, and the prompt follows that processor (both of transformers 5.24), so that `detail="high"`
gives equal arrays and equal token ids.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from edgevlm.families.base import RGB, Detail, Family, ImageBudget, Visual
from edgevlm.families.imaging import normalisation, pixel_view


class Grid(NamedTuple):
    """How a picture was split: `rows` x `cols` tiles; a thumbnail follows where there are several."""

    rows: int
    cols: int

    @property
    def views(self) -> int:
        """How many calls of the vision encoder the picture takes."""
        tiles = self.rows * self.cols
        return tiles + 1 if tiles > 1 else 1


class InternVL(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    other_placeholders = ("<image>",)

    def __init__(self, facts: Mapping[str, Any]) -> None:
        preprocessing = facts["preprocessing"]
        self.tile = int(preprocessing["tile"])
        self.view_size = (self.tile, self.tile)
        self.min_patches, self.max_patches = int(preprocessing["min_patches"]), int(preprocessing["max_patches"])
        self.resample = Image.Resampling(int(preprocessing["resample"]))
        self.lookup = normalisation(preprocessing)
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])
        self.start_token, self.end_token = str(facts["start_image_token"]), str(facts["end_image_token"])
        self.tokens_per_view = int(facts["image_seq_len"])

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the tiles of a picture `(H, W, 3)`, and the thumbnail after them.

        `high` is what the checkpoint's own processor does, which enlarges a small picture to as many tiles as fit its
        shape; `auto` takes of the grids those that the picture has the pixels for; `low` is one tile. A budget of
        tokens counts the thumbnail, too.
        """
        height, width = image.shape[:2]
        most = self._most(height * width, budget.detail, self.max_views(budget))
        rows, cols = grid = nearest_grid(height, width, self.tile, min(self.min_patches, most), most)
        whole, side = Image.fromarray(image), self.tile
        gridded = whole.resize((cols * side, rows * side), self.resample)
        views = [
            gridded.crop((c * side, r * side, (c + 1) * side, (r + 1) * side)) for r in range(rows) for c in range(cols)
        ]
        if len(views) > 1:
            views.append(whole.resize((side, side), self.resample))
        return Visual([pixel_view(np.asarray(view), self.lookup) for view in views], grid)

    def image_text(self, layout: Hashable) -> str:
        """Return the image block of the prompt: the image tokens of all views, between two that hold them."""
        assert isinstance(layout, tuple)
        return self.start_token + self.image_token * (self.tokens_per_view * Grid(*layout).views) + self.end_token

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.image_text(Grid(1, 1))

    def _most(self, pixels: int, detail: Detail, max_views: int | None) -> int:
        """Return how many tiles a picture may have at most, the thumbnail not counted."""
        most = 1 if detail == "low" else self.max_patches
        if detail == "auto":
            most = min(most, max(1, pixels // self.tile**2))
        return most if max_views is None else min(most, max(1, max_views - 1))


def nearest_grid(height: int, width: int, tile: int, least: int, most: int) -> Grid:
    """Return the grid of `least` to `most` tiles whose shape is nearest to the picture's.

    Of grids of one shape the larger one is taken if the picture has more than half of its pixels. A lower `most` so
    never makes more tiles.
    """
    grids = [Grid(rows, cols) for cols in range(1, most + 1) for rows in range(1, most // cols + 1)]
    best, nearest = Grid(1, 1), math.inf
    for grid in sorted(grids, key=lambda grid: grid.rows * grid.cols):
        tiles = grid.rows * grid.cols
        if tiles < least:
            continue
        distance = abs(width / height - grid.cols / grid.rows)
        if distance < nearest:
            best, nearest = grid, distance
        elif distance == nearest and width * height > 0.5 * tile * tile * tiles:
            best = grid
    return best
