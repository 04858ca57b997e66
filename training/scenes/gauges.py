"""Dial gauges of varied scales; the needle may stand between ticks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from training.draw import Box, Colour, Pen, Point, canvas, fit, ink, jitter, named, panel, shade, text
from training.scene import Random, Scene, between, chance, pick

QUESTIONS = (
    "What does the gauge read?",
    "Which value does the gauge show?",
    "Read the gauge.",
    "What is the reading of the dial?",
)
RANGE_QUESTIONS = ("What is the highest value on the scale?", "Where does the scale of the gauge end?")
SCALES = (
    (0, 10, 1),
    (0, 100, 10),
    (0, 100, 20),
    (0, 60, 10),
    (0, 16, 2),
    (0, 6, 1),
    (0, 4, 1),
    (0, 250, 50),
    (0, 400, 100),
    (0, 1000, 200),
    (-20, 120, 20),
    (-10, 50, 10),
    (-30, 30, 10),
    (-1, 5, 1),
)
MORE_SCALES = (
    *SCALES,
    *((0, 8, 1), (0, 8, 2), (0, 12, 2), (0, 20, 5), (0, 25, 5), (0, 30, 5), (0, 40, 10), (0, 50, 10), (0, 80, 10)),
    *((0, 120, 20), (0, 150, 50), (0, 160, 20), (0, 180, 20), (0, 200, 50), (0, 200, 20), (0, 220, 20), (0, 300, 50)),
    *((0, 500, 100), (0, 600, 100), (0, 800, 100), (0, 2000, 500), (0, 3000, 500), (0, 6000, 1000), (-50, 50, 25)),
    *((-40, 60, 20), (-100, 100, 50), (-5, 5, 1), (20, 100, 20), (50, 150, 25), (10, 60, 10), (100, 200, 20)),
)
"""Scales of gauges to learn from that are of any make."""
UNITS = ("bar", "°C", "psi", "%", "kPa", "V", "A", "rpm", "")


@dataclass(frozen=True)
class Dial:
    """Where a gauge's values are: from `low` at the angle `start` over `sweep` radians to `high`."""

    centre: Point
    radius: float
    start: float
    sweep: float
    low: int
    high: int

    @property
    def scale(self) -> str:
        """The scale's name."""
        return f"{self.low}..{self.high}"

    def share(self, value: float) -> float:
        """Return how far along the scale a value stands, 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def angle(self, value: float) -> float:
        """Return a value's angle in radians."""
        return self.start + self.share(value) * self.sweep

    def at(self, value: float, r: float) -> Point:
        """Return the point towards a value, `r` radii from the centre."""
        angle = self.angle(value)
        return self.centre[0] + math.cos(angle) * r * self.radius, self.centre[1] + math.sin(angle) * r * self.radius

    def box(self, r: float) -> Box:
        """Return the square around a circle of `r` radii."""
        (cx, cy), radius = self.centre, self.radius * r
        return cx - radius, cy - radius, cx + radius, cy + radius


@dataclass(frozen=True)
class Reading:
    """What a gauge reads."""

    value: float
    dial: Dial
    unit: str
    marks: tuple[int, ...]
    """Which of the picture's marks are its needle and its hub."""

    @property
    def text(self) -> str:
        """The value as an answer has it."""
        return written(self.value, self.dial.low, self.dial.high)

    @property
    def tolerance(self) -> float:
        """How far an answer may be off: 2 % of the scale."""
        return 0.02 * (self.dial.high - self.dial.low)

    def ask(self, scene: Scene, questions: tuple[str, ...], random: Random) -> None:
        """Ask for the reading, worded in one of several ways."""
        share = self.dial.share(self.value)
        scene.ask("gauge", questions, self.text, random, self.tolerance, share, self.dial.scale, self.marks)


def scene(random: Random, ticked: float = 0.2, varied: float = 0.0, wide: float = 0.0) -> Scene:
    """Draw one gauge; the share `ticked` of needles stands on a number, `varied` is less alike, `wide` of any make."""
    if wide > 0 and chance(random, wide):
        image, pen, ground = canvas(random)
        reading = wide_gauge(random, pen, (0, 0, *image.size), ground)
        result = Scene(image, pen.marks)
        reading.ask(result, QUESTIONS, random)
        return result
    loose = varied > 0 and chance(random, varied)
    image, pen, ground = canvas(random)
    box = (0, 0, *image.size)
    reading = loose_gauge(random, pen, box, ground) if loose else gauge(random, pen, box, ground, ticked)
    result = Scene(image, pen.marks)
    reading.ask(result, QUESTIONS, random)
    low, high = reading.dial.low, reading.dial.high
    if chance(random, 0.3):
        result.ask("gauge", RANGE_QUESTIONS, str(high), random)
    scale = f"from {low} to {high} {reading.unit}".strip()
    result.describe(random, f"a gauge {scale}, reading {reading.text}", reading.tolerance)
    return result


