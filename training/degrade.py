"""What a camera does to a scene: turn, tilt, shadow, blur, noise, colour cast, JPEG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from training.scene import Random, Scene, between, chance


def photographed(draw: Callable[[Random], Scene], random: Random) -> Scene:
    """Return what `draw` draws, as a camera saw it."""
    scene = draw(random)
    degrade(scene, random)
    return scene


def degrade(scene: Scene, random: Random, strength: float = 1.0) -> None:
    """Turn the scene's picture into what a camera might have seen; `strength` 0 leaves it alone."""
    if strength <= 0 or chance(random, 0.12):
        return
    if chance(random, 0.55):
        tilt(scene, random, strength)
    image = scene.image
    if chance(random, 0.3):
        image = shadow(image, random)
    if chance(random, 0.5):
        image = ImageEnhance.Brightness(image).enhance(between(random, 0.75, 1.2))
        image = ImageEnhance.Contrast(image).enhance(between(random, 0.75, 1.2))
    if chance(random, 0.35):
        image = image.filter(
            ImageFilter.GaussianBlur(between(random, 0.2, 0.5 + 0.6 * strength) * max(image.size) / 300)
        )
    if chance(random, 0.5):
        image = noise(image, random, between(random, 1, 4 + 8 * strength))
    if chance(random, 0.4):
        image = jpeg(image, int(random.integers(35, 92)))
    scene.image = image


def tilt(scene: Scene, random: Random, strength: float) -> None:
    """Turn the picture a little and see it a little from the side; its marks move along."""
    image = scene.image
    width, height = image.size
    angle = np.deg2rad(random.normal(0, 2.2 * strength))
    cos, sin = np.cos(angle), np.sin(angle)
    g, h = random.normal(0, 0.03 * strength, 2).clip(-0.06, 0.06) / (width, height)
    cx, cy = width / 2, height / 2
    zoom = between(random, 1.0, 1.1)  # above 1 leaves room, so that nothing is turned out of the picture
    a, b, d, e = zoom * cos, zoom * sin, -zoom * sin, zoom * cos
    # Output (x, y) takes its pixel from ((a x + b y + c) / w, (d x + e y + f) / w) with w = g x + h y + 1.
    w = g * cx + h * cy + 1
    c, f = cx * w - a * cx - b * cy, cy * w - d * cx - e * cy
    fill = tuple(int(v) for v in np.asarray(image)[0, 0])
    scene.image = image.transform(
        image.size, Image.Transform.PERSPECTIVE, (a, b, c, d, e, f, g, h), Image.Resampling.BILINEAR, fillcolor=fill
    )
    back = np.linalg.inv(np.array([[a, b, c], [d, e, f], [g, h, 1.0]]))
    for index, mark in enumerate(scene.marks):
        x, y, w = back @ (mark.x, mark.y, 1.0)
        scene.marks[index] = replace(mark, x=x / w, y=y / w)


def shadow(image: Image.Image, random: Random) -> Image.Image:
    """Return the picture with one side darker, or a bright spot."""
    width, height = image.size
    ys, xs = np.mgrid[0:height:8, 0:width:8]
    if chance(random, 0.6):
        angle = between(random, 0, 2 * np.pi)
        field = (xs / width - 0.5) * np.cos(angle) + (ys / height - 0.5) * np.sin(angle) + between(random, -0.2, 0.2)
        mask = 1 - between(random, 0.15, 0.45) / (1 + np.exp(-field * between(random, 5, 40)))
    else:
        x, y = random.random(2)
        mask = 1 + between(random, 0.1, 0.3) * np.exp(-(((xs / width - x) ** 2 + (ys / height - y) ** 2) / 0.05))
    whole = Image.fromarray((mask * 128).clip(0, 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    lit = np.asarray(image, np.uint16) * np.asarray(whole, np.uint16)[..., None] >> 7
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))


def noise(image: Image.Image, random: Random, sigma: float) -> Image.Image:
    """Return the picture with sensor noise, one field repeated from a small tile to be quick."""
    width, height = image.size
    tile = random.normal(0, sigma, (64, 96, 1 if chance(random, 0.5) else 3)).astype(np.int16)
    field = np.tile(tile, (height // 64 + 1, width // 96 + 1, 1))[:height, :width]
    return Image.fromarray((np.asarray(image, np.int16) + field).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return the picture after JPEG."""
    stream = BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(BytesIO(stream.getvalue())).convert("RGB")
