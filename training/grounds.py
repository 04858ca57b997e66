"""What devices are seen against: photographs, and textures that are made.

The photographs come from Debian packages and from scikit-image, none of which ships with the model:

- mate-backgrounds (GPL-2+ and CC-BY-SA),
- plasma-workspace-wallpapers (GPL-2+),
- scikit-image's data (public domain, CC0 and CC-BY), without its medical pictures, its coins and its clock.

The third renderer's photographs are of other packages. Without any of these, textures alone are drawn against.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from training.scene import Random, between, chance, pick

SHARE = Path("/usr/share")
WALLPAPERS = (
    "backgrounds/mate/nature/*.jpg",
    "wallpapers/*/contents/screenshot.[jp][pn]g",
)
SCIKIT_IMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "page.png", "rocket.jpg", "text.png"),
)
LONGEST = 1000
"""Pixels of a photograph's longer side, as it is kept."""


_textures_alone = False


@contextmanager
def textures_alone() -> Iterator[None]:
    """Draw against textures, for pictures that may be given away."""
    global _textures_alone  # noqa: PLW0603
    before, _textures_alone = _textures_alone, True
    try:
        yield
    finally:
        _textures_alone = before


@cache
def photographs() -> tuple[Path, ...]:
    """Return the photographs' files, in a fixed order."""
    found = [path for pattern in WALLPAPERS for path in sorted(SHARE.glob(pattern))]
    if spec := find_spec("skimage"):
        folder = Path(str(spec.origin)).parent / "data"
        found += [folder / name for name in SCIKIT_IMAGE if (folder / name).is_file()]
    if not found:
        warnings.warn(
            "no photographs to draw against; training/README.md names the packages that carry some", stacklevel=2
        )
    return tuple(found)


@cache
def _loaded(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.thumbnail((LONGEST, LONGEST))
        return image.convert("RGB")


def ground(random: Random, width: int, height: int) -> Image.Image:
    """Return a ground of `width` x `height`: two in three a part of a photograph, else a texture."""
    files = () if _textures_alone else photographs()
    image = _part(random, _loaded(pick(random, files)), width, height) if files and chance(random, 0.66) else None
    image = image or texture(random, width, height)
    if chance(random, 0.45):
        image = image.filter(ImageFilter.GaussianBlur(between(random, 0.5, 7)))
    image = ImageEnhance.Brightness(image).enhance(between(random, 0.6, 1.3))
    image = ImageEnhance.Contrast(image).enhance(between(random, 0.3, 1.1))
    return ImageEnhance.Color(image).enhance(between(random, 0.2, 1.3)) if chance(random, 0.4) else image


def _part(random: Random, photograph: Image.Image, width: int, height: int) -> Image.Image:
    aspect = width / height
    whole = min(photograph.width, photograph.height * aspect)
    wide = whole * between(random, 0.35, 1.0)
    x, y = between(random, 0, photograph.width - wide), between(random, 0, photograph.height - wide / aspect)
    part = photograph.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + wide, y + wide / aspect))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance(random, 0.5) else part


def texture(random: Random, width: int, height: int) -> Image.Image:
    """Return noise of several scales, stripes, tiles or patches in two or more colours."""
    colours = random.integers(10, 246, (4, 3)).astype(np.float32)
    kind = random.random()
    if kind < 0.45:
        field = sum(_noise(random, width, height, cells) / cells**0.5 for cells in (3, 9, 30, 90))
        low, high = np.quantile(field, (0.02, 0.98))
        field = np.clip((field - low) / (high - low + 1e-6), 0, 1)
    elif kind < 0.7:
        angle, period = between(random, 0, np.pi), between(random, 8, 120)
        xs, ys = np.arange(width)[None, :], np.arange(height)[:, None]
        field = ((xs * np.cos(angle) + ys * np.sin(angle)) / period) % 1.0
        field = (field > between(random, 0.1, 0.9)).astype(np.float32) if chance(random, 0.7) else field
    else:
        cells = int(random.integers(2, 14))
        coarse = random.random((cells, max(1, round(cells * width / height))))
        field = np.asarray(
            Image.fromarray(coarse.astype(np.float32)).resize((width, height), Image.Resampling.NEAREST)
        ).copy()
        field += 0.1 * _noise(random, width, height, 60)
    at = np.clip(field, 0, 1)[..., None] * 3
    index = np.minimum(at.astype(int), 2)[..., 0]
    mixed = colours[index] + (colours[index + 1] - colours[index]) * (at - index[..., None])
    if chance(random, 0.5):
        mixed += random.normal(0, between(random, 2, 14), (height, width, 1))
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def _noise(random: Random, width: int, height: int, cells: int) -> np.ndarray:
    coarse = random.random((max(2, cells * height // width), cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