def gauge(random: Random, pen: Pen, box: Box, ground: Colour, ticked: float) -> Reading:
    """Draw a round gauge into the box; the share `ticked` of needles stands on a number."""
    x0, y0, x1, y1 = box
    radius = between(random, 0.36, 0.48) * min(x1 - x0, y1 - y0)
    cx, cy = between(random, x0 + radius, x1 - radius), between(random, y0 + radius, y1 - radius)
    face = jitter(random, pick(random, ((245, 245, 240), (230, 225, 205), (30, 30, 34), (20, 30, 50))), 10)
    if chance(random, 0.2):
        panel(
            random,
            pen,
            (cx - radius * 1.05, cy - radius * 1.05, cx + radius * 1.05, cy + radius * 1.05),
            shade(ground, 0.8),
        )
    rim = max(2, round(radius * between(random, 0.03, 0.1)))
    pen.ellipse(
        (cx - radius, cy - radius, cx + radius, cy + radius),
        fill=face,
        outline=named(random, pick(random, ("gray", "black"))),
        width=rim,
    )
    low, high, step = pick(random, SCALES)
    sweep = math.radians(pick(random, (180, 240, 270, 270, 300)))
    start = -math.pi / 2 - sweep / 2 + math.radians(random.normal(0, 1))
    colour = ink(random, face)
    dial = Dial((cx, cy), radius, start, sweep, low, high)
    at = dial.at
    outer, minor = 0.9 - rim / radius, pick(random, (2, 5, 5, 1))
    if chance(random, 0.3):
        zone = sorted((between(random, low, high), high if chance(random, 0.6) else low))
        box = dial.box(outer)
        first, last = (math.degrees(dial.angle(v)) for v in zone)
        pen.arc(
            box,
            first,
            last,
            fill=named(random, pick(random, ("red", "green", "yellow"))),
            width=max(2, round(radius * 0.07)),
        )
    ticks = round((high - low) / step)
    for index in range(ticks * minor + 1):
        value = low + index * step / minor
        major = index % minor == 0
        length = 0.13 if major else 0.07
        pen.line(
            (*at(value, outer), *at(value, outer - length)),
            fill=colour,
            width=max(1, round(radius * (0.03 if major else 0.015))),
        )
    numerals = fit(random, str(high) if high > 99 else "-20", radius * 0.27, radius * between(random, 0.15, 0.21))
    inset = between(random, 0.2, 0.34)
    for index in range(ticks + 1):
        value = low + index * step
        text(pen, at(value, outer - inset - between(random, 0, 0.02)), str(value), numerals, colour)
    unit = pick(random, UNITS)
    if unit:
        text(
            pen,
            (cx, cy + radius * between(random, 0.3, 0.5)),
            unit,
            fit(random, unit, radius * 0.4, radius * 0.16),
            colour,
        )
    anywhere = chance(random, 1 - ticked)
    value = between(random, low, high) if anywhere else low + step * int(random.integers(0, ticks + 1))
    needle(random, pen, (cx, cy), at(value, between(random, 0.6, 0.85)), radius, face)
    return told(pen, dial, value, unit)


def told(pen: Pen, dial: Dial, value: float, unit: str, reach: float = 0.7) -> Reading:
    """Mark the needle of a gauge that reads `value`, at `reach` radii, and its hub."""
    first, share = len(pen.marks), dial.share(value)
    pen.mark(*dial.at(value, reach), "needle", share=share)
    pen.mark(*dial.centre, "hub", dial.scale, share=share)
    return Reading(value, dial, unit, (first, first + 1))


