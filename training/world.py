"""Drawn devices in front of photographs and textures, as a hand-held camera or a bad one sees them.

A scene is drawn twice, on two grounds of one colour each: where both pictures agree it is opaque, where they differ as
the grounds do it is clear (Smith and Blinn 1996, "Blue screen matting"). So every renderer can stand before anything
without knowing of it. What does not matter is varied far beyond what is met (domain randomization: Tobin et al. 2017).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from training import grounds
from training.draw import Colour, keyed
from training.scene import Mark, Random, Scene, between, chance, pick
from training.scenes import displays, gauges, labels, lights

Draw: TypeAlias = Callable[[Random], Scene]
NOT_VISIBLE = "not visible"
"""The answer to a question about what the picture does not show."""
_KEYS: tuple[Colour, Colour] = ((0, 0, 0), (255, 255, 255))
SMALLEST = {"light": 0.25, "display": 0.45, "gauge": 0.5, "label": 0.6, "count": 0.55}
"""How wide a thing is at least, as a share of the picture; others 0.7."""
ON_CARDS = {"chart": 1.0, "label": 0.4, "missing": 0.5, "count": 0.5, "shape": 0.4, "page": 0.8}
"""How often a scene keeps its own ground, as a card that lies there."""
ASKED = {
    "display": displays.QUESTIONS,
    "gauge": gauges.QUESTIONS,
    "light": lights.QUESTIONS,
    "label": labels.QUESTIONS,
    "chart": ("Which bar is the highest?", "Which category has the highest value?"),
}
"""What is asked of each kind, and refused where it is not to be seen."""
_PLACED = re.compile(r"Where is the .*(top|bottom|left|right|centre)|In which part|percent|\bx \d+, y \d+")
"""What asks for a place or tells one, which is another once the scene has been laid somewhere."""
_MIXED_UP = {("display", "label"), ("label", "display"), ("chart", "label"), ("count", "label")}
"""What may be taken for each other: a label's question of a display is not refused."""


def before_anything(draw: Draw, kind: str, random: Random) -> Scene:
    """Return what `draw` draws, small or large, in front of some ground."""
    width, height = _size(random)
    ground = grounds.ground(random, width, height)
    small = np.asarray(ground.resize((1, 1), Image.Resampling.BOX))[0, 0]
    mean: Colour = tuple(int(v) for v in small)  # type: ignore[assignment]
    scene, opacity = _cut_out(draw, mean, random, chance(random, ON_CARDS.get(kind, 0.0)))
    matrix = _placed(scene.image.size, (width, height), SMALLEST.get(kind, 0.7), random)
    device = _warped(scene.image, matrix, (width, height))
    mask = _warped(opacity, matrix, (width, height))
    if chance(random, 0.5):
        _shade_below(ground, mask, random)
    behind = ImageChops.multiply(ground, Image.merge("RGB", [ImageChops.invert(mask)] * 3))
    ground = ImageChops.add(behind, device)  # whose colours are multiplied by its opacity already
    if chance(random, 0.12):
        _reflect(ground, random)
    marks = [_moved(mark, matrix) for mark in scene.marks]
    return Scene(
        _dimmed(ground, random),
        marks,
        [pair for pair in scene.pairs if not _PLACED.search(f"{pair.question} {pair.answer}")],
    )


def nothing(random: Random) -> Scene:
    """Return a picture that shows none of the things that are asked about."""
    scene = Scene(_dimmed(grounds.ground(random, *_size(random)), random))
    for kind in random.permutation(list(ASKED))[:3]:
        scene.ask("refusal", ASKED[str(kind)], NOT_VISIBLE, random)
    return scene


def refuse(scene: Scene, kind: str, random: Random) -> None:
    """Ask a scene of one kind what would be asked of another."""
    others = [other for other in ASKED if other != kind and (kind, other) not in _MIXED_UP]
    if kind in (*ASKED, "count", "missing", "shape"):
        scene.ask("refusal", ASKED[pick(random, others)], NOT_VISIBLE, random)


def _size(random: Random) -> tuple[int, int]:
    longer, aspect = int(random.integers(280, 560)), between(random, 0.56, 1.0)
    shorter = round(longer * aspect)
    return (longer, shorter) if chance(random, 0.62) else (shorter, longer)


def _cut_out(draw: Draw, mean: Colour, random: Random, card: bool) -> tuple[Scene, Image.Image]:
    """Return a scene and how opaque it is, pixel by pixel."""
    if card:
        scene = draw(random)
        opacity = Image.new("L", scene.image.size)
        radius = between(random, 0, 0.06) * min(scene.image.size)
        ImageDraw.Draw(opacity).rounded_rectangle((0, 0, *(v - 1 for v in scene.image.size)), radius, fill=255)
        return scene, opacity
    state, scale = random.bit_generator.state, between(random, 0.9, 1.9)
    drawn = []
    for key in _KEYS:
        random.bit_generator.state = state
        with keyed(key, mean, scale):
            drawn.append(draw(random))
    on_black, on_white = (each.image for each in drawn)
    clear = ImageChops.difference(on_white, on_black).convert("L")
    return drawn[0], ImageChops.invert(clear)


