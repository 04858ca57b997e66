"""A regular grid of parts or holes with one missing, or none."""

from __future__ import annotations

from training.draw import canvas, named, panel, shade
from training.scene import Random, Scene, between, chance, pick
from training.scenes.things import Thing, draw

KINDS = ("nut", "washer", "circle", "ring", "square", "screw")


def scene(random: Random) -> Scene:
    """Draw the grid and ask what is missing."""
    image, pen, ground = canvas(random)
    width, height = image.size
    rows, columns = int(random.integers(2, 6)), int(random.integers(2, 7))
    margin = between(random, 0.04, 0.12)
    box = (width * margin, height * margin, width * (1 - margin), height * (1 - margin))
    plate = ground
    if chance(random, 0.65):
        plate = shade(ground, between(random, 0.7, 1.3))
        panel(random, pen, box, plate)
    cell_w, cell_h = (box[2] - box[0]) * 0.94 / columns, (box[3] - box[1]) * 0.94 / rows
    r = min(cell_w, cell_h) * between(random, 0.28, 0.4)
    holes = chance(random, 0.3)
    kind = "hole" if holes else pick(random, KINDS)
    colour = shade(plate, 0.3) if holes else named(random, pick(random, _contrasting(plate)))
    missing = (int(random.integers(rows)), int(random.integers(columns))) if chance(random, 0.6) else None
    trace = chance(random, 0.4)
    for row in range(rows):
        for column in range(columns):
            x = box[0] + (box[2] - box[0]) * 0.03 + cell_w * (column + 0.5) + random.normal(0, r * 0.04)
            y = box[1] + (box[3] - box[1]) * 0.03 + cell_h * (row + 0.5) + random.normal(0, r * 0.04)
            if (row, column) == missing:
                pen.mark(x, y, "gap")
                if trace and not holes:
                    pen.ellipse((x - r, y - r, x + r, y + r), outline=shade(plate, 0.8))
                continue
            draw(random, pen, Thing("circle" if holes else kind, "part", x, y, r), colour, plate)
    result = Scene(image, pen.marks)
    noun = "hole" if holes else "part"
    questions: tuple[str, ...]
    questions = (f"Is a {noun} missing?", f"Is there a gap in the grid of {noun}s?", f"Does the grid lack a {noun}?")
    result.ask("missing", questions, "yes" if missing else "no", random)
    questions = (f"Which {noun} is missing?", f"Where is a {noun} missing?", "Give row and column of the gap.")
    result.ask("missing", questions, f"row {missing[0] + 1}, column {missing[1] + 1}" if missing else "none", random)
    questions = ("How many rows and columns has the grid?", "What is the size of the grid?")
    result.ask("missing", questions, f"{rows} rows, {columns} columns", random)
    gap = f"row {missing[0] + 1}, column {missing[1] + 1} missing" if missing else f"no {noun} missing"
    result.describe(random, f"a grid of {rows} rows and {columns} columns, {gap}")
    return result


def _contrasting(plate: tuple[int, int, int]) -> tuple[str, ...]:
    level = sum(plate) / 3
    return ("black", "blue", "red") if level > 140 else ("white", "yellow", "orange")
