"""Sheets crowded with signs and things: nothing is asked about them, they teach the vision tower what it will meet."""

from __future__ import annotations

from training.draw import COLOURS, Box, Pen, background, fit, ink, jitter, luminance, named, text
from training.scene import Random, Scene, between, chance, pick
from training.scenes.displays import LIT, dot_matrix, seven_segment, value
from training.scenes.things import PARTS, SHAPES, Thing, draw

SIGNS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OTHERS = "abcdefghijklmnopqrstuvwxyz.-%°"


def scene(random: Random) -> Scene:
    """Draw rows of cells, each with a few signs, a display or a thing."""
    side = int(random.integers(190, 300))
    image, ground = background(random, side, side)
    pen = Pen(image)
    top = 0.0
    while top < side - 8:
        high = min(between(random, 0.05, 0.2) * side, side - top)
        left = 0.0
        while left < side - 10:
            wide = min(between(random, 0.15, 0.6) * side, side - left)
            _cell(random, pen, (left + 1, top + 1, left + wide - 1, top + high - 1), ground)
            left += wide
        top += high
    return Scene(image, pen.marks)


def _cell(random: Random, pen: Pen, box: Box, ground: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = box
    if x1 - x0 < 8 or y1 - y0 < 8:
        return
    paper = ground
    if chance(random, 0.5):
        level = int(random.integers(10, 250))
        paper = jitter(random, (level, level, level), 40)
        pen.rectangle(box, fill=paper)
    kind = random.random()
    if kind < 0.6:
        _signs(random, pen, box, paper)
    elif kind < 0.8:
        dark = jitter(random, (16, 16, 18), 14) if luminance(paper) > 100 or chance(random, 0.5) else paper
        pen.rectangle(box, fill=dark)
        area = (x0 + 3, y0 + 2, x1 - 3, y1 - 2)
        kind_of_display = pick(random, (seven_segment, seven_segment, dot_matrix))
        kind_of_display(random, pen, area, value(random), jitter(random, pick(random, LIT)), dark)
    else:
        _things(random, pen, box, paper)


def _signs(random: Random, pen: Pen, box: Box, paper: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = box
    room = max(1, int((x1 - x0) / max(7, (y1 - y0) * 0.6)))
    alphabet = SIGNS if chance(random, 0.85) else OTHERS
    words = "".join(pick(random, alphabet) for _ in range(int(random.integers(1, room + 1))))
    face = fit(random, words, x1 - x0, (y1 - y0) * between(random, 0.8, 1.15))
    half = face.getlength(words) / 2
    x = between(random, x0 + half, max(x1 - half, x0 + half + 0.1))
    text(pen, (x, (y0 + y1) / 2), words, face, ink(random, paper))


def _things(random: Random, pen: Pen, box: Box, paper: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = box
    r = min((y1 - y0) / 2.1, (x1 - x0) / 2.1)
    x = x0 + r
    seen = [name for name, c in COLOURS.items() if sum(abs(a - b) for a, b in zip(c, paper, strict=True)) > 130]
    while x <= x1 - r + 0.1 and seen:
        colour = pick(random, seen)
        kind = pick(random, (*SHAPES, *PARTS))
        draw(
            random,
            pen,
            Thing(kind, colour, x, (y0 + y1) / 2, r * between(random, 0.7, 1)),
            named(random, colour),
            paper,
        )
        x += 2.2 * r