def wide_gauge(random: Random, pen: Pen, box: Box, ground: Colour) -> Reading:
    """Draw a gauge of any make: a round, square or half dial of any colour, with a scale and a hand of any kind."""
    x0, y0, x1, y1 = box
    form = pick(random, ("round", "round", "round", "square", "half"))
    radius = between(random, 0.36, 0.48) * min(x1 - x0, y1 - y0)
    cx, cy = between(random, x0 + radius, x1 - radius), between(random, y0 + radius, y1 - radius)
    face = jitter(random, pick(random, FACES), 20)
    rim, edge = max(1, round(radius * between(random, 0.0, 0.14))), jitter(random, pick(random, RIMS), 20)
    low, high, step = pick(random, MORE_SCALES)
    sweep = math.radians(between(random, 170, 315) if form != "half" else between(random, 80, 180))
    start = -math.pi / 2 - sweep / 2 + math.radians(random.normal(0, 4) if form != "half" else 0)
    dial = Dial((cx, cy), radius, start, sweep, low, high)
    if form == "round":
        pen.ellipse(dial.box(1.0), fill=face, outline=edge, width=rim)
    elif form == "square":
        pen.rounded_rectangle(dial.box(1.0), radius * between(random, 0, 0.3), fill=face, outline=edge, width=rim)
    else:
        cy += radius * 0.35
        dial = Dial((cx, cy), radius * 0.98, start, sweep, low, high)
        plate = (cx - radius, cy - radius * 1.06, cx + radius, cy + radius * between(random, 0.15, 0.35))
        pen.rounded_rectangle(plate, radius * between(random, 0, 0.2), fill=face, outline=edge, width=rim)
    colour = ink(random, face)
    outer = between(random, 0.78, 0.96) - rim / radius
    zones(random, pen, dial, outer, colour)
    _scale(random, pen, dial, outer, step, colour)
    unit = pick(random, UNITS)
    if unit:
        words = fit(random, unit, radius * 0.4, radius * between(random, 0.13, 0.2))
        text(
            pen, (cx, cy + radius * (pick(random, (-0.35, 0.35, 0.5)) if form != "half" else -0.3)), unit, words, colour
        )
    value = between(random, low, high)
    hand = needle if chance(random, 0.5) else arrow
    hand(random, pen, (cx, cy), dial.at(value, between(random, 0.6, 1.0) * outer), radius, face)
    return told(pen, dial, value, unit, 0.7 * outer)


FACES: tuple[Colour, ...] = (
    *((250, 250, 248), (235, 232, 220), (25, 25, 28), (60, 62, 66), (200, 205, 210), (245, 220, 120)),
    *((200, 225, 245), (30, 60, 110), (25, 80, 50), (225, 240, 215), (120, 30, 30), (250, 235, 215)),
)
RIMS: tuple[Colour, ...] = (
    (30, 30, 32),
    (120, 122, 126),
    (200, 202, 205),
    (180, 150, 70),
    (160, 40, 35),
    (40, 70, 130),
)


def _scale(random: Random, pen: Pen, dial: Dial, outer: float, step: int, colour: Colour) -> None:
    """Draw ticks and numbers, now and then every second number only."""
    low, high, radius = dial.low, dial.high, dial.radius
    ticks, minor = round((high - low) / step), pick(random, (1, 2, 4, 5, 5, 10))
    size, long = between(random, 0.13, 0.24), between(random, 0.06, 0.16)
    numerals = fit(random, str(high) if high > 99 else "-20", radius * 0.32, radius * size)
    every = 2 if ticks >= 6 and ticks % 2 == 0 and chance(random, 0.3) else 1
    thick = between(random, 0.01, 0.04)
    for index in range(ticks * minor + 1):
        value, major = low + index * step / minor, index % minor == 0
        length = long if major else long * between(random, 0.45, 0.6)
        width = max(1, round(radius * (thick if major else thick * 0.5)))
        pen.line((*dial.at(value, outer), *dial.at(value, outer - length)), fill=colour, width=width)
        if major and index // minor % every == 0:
            text(pen, dial.at(value, outer - long - 0.04 - size * 0.6), str(round(value)), numerals, colour)


def loose_gauge(random: Random, pen: Pen, box: Box, ground: Colour) -> Reading:
    """Draw a gauge whose parts vary freely: with or without a dial, numbers within or around the scale."""
    x0, y0, x1, y1 = box
    around = chance(random, 0.35)
    reach = 1.36 if around else 1.0
    radius = between(random, 0.38, 0.49) * min(x1 - x0, y1 - y0) / reach
    cx = between(random, x0 + radius * reach, x1 - radius * reach)
    cy = between(random, y0 + radius * reach, y1 - radius * reach)
    face = ground
    if not around and chance(random, 0.75):
        face = jitter(random, pick(random, ((250, 250, 250), (235, 235, 228), (25, 25, 28), (200, 205, 210))), 12)
        rim, tint = max(1, round(radius * between(random, 0.0, 0.08))), shade(face, pick(random, (0.4, 0.7, 1.0)))
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=face, outline=tint, width=rim)
    low, high, step = pick(random, SCALES)
    sweep, colour = math.radians(between(random, 175, 320)), ink(random, face)
    start = -math.pi / 2 - sweep / 2 + math.radians(random.normal(0, 3))
    dial = Dial((cx, cy), radius, start, sweep, low, high)
    at = dial.at
    outer = 1.0 if around else between(random, 0.8, 0.92)
    zones(random, pen, dial, outer, colour)
    ticks = round((high - low) / step)
    size = between(random, 0.14, 0.23)
    numerals = fit(random, str(high) if high > 99 else "-20", radius * 0.3, radius * size)
    gone, minor, long = between(random, 0, 0.03), pick(random, (1, 2, 4, 5, 10)), between(random, 0.06, 0.16)
    outwards = around and chance(random, 0.4)
    for index in range(ticks * minor + 1):
        value, major = low + index * step / minor, index % minor == 0
        length = (long if major else long * between(random, 0.45, 0.6)) * (-1 if outwards else 1)
        thick = max(1, round(radius * (0.025 if major else 0.012)))
        pen.line((*at(value, outer - gone), *at(value, outer - gone - length)), fill=colour, width=thick)
        if major:
            place = outer + 0.17 + (long if outwards else 0) * 0.5 if around else outer - long - 0.05 - size * 0.6
            text(pen, at(value, place), str(round(value)), numerals, colour)
    unit = pick(random, UNITS)
    if unit and sweep < math.radians(290):
        words = fit(random, unit, radius * 0.4, radius * between(random, 0.13, 0.2))
        text(pen, (cx, cy + radius * pick(random, (-0.4 if around else 0.35, 0.3, 0.4, 0.55))), unit, words, colour)
    value = between(random, low, high)
    hand = needle if chance(random, 0.6) else arrow
    hand(random, pen, (cx, cy), at(value, between(random, 0.5, 0.95) * outer), radius, face)
    return told(pen, dial, value, unit, 0.7 * outer)


