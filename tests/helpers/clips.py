"""Frames and clips of tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

RATE = 8
"""Frames a second of the clips made here."""


def moving_square(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return frame `number` of a clip: a square moves over its upper half, the lower shows the number's eight bits."""
    frame = np.full((height, width, 3), 90, np.uint8)
    left = 5 * number % (width - 6)
    frame[: height // 4, left : left + 6] = (250, 40, 20)
    bits = np.unpackbits(np.uint8(number)) * np.uint8(255)
    frame[height // 2 :] = np.repeat(bits, -(-width // 8))[None, :width, None]
    return frame


def static(seed: int, height: int, width: int) -> np.ndarray:
    """Return a frame in which no two places are alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def make_clip(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "ffv1",
    pixels: str = "bgr0",
    rate: int = RATE,
    **options: Any,
) -> Path:
    """Write a clip, lossless unless another codec is asked for."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames[0].shape[0], frames[0].shape[1], pixels
        for name, value in options.items():
            setattr(stream, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
