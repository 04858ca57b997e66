"""Signal towers of any make: lamps round, square, domed or flat, upright or lying, bare or in a case."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFilter

from training.draw import Box, Colour, Pen, canvas, jitter, named, shade
from training.scene import Random, Scene, between, chance, pick
from training.scenes.lights import LAMP_QUESTIONS, QUESTIONS, STACK, listed


def scene(random: Random) -> Scene:
    """Draw one to five lamps of different colours with none, one or more of them lit."""
    image, pen, ground = canvas(random)
    width, height = image.size
    count = int(random.choice([1, 2, 3, 3, 3, 4, 4, 5]))
    names = [STACK[i] for i in random.permutation(5)[:count]]
    lit = set(random.permutation(count)[: int(random.choice([0, 1, 1, 1, 1, 1, 2, 3]))].tolist())
    lying = chance(random, 0.25)
    long, across = (width, height) if lying else (height, width)
    step = between(random, 0.45, 0.9) * long / max(count, 2)
    thick = min(step * between(random, 0.6, 2.2), across * 0.6)
    first = between(random, 0.04, 0.96) * (long - step * count)
    middle = between(random, thick * 0.65, across - thick * 0.65)
    _holder(random, pen, lying, first, step * count, middle, thick, ground)
    form, filled, style = pick(random, _FORMS), between(random, 0.6, 1.0), _Style(random)
    for index, name in enumerate(names):
        centre = first + step * (index + 0.5)
        half_long, half_across = step * filled / 2, thick / 2
        if form == "round":
            half_long = half_across = min(half_long, half_across)
        x, y = (centre, middle) if lying else (middle, centre)
        half_x, half_y = (half_long, half_across) if lying else (half_across, half_long)
        pen.mark(x, y, name, "on" if index in lit else "off")
        style.lamp(random, image, form, (x - half_x, y - half_y, x + half_x, y + half_y), name, index in lit)
    on = [name for index, name in enumerate(names) if index in lit]
    result = Scene(image, pen.marks)
    result.ask("light", QUESTIONS, listed(on), random)
    for name in (pick(random, STACK), pick(random, names)):
        answer = "yes" if name in on else "no"
        result.ask("presence", (f"Is the {name} light on?", f"Is the {name} lamp lit?"), answer, random)
    if chance(random, 0.3):
        result.ask("light", LAMP_QUESTIONS, str(count), random)
    return result


_FORMS = ("box", "box", "rounded", "round", "ellipse", "dome")


class _Style:
    """How the lamps of one tower look lit and dark."""

    def __init__(self, random: Random) -> None:
        self._dark = between(random, 0.18, 0.5)
        self._grey = between(random, 0, 0.35)
        self._bright = between(random, 0.9, 1.25)
        self._white = between(random, 0.0, 0.45)
        self._core = chance(random, 0.5)
        self._glow = between(random, 0.15, 0.6) if chance(random, 0.6) else 0.0
        self._edge = pick(random, (None, (20, 20, 20), (60, 60, 65), (200, 200, 205)))

    def lamp(self, random: Random, image: Image.Image, form: str, box: Box, name: str, on: bool) -> None:
        """Draw one lamp into its box."""
        full = named(random, name)
        colour = self._lit(full) if on else self._unlit(full)
        if on and self._glow:
            _halo(image, box, colour, self._glow)
        pen = ImageDraw.Draw(image)
        _shape(pen, form, box, colour, self._edge)
        x0, y0, x1, y1 = box
        if on and self._core:
            x, y, r = (x0 + x1) / 2, (y0 + y1) / 2, min(x1 - x0, y1 - y0) * between(random, 0.15, 0.3)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=_mixed(colour, (255, 255, 255), 0.55))
        elif chance(random, 0.3):  # a lens reflects what is above it, lit or not
            pen.line(
                (x0 * 0.8 + x1 * 0.2, y0 * 0.8 + y1 * 0.2, x0 * 0.8 + x1 * 0.2, y0 * 0.3 + y1 * 0.7),
                fill=shade(colour, 1.4),
            )

    def _lit(self, full: Colour) -> Colour:
        return _mixed(shade(full, self._bright), (255, 255, 255), self._white * 0.6)

    def _unlit(self, full: Colour) -> Colour:
        level = sum(full) / 3
        return shade(_mixed(full, (round(level),) * 3, self._grey), self._dark)


def _mixed(one: Colour, other: tuple[int, ...], share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


def _shape(pen: ImageDraw.ImageDraw, form: str, box: Box, fill: Colour, edge: Colour | None) -> None:
    x0, y0, x1, y1 = box
    width = max(1, round(min(x1 - x0, y1 - y0) * 0.04)) if edge else 0
    if form == "box":
        pen.rectangle(box, fill=fill, outline=edge, width=width)
    elif form in {"round", "ellipse"}:
        pen.ellipse(box, fill=fill, outline=edge, width=width)
    else:
        radius = min(x1 - x0, y1 - y0) * (0.22 if form == "rounded" else 0.5)
        pen.rounded_rectangle(box, radius, fill=fill, outline=edge, width=width)


def _halo(image: Image.Image, box: Box, colour: Colour, strength: float) -> None:
    x0, y0, x1, y1 = box
    reach = max(x1 - x0, y1 - y0) * 0.35
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).ellipse((x0 - reach, y0 - reach, x1 + reach, y1 + reach), fill=round(255 * strength))
    image.paste(colour, (0, 0), mask.filter(ImageFilter.GaussianBlur(reach * 0.6)))


def _holder(
    random: Random, pen: Pen, lying: bool, first: float, length: float, middle: float, thick: float, ground: Colour
) -> None:
    """Draw what holds the lamps: a pole, a case, caps, or nothing."""
    kind, metal = (
        random.random(),
        jitter(random, pick(random, ((60, 60, 64), (30, 30, 32), (170, 172, 175), (110, 112, 115)))),
    )
    wide = thick * between(random, 0.1, 0.3)
    pole = (middle - wide, first + length, middle + wide, first + length * 3)
    if lying:
        pole = (first - length, middle - wide, first, middle + wide)
    if kind < 0.55:
        pen.rectangle(pole, fill=metal)
    if 0.3 < kind < 0.85:
        out = thick * between(random, 0.55, 0.7)
        ends = length * between(random, 0.0, 0.08)
        case = (middle - out, first - ends, middle + out, first + length + ends)
        pen.rounded_rectangle(
            (case[1], case[0], case[3], case[2]) if lying else case, thick * between(random, 0, 0.25), fill=metal
        )
