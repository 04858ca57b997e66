"""Places in a picture, as boxes and points in its pixels.

Coordinates count from the top left corner of the picture as a viewer shows it, turned upright as its EXIF orientation
asks: x to the right from 0 to its width, y down from 0 to its height, both continuous. `Locations.stored` gives the
same places in the pixels that the file stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from edgevlm.answer import Answer
from edgevlm.errors import ImageError
from edgevlm.families.base import RGB
from edgevlm.inputs.image import ImageInput, load_image

Point: TypeAlias = tuple[float, float]
Box: TypeAlias = tuple[float, float, float, float]
_COLOURS = ((255, 64, 64), (64, 200, 255), (255, 200, 0), (64, 230, 100), (255, 110, 230))


@dataclass(frozen=True)
class Location:
    """One place, as a box or as a point, whichever the model writes."""

    box: Box | None
    """Left, top, right and bottom, in pixels; it has area and lies within the picture."""
    point: Point | None
    """x and y, in pixels, within the picture."""
    label: str
    score: float
    """Geometric mean of the probabilities of the n tokens that write the place's coordinates,

        exp((1/n) * sum_i log p(t_i | prompt, t_1 ... t_(i-1))),

    under the model's raw logits, before the constraint. It compares places of one model, and is no probability that
    the place is right; a token counts if any of its characters is a digit of a coordinate.
    """


@dataclass(frozen=True)
class Locations:
    """The places that a model names for a phrase, in its order."""

    phrase: str
    locations: tuple[Location, ...]
    size: tuple[int, int]
    """Width and height of the upright picture, in whose pixels the places are."""
    orientation: int
    """EXIF orientation, 1 to 8, by which the file's own pixels are turned."""
    dropped: int
    """Places that the model wrote and that are left out: boxes without area in the picture, and repetitions."""
    answer: Answer
    """What the model wrote, with its token counts and timings."""

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height of the picture as its file stores it."""
        width, height = self.size
        return (height, width) if self.orientation >= 5 else (width, height)

    def stored(self) -> tuple[Location, ...]:
        """Return the places in the pixels that the file stores, not turned by its EXIF orientation."""
        return tuple(self._stored(each) for each in self.locations)

    def draw(self, image: ImageInput) -> Image.Image:
        """Return a copy of the picture, upright, with the places drawn and numbered from 1.

        Raises `ImageError`, also for a picture of another size.
        """
        pixels = load_image(image)
        if pixels.shape[1::-1] != self.size:
            raise ImageError(
                f"the places are in a picture of {self.size[0]}x{self.size[1]} pixels, and this one has"
                f" {pixels.shape[1]}x{pixels.shape[0]}; draw on the picture that was searched"
            )
        return _draw(pixels, self.locations)

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm locate --json` prints: the places, and the answer with its figures."""
        return {**self.places(), **self.answer.to_dict()}

    def places(self) -> dict[str, Any]:
        """Return the places and the picture's size, coordinates rounded to hundredths of a pixel."""
        return {
            "phrase": self.phrase,
            "locations": [_as_json(*pair) for pair in zip(self.locations, self.stored(), strict=True)],
            "width": self.size[0],
            "height": self.size[1],
            "orientation": self.orientation,
            "dropped": self.dropped,
        }

    def _stored(self, location: Location) -> Location:
        if location.point:
            return replace(location, point=unturned(location.point, self.size, self.orientation))
        assert location.box
        corners = [unturned(corner, self.size, self.orientation) for corner in (location.box[:2], location.box[2:])]
        return replace(location, box=sorted_box(*corners[0], *corners[1]))


def unturned(point: Point, size: tuple[int, int], orientation: int) -> Point:
    """Return a point of the upright picture, `size` wide and high, in the pixels that its file stores.

    An EXIF orientation is mirrored sides, and from 5 on a transposed picture before them.
    """
    (x, y), (width, height) = point, size
    x = width - x if orientation in (2, 3, 6, 7) else x
    y = height - y if orientation in (3, 4, 7, 8) else y
    return (y, x) if orientation >= 5 else (x, y)


def sorted_box(x1: float, y1: float, x2: float, y2: float) -> Box:
    """Return the box with these opposite corners."""
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _as_json(location: Location, stored: Location) -> dict[str, Any]:
    def rounded(coordinates: tuple[float, ...] | None) -> list[float] | None:
        return None if coordinates is None else [round(each, 2) for each in coordinates]

    return {
        "box": rounded(location.box),
        "point": rounded(location.point),
        "label": location.label,
        "score": round(location.score, 6),
        "stored_box": rounded(stored.box),
        "stored_point": rounded(stored.point),
    }


def _draw(pixels: RGB, locations: Sequence[Location]) -> Image.Image:
    """Return `pixels` `(H, W, 3)` as a picture with the places drawn and numbered from 1."""
    image = Image.fromarray(pixels)
    pen, line = ImageDraw.Draw(image), max(2, round(min(image.size) / 150))
    font = ImageFont.load_default(max(11, 5 * line))
    for number, location in enumerate(locations, 1):
        colour = _COLOURS[(number - 1) % len(_COLOURS)]
        if location.box:
            left, top, right, bottom = location.box
            for width, ink in ((line + 2, (0, 0, 0)), (line, colour)):
                pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=ink, width=width)
            corner = (left + 2 * line, top + 2 * line)
        else:
            assert location.point
            x, y = location.point
            for radius, ink in ((3 * line + 1, (0, 0, 0)), (3 * line, colour)):
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=ink, width=line)
            corner = (x + 4 * line, y + line)
        pen.text(corner, str(number), fill=colour, font=font, stroke_width=max(1, line // 2), stroke_fill=(0, 0, 0))
    return image
