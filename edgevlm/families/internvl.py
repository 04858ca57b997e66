"""InternVL (3 and 3.5): split a picture into the grid of square tiles nearest to its shape, add a thumbnail.

Grid, resampling and arithmetic follow transformers' Pillow-based `GotOcr2ImageProcessor`, which splits always where
`InternVLProcessor` calls it, and the prompt follows that processor (both of transformers 5.24), so that `detail="high"`
gives equal arrays and equal token ids.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from PIL import Image

from edgevlm.families.base import RGB, Family, ImageBudget, Visual
from edgevlm.families.imaging import normalisation, pixel_view
from edgevlm.families.tiling import Grid, cut, nearest_grid, tiles_within


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
        most = tiles_within(self.max_patches, height * width, self.tile, budget.detail, self.max_views(budget))
        grid = nearest_grid(height, width, self.tile, min(self.min_patches, most), most)
        views = cut(image, grid, self.tile, self.resample)
        return Visual([pixel_view(view, self.lookup) for view in views], grid)

    def image_text(self, layout: Hashable) -> str:
        """Return the image block of the prompt: the image tokens of all views, between two that hold them."""
        assert isinstance(layout, tuple)
        return self.start_token + self.image_token * (self.tokens_per_view * Grid(*layout).views) + self.end_token

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.image_text(Grid(1, 1))
