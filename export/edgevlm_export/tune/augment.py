"""What the same camera might have seen on another day: a little turned, moved, lit, blurred, noisy."""

from __future__ import annotations

from io import BytesIO
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

Random: TypeAlias = np.random.Generator
LONGEST = 768
"""Pixels of the longer side that an augmented picture keeps: more is not seen, and costs time."""


def augmented(pixels: npt.NDArray[np.uint8], random: Random) -> npt.NDArray[np.uint8]:
    """Return a picture `(H, W, 3)` as it might have been taken at another time; nothing is mirrored."""
    image = Image.fromarray(pixels)
    if max(image.size) > LONGEST:
        image.thumbnail((LONGEST, LONGEST))
    if random.random() < 0.85:
        image = _moved(image, random)
    for enhance, low, high in (
        (ImageEnhance.Brightness, 0.65, 1.3),
        (ImageEnhance.Contrast, 0.7, 1.25),
        (ImageEnhance.Color, 0.6, 1.3),
    ):
        if random.random() < 0.5:
            image = enhance(image).enhance(float(random.uniform(low, high)))
    if random.random() < 0.3:
        image = _shaded(image, random)
    if random.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0.3, 1.4)) * max(image.size) / 384))
    if random.random() < 0.5:
        image = _noisy(image, random)
    if random.random() < 0.3:
        image = _compressed(image, int(random.integers(40, 90)))
    return np.asarray(image)


def _moved(image: Image.Image, random: Random) -> Image.Image:
    """Return the picture turned by up to 5 degrees, and moved, scaled and tilted by some percent."""
    width, height = image.size
    turn = np.deg2rad(np.clip(random.normal(0, 2.2), -5, 5))
    zoom, (across, down) = random.uniform(0.9, 1.1), random.uniform(-0.04, 0.04, 2)
    cos, sin = np.cos(turn) / zoom, np.sin(turn) / zoom
    g, h = random.normal(0, 0.03, 2).clip(-0.08, 0.08) / (width, height)
    cx, cy = width / 2, height / 2
    w = g * cx + h * cy + 1
    c = (cx + across * width) * w - cos * cx - sin * cy
    f = (cy + down * height) * w + sin * cx - cos * cy
    fill = tuple(int(v) for v in np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0])
    data = (cos, sin, c, -sin, cos, f, g, h)
    return image.transform(image.size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR, fillcolor=fill)


def _shaded(image: Image.Image, random: Random) -> Image.Image:
    """Return the picture with one side of a line, wherever it runs, in the shade."""
    width, height = image.size
    angle, sharp = random.uniform(0, 2 * np.pi), random.uniform(4, 40)
    xs, ys = np.linspace(-0.5, 0.5, 64)[None, :], np.linspace(-0.5, 0.5, 64)[:, None]
    side = 1 / (1 + np.exp(-sharp * (xs * np.cos(angle) + ys * np.sin(angle) + random.uniform(-0.25, 0.25))))
    mask = Image.fromarray((255 * (1 - random.uniform(0.15, 0.5) * side)).astype(np.uint8))
    light = np.asarray(mask.resize((width, height), Image.Resampling.BILINEAR), np.uint16)[..., None]
    return Image.fromarray((np.asarray(image, np.uint16) * light // 255).astype(np.uint8))


def _noisy(image: Image.Image, random: Random) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    noise = random.standard_normal((*pixels.shape[:2], 1), np.float32) * random.uniform(1, 9)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    stream = BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(BytesIO(stream.getvalue())).convert("RGB")
