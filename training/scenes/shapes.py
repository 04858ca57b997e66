"""Shapes, their colours, and where they are."""

from __future__ import annotations

from training.draw import COLOURS, canvas, named
from training.scene import Random, Scene, chance, pick
from training.scenes.things import SHAPES, Thing, draw, places

NAMES = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")


def scene(random: Random, pointed: float = 0.3, everywhere: bool = False) -> Scene:
    """Draw one to five shapes, all of different kinds, and ask about them; of some, or of each, at which point."""
    image, pen, ground = canvas(random)
    width, height = image.size
    count = int(random.integers(1, 6))
    scale = min(width, height)
    spots = places(random, count, width, height, scale * 0.07, scale * 0.2)
    kinds = [SHAPES[i] for i in random.permutation(len(SHAPES))[: len(spots)]]
    seen = [name for name in NAMES if sum(abs(a - b) for a, b in zip(COLOURS[name], ground, strict=True)) > 150]
    things = [Thing(kind, pick(random, seen), *spot) for kind, spot in zip(kinds, spots, strict=True)]
    for thing in things:
        draw(random, pen, thing, named(random, thing.colour), ground)
    result = Scene(image, pen.marks)
    one = pick(random, things)
    result.ask("shape", (f"What colour is the {one.kind}?", f"Which colour has the {one.kind}?"), one.colour, random)
    if sum(thing.colour == one.colour for thing in things) == 1:
        questions = (f"Which shape is {one.colour}?", f"What is the {one.colour} thing?")
        result.ask("shape", questions, one.kind, random)
    where = quadrant(one, width, height)
    if where:
        questions = (f"Where is the {one.kind}?", f"In which part of the picture is the {one.kind}?")
        result.ask("shape", questions, where, random)
    relate(random, result, things)
    kind, colour = pick(random, SHAPES), pick(random, NAMES)
    if chance(random, 0.5):
        kind, colour = one.kind, one.colour if chance(random, 0.6) else colour
    there = any(thing.kind == kind and thing.colour == colour for thing in things)
    yes_or_no = (
        f"Is there a {colour} {kind}?",
        f"Do you see a {colour} {kind}?",
        f"Does the picture show a {colour} {kind}?",
    )
    result.ask("presence", yes_or_no, "yes" if there else "no", random)
    for thing in things if everywhere else [one] if chance(random, pointed) else []:
        x, y = round(100 * thing.x / width), round(100 * thing.y / height)
        result.ask("point", pointed_at(thing.kind), f"x {x}, y {y}", random, tolerance=6.0)
    told = [
        f"{each.colour} {each.kind} x {round(100 * each.x / width)}, y {round(100 * each.y / height)}"
        for each in sorted(things, key=lambda each: each.x)
    ]
    result.describe(random, "; ".join(told), 6.0)
    return result


def pointed_at(name: str) -> tuple[str, ...]:
    """Return the questions for a point."""
    return f"Give the rough coordinates of the {name} in percent.", f"At which point is the {name}, in percent?"


def quadrant(thing: Thing, width: int, height: int) -> str:
    """Return the quarter of the picture a thing is in, empty when it is too near a middle line."""
    dx, dy = thing.x / width - 0.5, thing.y / height - 0.5
    if min(abs(dx), abs(dy)) < 0.06:
        return ""
    return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


def relate(random: Random, result: Scene, things: list[Thing]) -> None:
    """Ask how two things stand to each other, where that is clear."""
    if len(things) < 2:
        return
    a, b = (things[i] for i in random.permutation(len(things))[:2])
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) > 1.5 * abs(dy):
        questions = (
            f"Is the {a.kind} left or right of the {b.kind}?",
            f"Is the {a.kind} to the left or the right of the {b.kind}?",
        )
        result.ask("shape", questions, "left" if dx > 0 else "right", random)
    elif abs(dy) > 1.5 * abs(dx):
        questions = (
            f"Is the {a.kind} above or below the {b.kind}?",
            f"Does the {a.kind} stand above or below the {b.kind}?",
        )
        result.ask("shape", questions, "above" if dy > 0 else "below", random)
