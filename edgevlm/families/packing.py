"""A picture as a row of patches, each of them its pixels one after another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgevlm.families.base import RGB
from edgevlm.families.imaging import Lookup


def packed_order(rows: int, cols: int, merge_size: int) -> npt.NDArray[np.int64]:
    """Return `(N,)`: the place in raster order, `row * cols + col`, of each packed patch of `rows` x `cols`."""
    blocks = np.arange(rows * cols).reshape(rows // merge_size, merge_size, cols // merge_size, merge_size)
    return blocks.transpose(0, 2, 1, 3).reshape(-1)


def packed_pixels(
    pixels: RGB, order: npt.NDArray[np.int64], patch_size: int, frames: int, lookup: Lookup
) -> npt.NDArray[np.float32]:
    """Return `(N, C * T * P * P)`: the patches of T = `frames` frames `(T, H, W, 3)`, normalised.

    A picture `(H, W, 3)` is a still, the same for each of them.
    """
    shown = pixels.reshape(-1, *pixels.shape[-3:])
    rows, cols = (side // patch_size for side in shown.shape[1:3])
    grid = shown.reshape(-1, rows, patch_size, cols, patch_size, 3).transpose(1, 3, 5, 0, 2, 4)
    patches = grid.reshape(-1, 3, len(shown), patch_size, patch_size)[order]
    values = np.empty((len(order), 3, frames, patch_size, patch_size), np.float32)
    for channel in range(3):
        values[:, channel] = lookup[channel][patches[:, channel]]
    return values.reshape(len(order), -1)
