"""From a view's pixels to `pixel_values`, as transformers' Pillow-based image processors compute them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.families.base import PIXEL_VALUES, RGB, View

Lookup = npt.NDArray[np.float32]
"""`(3, 256)`: what each channel's every value becomes."""


def pixel_view(pixels: RGB, lookup: Lookup) -> View:
    """Return the view of `pixels` `(H, W, 3)`, whose only input is its `pixel_values`."""
    return View(pixels, lambda: {PIXEL_VALUES: normalised(pixels, lookup)})


def normalised(pixels: RGB, lookup: Lookup) -> npt.NDArray[np.float32]:
    """Return `pixel_values` `(1, 3, H, W)` of `(H, W, 3)`: each channel's value looked up in `(3, 256)`."""
    return np.stack([lookup[channel][pixels[..., channel]] for channel in range(3)])[None]


def normalisation(preprocessing: Mapping[str, Any]) -> Lookup:
    """Return `(3, 256)`: every uint8 value rescaled in float64, then normalised in float32, as the reference does.

    `image_mean` and `image_std` are one number for each channel, or one for all.
    """
    levels = (np.arange(256, dtype=np.float64) * float(preprocessing["rescale_factor"])).astype(np.float32)
    mean, std = (
        np.broadcast_to(np.asarray(preprocessing[name], np.float32), 3)[:, None] for name in ("image_mean", "image_std")
    )
    return np.asarray((levels[None, :] - mean) / std)


def resized(image: RGB, size: tuple[int, int], resample: Image.Resampling) -> RGB:
    """Return a frame `(H, W, 3)` at `size`, height and width.

    Its rows are resampled before its columns, as by torchvision; Pillow takes the cheaper order.
    """
    height, width = size
    rows = Image.fromarray(image).resize((width, image.shape[0]), resample)
    return np.asarray(rows.resize((width, height), resample))


def fused_normalisation(preprocessing: Mapping[str, Any]) -> Lookup:
    """Return `(3, 256)` as the reference's torchvision-based processors compute it, all of those of videos.

    They scale mean and standard deviation in float32 instead of the pixels: `_fuse_mean_std_and_rescale_factor`.
    """
    scale = np.float32(1.0 / float(preprocessing["rescale_factor"]))
    mean, std = (
        np.broadcast_to(np.asarray(preprocessing[name], np.float32), 3)[:, None] * scale
        for name in ("image_mean", "image_std")
    )
    return np.asarray((np.arange(256, dtype=np.float32)[None, :] - mean) / std)