def zones(random: Random, pen: Pen, dial: Dial, outer: float, colour: Colour) -> None:
    """Draw the scale's arc, at `outer` radii: none, one in the scale's ink, or one of coloured parts."""
    chosen, radius, box = random.random(), dial.radius * outer, dial.box(outer)
    first, last = math.degrees(dial.start), math.degrees(dial.start + dial.sweep)
    if chosen < 0.4:
        pen.arc(box, first, last, fill=colour, width=int(random.integers(1, 4)))
    elif chosen < 0.75:
        cuts = [first, *sorted(random.uniform(first, last, int(random.integers(1, 3)))), last]
        thick = max(2, round(radius * between(random, 0.04, 0.14)))
        for begin, end in itertools.pairwise(cuts):
            pen.arc(box, begin, end, fill=named(random, pick(random, ("green", "yellow", "red", "gray"))), width=thick)


def arrow(random: Random, pen: Pen, centre: Point, tip: Point, radius: float, face: Colour) -> None:
    """Draw a hand with a head, and its hub."""
    colour = named(random, pick(random, ("red", "black", "blue") if sum(face) > 380 else ("red", "white", "yellow")))
    (cx, cy), (dx, dy) = centre, (tip[0] - centre[0], tip[1] - centre[1])
    head, half = between(random, 0.12, 0.3), between(random, 0.06, 0.12)
    neck = (tip[0] - dx * head, tip[1] - dy * head)
    pen.line((cx, cy, *neck), fill=colour, width=max(1, round(radius * between(random, 0.02, 0.06))))
    sides = [(neck[0] - dy * half, neck[1] + dx * half), (neck[0] + dy * half, neck[1] - dx * half)]
    pen.polygon([*sides, tip], fill=colour)
    hub(random, pen, centre, radius * between(random, 0.02, 0.15), colour)


def written(value: float, low: float, high: float) -> str:
    """Return a reading with about 1 % of the scale as its last digit."""
    span = high - low
    decimals = 2 if span <= 6 else 1 if span <= 70 else 0
    body = f"{value:.{decimals}f}"
    return body.lstrip("-") if float(body) == 0 else body


def needle(random: Random, pen: Pen, centre: Point, tip: Point, radius: float, face: Colour) -> None:
    """Draw the needle, its tail and its hub."""
    cx, cy = centre
    colour = (
        named(random, pick(random, ("red", "red", "black", "orange", "blue")))
        if sum(face) > 380
        else named(random, pick(random, ("red", "white", "orange", "yellow", "blue")))
    )
    dx, dy = tip[0] - cx, tip[1] - cy
    length = math.hypot(dx, dy)
    half = radius * between(random, 0.015, 0.04)
    px, py = -dy / length * half, dx / length * half
    tail = between(random, 0, 0.25)
    back = (cx - dx * tail, cy - dy * tail)
    if chance(random, 0.6):
        pen.polygon([(back[0] + px, back[1] + py), (back[0] - px, back[1] - py), tip], fill=colour)
    else:
        pen.line((*back, *tip), fill=colour, width=max(2, round(half * 1.6)))
    hub(random, pen, centre, radius * between(random, 0.05, 0.11), colour)


def hub(random: Random, pen: Pen, centre: Point, radius: float, colour: Colour) -> None:
    """Draw what a hand turns on."""
    cx, cy = centre
    pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=shade(colour, pick(random, (0.5, 1.0))))
