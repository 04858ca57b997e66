"""Stack lights, rows of indicator LEDs, switches: which is on, in what colour."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from training.draw import canvas, fit, ink, named, panel, shade, text
from training.scene import Random, Scene, between, chance, pick

STACK = ("red", "yellow", "green", "blue", "white")
QUESTIONS = (
    "Which stack light is on?",
    "Which lamp of the stack light is lit?",
    "What colour is the tower light showing?",
)
LAMP_QUESTIONS = ("How many lamps does the stack light have?", "How many segments has the tower light?")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def scene(random: Random, several: float = 0.0) -> Scene:
    """Draw one of the three kinds; the share `several` of stack lights has more than one lamp lit."""
    kinds: tuple[Callable[[Random], Scene], ...] = (partial(stack_light, several=several), indicator_row, switches)
    return pick(random, kinds)(random)


def glow(random: Random, name: str, on: bool) -> tuple[int, int, int]:
    """Return the colour of a lamp, bright or dark."""
    colour = named(random, name)
    if on:
        return tuple(min(255, round(c * 0.75 + 85)) for c in colour)  # type: ignore[return-value]
    return shade(colour, between(random, 0.22, 0.4))


def listed(names: list[str]) -> str:
    """Return names in words: "none", "a", "a and b", "a, b and c"."""
    if not names:
        return "none"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def stack_light(random: Random, several: float = 0.0) -> Scene:
    """Draw a tower of lamps with one lit, or none, or two; the share `several` with two or more."""
    image, pen, _ = canvas(random)
    width, height = image.size
    count = int(random.integers(2, 6))
    names = [STACK[i] for i in random.permutation(5)[:count]]
    lit = set(random.permutation(count)[: pick(random, (0, 1, 1, 1, 1, 2))].tolist())
    if several > 0 and chance(random, several):
        lit = set(random.permutation(count)[: pick(random, (2, 2, 2, 3, 4))].tolist())
    high = between(random, 0.6, 0.85) * height / count
    wide = min(high * between(random, 0.8, 1.6), width * 0.4)
    x, y = between(random, wide / 2 + 4, width - wide / 2 - 4), between(random, 0.03, 0.1) * height
    pen.rectangle((x - wide * 0.12, y + high * count, x + wide * 0.12, height), fill=named(random, "gray"))
    for index, name in enumerate(names):
        colour = glow(random, name, index in lit)
        top = y + index * high
        pen.mark(x, top + high * 0.46, name, _state(index in lit))
        pen.rounded_rectangle(
            (x - wide / 2, top, x + wide / 2, top + high * 0.92),
            high * 0.12,
            fill=colour,
            outline=shade(colour, 0.6),
            width=2,
        )
        if index in lit:
            pen.ellipse((x - wide * 0.2, top + high * 0.2, x + wide * 0.2, top + high * 0.6), fill=shade(colour, 1.3))
    result = Scene(image, pen.marks)
    on = [name for index, name in enumerate(names) if index in lit]
    result.ask(
        "light",
        QUESTIONS,
        listed(on),
        random,
    )
    result.ask(
        "light",
        LAMP_QUESTIONS,
        str(count),
        random,
    )
    result.describe(
        random,
        "a stack light, from the top: "
        + ", ".join(f"{name} {_state(index in lit)}" for index, name in enumerate(names)),
    )
    name = pick(random, STACK)
    result.ask(
        "presence", (f"Is the {name} light on?", f"Is the {name} lamp lit?"), "yes" if name in on else "no", random
    )
    return result


def indicator_row(random: Random) -> Scene:
    """Draw a row of LEDs, each dark or lit, sometimes with names."""
    image, pen, ground = canvas(random)
    width, height = image.size
    count = int(random.integers(3, 7))
    lying = width >= height or chance(random, 0.3)
    length, thickness = (width, height) if lying else (height, width)
    plate = shade(ground, between(random, 0.5, 1.5))
    panel(
        random,
        pen,
        (width * 0.04, height * 0.15, width * 0.96, height * 0.85)
        if lying
        else (width * 0.15, height * 0.04, width * 0.85, height * 0.96),
        plate,
    )
    radius = min(length * 0.9 / count * between(random, 0.25, 0.4), thickness * 0.2)
    colours = (
        [pick(random, ("red", "green", "yellow", "blue"))] * count
        if chance(random, 0.5)
        else [pick(random, ("red", "green", "yellow", "blue")) for _ in range(count)]
    )
    lit = [chance(random, 0.35) for _ in range(count)]
    if chance(random, 0.5):
        lit = one_lit(random, count)
    for index in range(count):
        along, across = length * (0.08 + 0.84 * (index + 0.5) / count), thickness * 0.5
        x, y = (along, across) if lying else (across, along)
        colour = glow(random, colours[index], lit[index])
        number = str(index + 1)
        pen.mark(x, y, colours[index], _state(lit[index]), number)
        pen.ellipse((x - radius * 1.2, y - radius * 1.2, x + radius * 1.2, y + radius * 1.2), fill=shade(plate, 0.6))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        if lit[index]:
            r = radius * 0.4
            pen.ellipse((x - r, y - r, x + r, y + r), fill=shade(colour, 1.35))
        where = (x, y + radius * 1.9) if lying else (x + radius * 2.2, y)
        text(pen, where, number, fit(random, number, radius, radius * 1.1), ink(random, plate))
    result = Scene(image, pen.marks)
    on = [str(index + 1) for index in range(count) if lit[index]]
    result.ask(
        "light",
        ("Which LEDs are on?", "Which indicators are lit?", "List the numbers of the LEDs that are on."),
        listed(on),
        random,
    )
    result.ask("light", ("How many LEDs are on?", "How many indicators are lit?"), str(len(on)), random)
    index = int(random.integers(count))
    result.ask(
        "presence", (f"Is LED {index + 1} on?", f"Is indicator {index + 1} lit?"), "yes" if lit[index] else "no", random
    )
    if on and len(on) == 1:
        result.ask(
            "light",
            ("What colour is the LED that is on?", "In which colour does the lit indicator shine?"),
            colours[int(on[0]) - 1],
            random,
        )
    result.describe(
        random,
        "a row of LEDs: " + ", ".join(f"{i + 1} {colours[i]} {_state(lit[i])}" for i in range(count)),
    )
    return result


def one_lit(random: Random, count: int) -> list[bool]:
    """Return a row with exactly one lamp lit."""
    chosen = int(random.integers(count))
    return [index == chosen for index in range(count)]


def switches(random: Random) -> Scene:
    """Draw toggle switches, up for on."""
    image, pen, ground = canvas(random)
    width, height = image.size
    count = int(random.integers(1, 6))
    plate = shade(ground, between(random, 0.6, 1.4))
    panel(random, pen, (width * 0.03, height * 0.08, width * 0.97, height * 0.92), plate)
    on = [chance(random, 0.5) for _ in range(count)]
    wide = min(width * 0.9 / count * between(random, 0.3, 0.55), height * 0.3)
    high = min(wide * between(random, 1.5, 2.1), height * 0.48)
    face = fit(random, "OFF", wide * 0.8, height * 0.09)
    for index in range(count):
        x, y = width * (0.05 + 0.9 * (index + 0.5) / count), height * 0.5
        pen.rounded_rectangle(
            (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2), wide * 0.2, fill=shade(plate, 0.45)
        )
        top = y - high * 0.46 if on[index] else y
        pen.mark(x, y, _state(on[index]))
        knob = (
            named(random, "green")
            if on[index] and chance(random, 0.4)
            else named(random, pick(random, ("white", "gray", "red")))
        )
        pen.rounded_rectangle(
            (x - wide * 0.42, top, x + wide * 0.42, top + high * 0.46), wide * 0.16, fill=knob, outline=shade(knob, 0.7)
        )
        text(pen, (x, y - high * 0.5 - height * 0.06), "ON", face, ink(random, plate))
        text(pen, (x, y + high * 0.5 + height * 0.06), "OFF", face, ink(random, plate))
    result = Scene(image, pen.marks)
    if count == 1:
        result.ask(
            "light",
            ("Is the switch on or off?", "What is the position of the switch?"),
            "on" if on[0] else "off",
            random,
        )
        return result
    index = int(random.integers(count))
    place = ORDINALS[index]
    result.ask(
        "light",
        (
            f"Is the {place} switch from the left on or off?",
            f"What is the position of switch {index + 1} from the left?",
        ),
        "on" if on[index] else "off",
        random,
    )
    result.ask("light", ("How many switches are on?", "How many switches are up?"), str(sum(on)), random)
    result.describe(random, "switches, from the left: " + ", ".join(_state(each) for each in on))
    return result


def _state(on: bool) -> str:
    return "on" if on else "off"
