"""Small things of a named kind, colour and size, placed so that they do not touch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from training.draw import Colour, Pen, shade
from training.scene import Random, between, chance, pick

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "hexagon", "ring")
PARTS = ("nut", "washer", "screw", "gear")
PLURAL = {"cross": "crosses"}


@dataclass(frozen=True)
class Thing:
    """One thing in a picture; `x`, `y` and `r` in pixels."""

    kind: str
    colour: str
    x: float
    y: float
    r: float


def plural(kind: str) -> str:
    """Return the plural of a kind."""
    return PLURAL.get(kind, f"{kind}s")


def places(
    random: Random, count: int, width: int, height: int, low: float, high: float
) -> list[tuple[float, float, float]]:
    """Return up to `count` places `(x, y, r)` that keep apart, r between `low` and `high`."""
    found: list[tuple[float, float, float]] = []
    for _ in range(count * 40):
        if len(found) == count:
            break
        r = between(random, low, high)
        x, y = between(random, r + 3, width - r - 3), between(random, r + 3, height - r - 3)
        if all(math.hypot(x - u, y - v) > (r + q) * 1.12 for u, v, q in found):
            found.append((x, y, r))
    return found


def polygon(x: float, y: float, r: float, corners: int, turn: float, inner: float = 1.0) -> list[tuple[float, float]]:
    """Return a regular polygon, or a star when `inner` is below 1."""
    count = corners if inner == 1.0 else corners * 2
    radii = [r if inner == 1.0 or i % 2 == 0 else r * inner for i in range(count)]
    return [
        (
            x + radii[i] * math.cos(turn + 2 * math.pi * i / count),
            y + radii[i] * math.sin(turn + 2 * math.pi * i / count),
        )
        for i in range(count)
    ]


@dataclass(frozen=True)
class Finish:
    """What lies under a thing: its shadow, moved by a share of its size, or its edge, grown beyond it."""

    moved: tuple[float, float]
    grown: float
    colour: Colour


def some_finish(random: Random, ground: Colour) -> Finish | None:
    """Return a shadow, an edge or nothing."""
    chosen = random.random()
    if chosen < 0.35:
        return Finish((between(random, -0.2, 0.2), between(random, 0.05, 0.2)), 1.0, shade(ground, 0.6))
    if chosen < 0.8:
        edge = (20, 20, 20) if chance(random, 0.7) else (240, 240, 240)
        return Finish((0, 0), between(random, 1.08, 1.2), edge)
    return None


def draw(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour, finish: Finish | None = None) -> None:
    """Draw one thing."""
    pen.mark(thing.x, thing.y, thing.kind, *([thing.colour] if thing.colour else []))
    if finish:
        state = random.bit_generator.state
        x, y = (at + thing.r * by for at, by in zip((thing.x, thing.y), finish.moved, strict=True))
        _DRAW[thing.kind](random, pen, replace(thing, x=x, y=y, r=thing.r * finish.grown), finish.colour, ground)
        random.bit_generator.state = state  # so that it is turned and toothed as what lies under it
    _DRAW[thing.kind](random, pen, thing, colour, ground)


def _round(x: float, y: float, r: float) -> tuple[float, float, float, float]:
    return x - r, y - r, x + r, y + r


def _circle(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    pen.ellipse(_round(thing.x, thing.y, thing.r), fill=colour)


def _ring(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    thick = between(random, 0.2, 0.32) if thing.kind == "ring" else between(random, 0.46, 0.6)
    pen.ellipse(_round(thing.x, thing.y, thing.r), outline=colour, width=max(2, round(thing.r * thick)))


def _square(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    pen.rectangle(_round(thing.x, thing.y, thing.r * 0.86), fill=colour)


def _triangle(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    pen.polygon(polygon(thing.x, thing.y + thing.r * 0.15, thing.r, 3, _UP), fill=colour)


def _star(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    pen.polygon(polygon(thing.x, thing.y, thing.r, 5, _UP, between(random, 0.36, 0.5)), fill=colour)


def _diamond(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    x, y, r, wide = thing.x, thing.y, thing.r, thing.r * between(random, 0.56, 0.76)
    pen.polygon([(x, y - r), (x + wide, y), (x, y + r), (x - wide, y)], fill=colour)


def _hexagon(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    pen.polygon(polygon(thing.x, thing.y, thing.r, 6, pick(random, (0.0, math.pi / 6))), fill=colour)


def _cross(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    x, y, long, short = thing.x, thing.y, thing.r * 0.95, thing.r * between(random, 0.24, 0.38)
    pen.rectangle((x - short, y - long, x + short, y + long), fill=colour)
    pen.rectangle((x - long, y - short, x + long, y + short), fill=colour)


def _nut(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    edge, hole = shade(colour, pick(random, (0.65, 1.0))), thing.r * between(random, 0.42, 0.54)
    pen.polygon(polygon(thing.x, thing.y, thing.r, 6, between(random, 0, 1)), fill=colour, outline=edge)
    pen.ellipse(_round(thing.x, thing.y, hole), fill=ground, outline=edge)


def _gear(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    teeth, depth = int(random.integers(8, 12)), between(random, 0.7, 0.8)
    pen.polygon(polygon(thing.x, thing.y, thing.r, teeth, between(random, 0, 1), depth), fill=colour)
    pen.ellipse(_round(thing.x, thing.y, thing.r * between(random, 0.25, 0.38)), fill=ground)


def _screw(random: Random, pen: Pen, thing: Thing, colour: Colour, ground: Colour) -> None:
    x, y, r = thing.x, thing.y, thing.r
    turn = between(random, 0, 2 * math.pi)
    dx, dy = math.cos(turn) * r, math.sin(turn) * r
    pen.line(
        (x - dx * 0.3, y - dy * 0.3, x + dx, y + dy), fill=colour, width=max(2, round(r * between(random, 0.22, 0.34)))
    )
    hx, hy, edge = x - dx * 0.5, y - dy * 0.5, shade(colour, 0.65)
    if chance(random, 0.3):
        pen.ellipse(_round(hx, hy, r * 0.45), fill=colour)
        return
    pen.ellipse(_round(hx, hy, r * 0.45), fill=colour, outline=edge)
    ends = (hx - dy * 0.3, hy + dx * 0.3, hx + dy * 0.3, hy - dx * 0.3)
    pen.line(ends, fill=edge, width=max(1, round(r * 0.12)))


_UP = -math.pi / 2
_DRAW = {
    "circle": _circle,
    "ring": _ring,
    "washer": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "diamond": _diamond,
    "hexagon": _hexagon,
    "cross": _cross,
    "nut": _nut,
    "gear": _gear,
    "screw": _screw,
}
