"""Printed labels and lot codes: letters, digits, dashes."""

from __future__ import annotations

from training.draw import Box, Colour, Pen, canvas, clutter, fit, ink, jitter, panel, text
from training.scene import Random, Scene, between, chance, pick

LETTERS, DIGITS = "ABCDEFGHJKLMNPQRSTUVWXYZ", "0123456789"
QUESTIONS = ("What does the label say?", "Read the label.", "What is printed on the label?", "Read the code.")
PREFIXES = ("LOT", "SN", "REF", "BATCH", "ID", "PN", "EXP")


def code(random: Random) -> str:
    """Return a code of two to ten signs in one to three groups."""
    groups = []
    for _ in range(int(random.integers(1, 4))):
        alphabet = pick(random, (DIGITS, DIGITS, LETTERS, LETTERS + DIGITS))
        groups.append("".join(pick(random, alphabet) for _ in range(int(random.integers(2, 5)))))
    return "-".join(groups)


def scene(random: Random) -> Scene:
    """Draw one label with a code, sometimes with a prefix, sometimes with bars beside it."""
    image, pen, ground = canvas(random)
    width, height = image.size
    wide, high = between(random, 0.6, 0.96) * width, between(random, 0.3, 0.8) * height
    x0, y0 = between(random, 0, 1) * (width - wide), between(random, 0, 1) * (height - high)
    box = (x0, y0, x0 + wide, y0 + high)
    clutter(random, pen, [(0, 0, width, y0), (0, y0 + high, width, height)], ground)
    tints = ((250, 250, 248), (245, 240, 220), (250, 225, 60), (60, 110, 190), (30, 30, 32), (190, 195, 200))
    paper = jitter(random, pick(random, tints), 8)
    panel(random, pen, box, paper)
    printed = code(random)
    prefix = pick(random, PREFIXES) if chance(random, 0.35) else ""
    inset = (x0 + wide * 0.06, y0 + high * 0.1, x0 + wide * 0.94, y0 + high * 0.9)
    line = f"{prefix} {printed}".strip()
    result = Scene(image, pen.marks)
    bars = chance(random, 0.25)
    middle = (inset[1] + inset[3]) / 2
    if bars:
        barcode(random, pen, (inset[0], middle, inset[2], inset[3]), ink(random, paper))
        inset, middle = (inset[0], inset[1], inset[2], middle), (inset[1] + middle) / 2
    if prefix and chance(random, 0.4):
        face = fit(random, prefix, (inset[2] - inset[0]) * 0.5, (inset[3] - inset[1]) * 0.42)
        text(
            pen, ((inset[0] + inset[2]) / 2, inset[1] + (inset[3] - inset[1]) * 0.24), prefix, face, ink(random, paper)
        )
        face = fit(random, printed, inset[2] - inset[0], (inset[3] - inset[1]) * 0.5)
        text(
            pen, ((inset[0] + inset[2]) / 2, inset[1] + (inset[3] - inset[1]) * 0.72), printed, face, ink(random, paper)
        )
    else:
        face = fit(random, line, inset[2] - inset[0], (inset[3] - inset[1]) * between(random, 0.5, 0.95))
        text(pen, ((inset[0] + inset[2]) / 2, middle), line, face, ink(random, paper))
    result.ask("label", QUESTIONS, line, random)
    if prefix:
        questions = (f"What is the {prefix} code?", f"Which code follows {prefix}?")
        result.ask("label", questions, printed, random)
    if chance(random, 0.3):
        result.describe(random, f"a label saying {line}")
    return result


def barcode(random: Random, pen: Pen, box: Box, colour: Colour) -> None:
    """Draw stripes that stand for a bar code."""
    x = box[0]
    while x < box[2]:
        wide = between(random, 1, 4)
        pen.rectangle((x, box[1] + 2, min(x + wide, box[2]), box[3]), fill=colour)
        x += wide + between(random, 1.5, 5)
