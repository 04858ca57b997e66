"""Granite for Docling: a page is split into the grid of square tiles nearest to its shape, each named in the prompt.

Grid, resampling and arithmetic follow transformers' Pillow-based `GraniteDoclingImageProcessor`, and the prompt follows
`GraniteDoclingProcessor` (both of transformers 5.24), so that `detail="high"` gives equal arrays and equal token ids.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.families.base import RGB, Arrays, Family, ImageBudget, LanguageInputs, Visual
from edgevlm.families.imaging import normalisation, pixel_view
from edgevlm.families.tiling import Grid, cut, nearest_grid, tiles_within

TILES_PER_SIDE = 16
"""The tokenizer names tiles from `<row_1_col_1>` to `<row_16_col_16>`, and the reference makes no longer grid."""
_LARGEST = Grid(TILES_PER_SIDE, TILES_PER_SIDE)


@dataclass(frozen=True)
class SpreadRule:
    """Which pages may have more tiles than others: newspaper spreads, which their grid would shrink too much."""

    max_patches: int
    max_scale: float
    """Of the usual grid's width to the page's, below which the page counts; 0: every page does."""
    min_aspect: float
    max_aspect: float
    """Width to height: above the one, and at most the other unless it is 0."""

    def covers(self, height: int, width: int, usual: Grid, tile: int) -> bool:
        """Tell whether a page counts whose grid is the `usual` one otherwise."""
        aspect = width / height
        if aspect <= self.min_aspect or 0 < self.max_aspect < aspect:
            return False
        return self.max_scale == 0 or usual.cols * tile / width < self.max_scale


class GraniteDocling(Family):
    """The family's rules, from the facts that the exporter took from the checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        preprocessing = facts["preprocessing"]
        self.tile = int(preprocessing["tile"])
        self.view_size = (self.tile, self.tile)
        self.min_patches, self.max_patches = int(preprocessing["min_patches"]), int(preprocessing["max_patches"])
        self.spreads = SpreadRule(**preprocessing["spreads"]) if "spreads" in preprocessing else None
        self.resample = Image.Resampling(int(preprocessing["resample"]))
        self.lookup = normalisation(preprocessing)
        self.placeholder = self.image_token = str(facts["image_token"])
        self.image_token_id = int(facts["image_token_id"])
        self.fake_token, self.global_token = str(facts["fake_image_token"]), str(facts["global_image_token"])
        self.tokens_per_view = int(facts["image_seq_len"])

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the tiles of a page `(H, W, 3)`, and the thumbnail after them where there are several.

        `high` is what the checkpoint's own processor does, which enlarges a small page to as many tiles as fit its
        shape; `auto` takes of the grids those that the page has the pixels for; `low` is one tile. A budget of tokens
        counts the thumbnail, too.
        """
        height, width = image.shape[:2]
        most = self._most_patches(height, width)
        most = tiles_within(most, height * width, self.tile, budget.detail, self.max_views(budget))
        grid = self._grid(height, width, most)
        views = cut(image, grid, self.tile, self.resample)
        return Visual([pixel_view(view, self.lookup) for view in views], grid)

    def image_text(self, layout: Hashable) -> str:
        """Return the image block of the prompt: each tile named by row and column, then the thumbnail, if any."""
        assert isinstance(layout, tuple)
        grid, image_tokens = Grid(*layout), self.image_token * self.tokens_per_view
        lines = [
            "".join(f"{self.fake_token}<row_{r + 1}_col_{c + 1}>{image_tokens}" for c in range(grid.cols)) + "\n"
            for r in range(grid.rows)
        ]
        if grid.tiles > 1:
            lines.append(f"\n{self.fake_token}{self.global_token}{image_tokens}{self.fake_token}")
        return "".join(lines)

    def block_text(self) -> str:
        """Return all that an image block may be made of."""
        return self.image_text(_LARGEST)

    def language_inputs(
        self, ids: npt.NDArray[np.int64], layouts: Sequence[Hashable], features: Sequence[Arrays]
    ) -> LanguageInputs:
        """Return the positions of a prompt, and features for the first layers of the decoder."""
        positions = super().language_inputs(ids, layouts, features).positions
        return LanguageInputs(positions, self.deeper_features(ids, features))

    def _most_patches(self, height: int, width: int) -> int:
        """Return how many tiles a page may have by the checkpoint's own rules."""
        if self.spreads and self.max_patches > 1:
            usual = self._grid(height, width, self.max_patches)
            if self.spreads.covers(height, width, usual, self.tile):
                return self.spreads.max_patches
        return self.max_patches

    def _grid(self, height: int, width: int, most: int) -> Grid:
        return nearest_grid(height, width, self.tile, min(self.min_patches, most), most, TILES_PER_SIDE)
