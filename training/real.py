"""Real photographs, for evaluation only: parts of one of coins to count, and others that show no device.

Training never sees them. They come with two packages, and are few: what they tell is rough, and the crops of the coins
are of one photograph.

- scikit-image: coins.png (Brooklyn Museum, no known copyright restrictions), clock_motion.png (public domain),
  retina.jpg (CC0), ihc.png (no known copyright restrictions)
- matplotlib: grace_hopper.jpg (public domain)

Its other photographs are what training draws devices against (`grounds.py`), motorcycle_right.png the same scene from a
hand's breadth aside. `python -m training.real sheet.png` draws a sheet to look at.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
from PIL import Image, ImageDraw

from training.scene import QA, Scene

FOLDERS = {"skimage": "data", "matplotlib": "mpl-data/sample_data"}
"""Where packages keep their photographs."""
REFUSED = "not visible"
DISPLAY = QA("refusal", "What does the display read?", REFUSED)
GAUGE = QA("refusal", "What does the gauge read?", REFUSED)
LIGHT = QA("refusal", "Which light is on?", REFUSED)
NO_GEAR = QA("presence", "Is there a gear?", "no")
NO_SCREWS = QA("count", "How many screws are there?", "0")


@dataclass(frozen=True)
class Photograph:
    """A photograph of a package, or a part of it, and what is asked about it."""

    package: str
    file: str
    pairs: tuple[QA, ...]
    crop: tuple[int, int, int, int] | None = None
    """`x0, y0, x1, y1` in pixels."""

    @property
    def path(self) -> Path | None:
        """Its file; None where the package, or the file in it, is missing."""
        spec = find_spec(self.package)
        path = Path(str(spec.origin)).parent / FOLDERS[self.package] / self.file if spec else None
        return path if path and path.is_file() else None

    def scene(self) -> Scene:
        """Return the picture with its questions."""
        assert self.path
        with Image.open(self.path) as image:
            return Scene(image.crop(self.crop).convert("RGB") if self.crop else image.convert("RGB"), [], [*self.pairs])


COINS: dict[tuple[int, int, int, int], int] = {
    (301, 5, 382, 84): 1,
    (182, 150, 242, 225): 1,
    (10, 84, 128, 150): 2,
    (139, 225, 272, 300): 2,
    (10, 150, 182, 225): 3,
    (182, 5, 382, 84): 3,
    (128, 84, 242, 225): 4,
    (8, 225, 272, 300): 4,
    (77, 84, 382, 150): 5,
    (10, 5, 182, 150): 6,
    (8, 225, 384, 300): 6,
    (242, 5, 382, 225): 6,
    (128, 84, 382, 225): 8,
    (10, 5, 182, 225): 9,
    (77, 5, 382, 150): 10,
    (128, 5, 382, 225): 12,
    (10, 84, 382, 225): 12,
}
"""Boxes of the photograph of 24 coins, none of which cuts one, and how many are in each."""


def _coins(number: int) -> tuple[QA, ...]:
    """Return the questions, in the words for circles that training has: it has none for coins."""
    asked = ("How many circles are there?", "How many round shapes are there?")
    return tuple(QA("count", question, str(number)) for question in asked)


ALL = {
    **{
        f"coins {number}": Photograph("skimage", "coins.png", _coins(count), crop)
        for number, (crop, count) in enumerate(COINS.items())
    },
    "all coins": Photograph("skimage", "coins.png", (DISPLAY, GAUGE, LIGHT, NO_GEAR, NO_SCREWS)),
    "clock": Photograph("skimage", "clock_motion.png", (DISPLAY, LIGHT, NO_SCREWS)),
    "retina": Photograph("skimage", "retina.jpg", (DISPLAY, GAUGE, LIGHT, NO_GEAR, NO_SCREWS)),
    "tissue": Photograph("skimage", "ihc.png", (DISPLAY, GAUGE, LIGHT, NO_GEAR, NO_SCREWS)),
    "portrait": Photograph(
        "matplotlib",
        "grace_hopper.jpg",
        (DISPLAY, GAUGE, LIGHT, NO_GEAR, NO_SCREWS, QA("presence", "Is there a star?", "yes")),
    ),
}
"""All photographs, by name; the clock, moved while it was taken, is not asked about as a gauge, since it is a dial."""


def names() -> tuple[str, ...]:
    """Return the names of the photographs that this machine has."""
    return tuple(name for name, photograph in ALL.items() if photograph.path)


def scene(name: str, _: int = 0) -> Scene:
    """Return a photograph with its questions: there is one of each name."""
    return ALL[name].scene()


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--cell", default=300, help="Pixels across a picture.")
def main(output: Path, cell: int) -> None:
    """Draw a sheet of all photographs, with what is asked and answered below them."""
    found = names()
    sheet = Image.new("RGB", (6 * cell, -(-len(found) // 6) * (cell + 90)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(found):
        shown = scene(name)
        shown.image.thumbnail((cell - 8, cell - 8))
        at = number % 6 * cell, number // 6 * (cell + 90)
        sheet.paste(shown.image, at)
        lines = [f"{pair.question} {pair.answer}" for pair in shown.pairs]
        pen.text((at[0], at[1] + cell), "\n".join(lines), "black")
    sheet.save(output)


if __name__ == "__main__":
    main()
