"""Counting parts of one kind, 0 to 12, among others."""

from __future__ import annotations

from dataclasses import replace

from training.draw import COLOURS, Colour, Pen, canvas, jitter, named, panel, shade
from training.scene import QA, Random, Scene, between, chance, pick
from training.scenes.things import PARTS, SHAPES, Thing, draw, places, plural, some_finish

MOST = 12
"""As many things as are counted at most."""
METALS = ("gray", "yellow", "black", "orange")


def scene(random: Random, varied: float = 0.0) -> Scene:
    """Draw scattered things and ask how many there are of one kind; the share `varied` of scenes is less plain."""
    image, pen, ground = canvas(random)
    width, height = image.size
    loose = varied > 0 and chance(random, varied)
    if loose:
        ground = lie(random, pen, ground)
    finish = some_finish(random, ground) if loose else None
    kinds = PARTS if chance(random, 0.6) else SHAPES
    target = pick(random, kinds)
    others = [kind for kind in kinds if kind != target]
    wanted = int(random.integers(0, MOST + 1))
    distractors = int(random.integers(0, 7)) if wanted else int(random.integers(1, 8))
    scale = min(width, height)
    total = wanted + distractors
    top = min(0.11, 0.42 / max(total, 1) ** 0.5)
    top *= between(random, 0.75, 1.3) if loose else 1.0
    spots = places(random, total, width, height, scale * min(0.055, top * 0.75), scale * top)
    wanted = min(wanted, len(spots))
    colours: tuple[str, ...] = METALS if kinds is PARTS else ("red", "green", "blue", "yellow", "orange", "purple")
    if loose:
        colours = tuple(COLOURS)
    contrast = [name for name in colours if _differs(named(random, name), ground)] or ["red"]
    things = [
        Thing(target if index < wanted else pick(random, others), pick(random, contrast), *spot)
        for index, spot in enumerate(spots)
    ]
    for thing in things:
        draw(random, pen, thing, named(random, thing.colour), ground, finish)
    counts = {kind: sum(thing.kind == kind for thing in things) for kind in kinds}
    shares = {kind: number / MOST for kind, number in counts.items()}
    result = Scene(image, [replace(mark, share=shares.get(mark.name)) for mark in pen.marks])
    many = plural(target)
    questions = (f"How many {many} are there?", f"Count the {many}.", f"What is the number of {many}?")
    result.ask("count", questions, str(wanted), random)
    kind = pick(random, kinds)
    there = "yes" if counts[kind] else "no"
    result.ask("presence", (f"Is there a {kind}?", f"Do you see any {plural(kind)}?"), there, random)
    other = pick(random, others)
    rest = [kind for kind in others if kind != other and counts[kind]] if varied else []
    for kind in (other, *rest):
        many = plural(kind)
        result.ask("count", (f"How many {many} are there?", f"Count the {many}."), str(counts[kind]), random)
    if loose and 0 < len(things) <= MOST and chance(random, 0.3):
        marks = tuple(index for index, mark in enumerate(pen.marks) if mark.name in kinds)
        words = (
            ("things", "objects", "items", "pieces") if kinds is SHAPES else ("parts", "things", "objects", "pieces")
        )
        result.pairs.append(QA("count", f"How many {pick(random, words)} are there?", str(len(things)), about=marks))
    said = [f"{number} {kind if number == 1 else plural(kind)}" for kind, number in counts.items() if number]
    result.describe(random, ", ".join(said) or "nothing")
    return result


def lie(random: Random, pen: Pen, ground: Colour) -> Colour:
    """Draw what things lie on, a tray or ruled paper, and return its colour."""
    width, height = pen.im.size
    if chance(random, 0.5):
        tray = jitter(random, shade(ground, pick(random, (0.6, 0.8, 1.3, 1.6))), 15)
        margin = between(random, 0, 4)
        panel(random, pen, (margin, margin, width - margin, height - margin), tray)
        return tray
    step, colour = between(random, 12, 50), shade(ground, pick(random, (0.8, 1.25)))
    for x in range(round(step), width, round(step)):
        pen.line((x, 0, x, height), fill=colour, width=1)
    for y in range(round(step), height, round(step)):
        pen.line((0, y, width, y), fill=colour, width=1)
    return ground


def _differs(colour: tuple[int, int, int], ground: tuple[int, int, int]) -> bool:
    return sum(abs(a - b) for a, b in zip(colour, ground, strict=True)) > 130