def _placed(device: tuple[int, int], picture: tuple[int, int], smallest: float, random: Random) -> Any:
    """Return the 3x3 matrix that takes the device's pixels to the picture's."""
    (w, h), (width, height) = device, picture
    share = between(random, smallest, 1.0) if chance(random, 0.75) else between(random, 0.8, 1.08)
    size = share * min(width / w, height / h)
    wide, high = w * size, h * size
    x = between(random, 0, 1) * (width - wide)
    y = between(random, 0, 1) * (height - high)
    turn = np.deg2rad(np.clip(random.normal(0, 5), -16, 16)) if chance(random, 0.7) else 0.0
    corners = np.array([[-wide, -high], [wide, -high], [wide, high], [-wide, high]]) / 2
    if chance(random, 0.6):
        corners += random.normal(0, 0.035, (4, 2)) * (wide, high)
    cos, sin = np.cos(turn), np.sin(turn)
    corners = corners @ np.array([[cos, sin], [-sin, cos]]) + (x + wide / 2, y + high / 2)
    return _homography(np.array([[0, 0], [w, 0], [w, h], [0, h]], float), corners)


def _homography(start: Any, end: Any) -> Any:
    rows, wanted = [], []
    for (x, y), (u, v) in zip(start, end, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        wanted += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(wanted)), 1.0).reshape(3, 3)


def _warped(image: Image.Image, matrix: Any, size: tuple[int, int]) -> Image.Image:
    """Return the image as the picture has it; what is made smaller is averaged first."""
    scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    if scale < 0.9:
        small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        matrix = matrix @ np.diag([image.width / small[0], image.height / small[1], 1.0])
        image = image.resize(small, Image.Resampling.BOX)
    back = np.linalg.inv(matrix)
    back = (back / back[2, 2]).reshape(-1)[:8]
    return image.transform(size, Image.Transform.PERSPECTIVE, tuple(back), Image.Resampling.BICUBIC)


def _moved(mark: Mark, matrix: Any) -> Mark:
    x, y, w = matrix @ (mark.x, mark.y, 1.0)
    return replace(mark, x=float(x / w), y=float(y / w))


def _shade_below(ground: Image.Image, mask: Image.Image, random: Random) -> None:
    """Darken what lies behind the device's shadow."""
    reach = max(ground.size) * between(random, 0.005, 0.04)
    by = (round(random.normal(0, reach)), round(abs(random.normal(0, reach))))
    cast = ImageChops.offset(mask, *by).filter(ImageFilter.GaussianBlur(reach))
    most = between(random, 0.2, 0.7)
    ground.paste((0, 0, 0), (0, 0), cast.point(lambda v: round(v * most)))


def _reflect(image: Image.Image, random: Random) -> None:
    """Lay a streak of light or a patch of dirt over the picture."""
    width, height = image.size
    veil = Image.new("L", image.size)
    pen = ImageDraw.Draw(veil)
    most = round(255 * between(random, 0.08, 0.3))
    if chance(random, 0.6):
        x, wide, lean = (
            between(random, 0, width),
            between(random, 0.04, 0.25) * width,
            between(random, -0.5, 0.5) * width,
        )
        pen.polygon([(x, 0), (x + wide, 0), (x + wide + lean, height), (x + lean, height)], fill=most)
        image.paste((255, 255, 255), (0, 0), veil.filter(ImageFilter.GaussianBlur(between(random, 0.5, 8))))
        return
    for _ in range(int(random.integers(3, 25))):
        x, y, r = between(random, 0, width), between(random, 0, height), between(random, 0.003, 0.02) * width
        pen.ellipse((x - r, y - r, x + r, y + r), fill=most)
    colour = pick(random, ((40, 30, 20), (90, 80, 60), (230, 230, 225)))
    image.paste(colour, (0, 0), veil.filter(ImageFilter.GaussianBlur(between(random, 0.5, 3))))


def _dimmed(image: Image.Image, random: Random) -> Image.Image:
    """Return the picture in the light of the place: by night, by lamplight, moved while it was taken."""
    if chance(random, 0.1):
        image = ImageEnhance.Brightness(image).enhance(between(random, 0.4, 0.8))
    if chance(random, 0.3):
        tint = np.clip(random.normal(1, 0.06, 3), 0.85, 1.15)
        image = Image.merge(
            "RGB", [band.point(lambda v, by=by: round(v * by)) for band, by in zip(image.split(), tint, strict=True)]
        )
    if chance(random, 0.1):
        image = _moved_camera(image, random)
    return image


def _moved_camera(image: Image.Image, random: Random) -> Image.Image:
    steps, angle = int(random.integers(2, 5)), between(random, 0, np.pi)
    mean = np.zeros((image.height, image.width, 3), np.float32)
    for step in range(steps):
        by = (round(step * np.cos(angle)), round(step * np.sin(angle)))
        mean += np.asarray(ImageChops.offset(image, *by), np.float32)
    return Image.fromarray((mean / steps).astype(np.uint8))
