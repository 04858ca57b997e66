"""Square tiles of a picture on the grid nearest to its shape, as transformers' `GotOcr2ImageProcessor` cuts them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from edgevlm.families.base import RGB, Detail


class Grid(NamedTuple):
    """How a picture was split: `rows` x `cols` tiles; a thumbnail follows where there are several."""

    rows: int
    cols: int

    @property
    def tiles(self) -> int:
        """How many tiles there are, the thumbnail not counted."""
        return self.rows * self.cols

    @property
    def views(self) -> int:
        """How many calls of the vision encoder the picture takes."""
        return self.tiles + 1 if self.tiles > 1 else 1


def tiles_within(most: int, pixels: int, tile: int, detail: Detail, max_views: int | None) -> int:
    """Return how many of at most `most` tiles a picture of so many pixels may have, the thumbnail not counted.

    `auto` takes no more than it has the pixels for, `low` takes one. A thumbnail counts as one of `max_views`.
    """
    if detail == "low":
        return 1
    if detail == "auto":
        most = min(most, max(1, pixels // tile**2))
    return most if max_views is None else min(most, max(1, max_views - 1))


def nearest_grid(height: int, width: int, tile: int, least: int, most: int, longest: int | None = None) -> Grid:
    """Return the grid of `least` to `most` tiles whose shape is nearest to the picture's, a side at most `longest`.

    Of grids of one shape the larger one is taken if the picture has more than half of its pixels. A lower `most` so
    never makes more tiles.
    """
    side = min(most, longest or most)
    grids = [Grid(rows, cols) for cols in range(1, side + 1) for rows in range(1, min(side, most // cols) + 1)]
    best, nearest = Grid(1, 1), math.inf
    for grid in sorted(grids, key=lambda grid: grid.tiles):
        if grid.tiles < least:
            continue
        distance = abs(width / height - grid.cols / grid.rows)
        if distance < nearest:
            best, nearest = grid, distance
        elif distance == nearest and width * height > 0.5 * tile * tile * grid.tiles:
            best = grid
    return best


def cut(image: RGB, grid: Grid, tile: int, resample: Image.Resampling) -> list[RGB]:
    """Return the tiles of a picture `(H, W, 3)`, row by row, and the thumbnail after them where there are several."""
    whole = Image.fromarray(image)
    gridded = whole.resize((grid.cols * tile, grid.rows * tile), resample)
    views = [
        gridded.crop((col * tile, row * tile, (col + 1) * tile, (row + 1) * tile))
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]
    if len(views) > 1:
        views.append(whole.resize((tile, tile), resample))
    return [np.asarray(view) for view in views]
