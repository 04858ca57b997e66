"""Dial gauges of varied scales; the needle may stand between ticks."""

from __future__ import annotations

import math

from training.draw import Colour, Pen, Point, canvas, fit, ink, jitter, named, panel, shade, text
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
UNITS = ("bar", "°C", "psi", "%", "kPa", "V", "A", "rpm", "")


def scene(random: Random, ticked: float = 0.2) -> Scene:
    """Draw one round gauge; the share `ticked` of needles stands on a number."""
    image, pen, ground = canvas(random)
    width, height = image.size
    radius = between(random, 0.36, 0.48) * min(width, height)
    cx, cy = between(random, radius, width - radius), between(random, radius, height - radius)
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

    def at(value: float, r: float) -> tuple[float, float]:
        angle = start + (value - low) / (high - low) * sweep
        return cx + math.cos(angle) * r * radius, cy + math.sin(angle) * r * radius

    outer, minor = 0.9 - rim / radius, pick(random, (2, 5, 5, 1))
    if chance(random, 0.3):
        zone = sorted((between(random, low, high), high if chance(random, 0.6) else low))
        box = (cx - radius * outer, cy - radius * outer, cx + radius * outer, cy + radius * outer)
        first, last = (math.degrees(start + (v - low) / (high - low) * sweep) for v in zone)
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
    share = (value - low) / (high - low)
    pen.mark(*at(value, 0.7), "needle", share=share)
    pen.mark(cx, cy, "hub", f"{low}..{high}", share=share)
    result = Scene(image, pen.marks)
    result.ask("gauge", QUESTIONS, written(value, low, high), random, 0.02 * (high - low), share)
    if chance(random, 0.3):
        result.ask("gauge", RANGE_QUESTIONS, str(high), random)
    scale = f"from {low} to {high} {unit}".strip()
    result.describe(random, f"a gauge {scale}, reading {written(value, low, high)}", 0.02 * (high - low))
    return result


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
    hub = radius * between(random, 0.05, 0.11)
    pen.ellipse((cx - hub, cy - hub, cx + hub, cy + hub), fill=shade(colour, pick(random, (0.5, 1.0))))
