"""Grids of image tokens, for families that see a picture at its own shape."""

from __future__ import annotations

import math
from typing import NamedTuple


class Grid(NamedTuple):
    """Rows and columns of a picture's image tokens."""

    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        """How many image tokens the picture has."""
        return self.rows * self.cols


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
