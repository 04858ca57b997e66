"""Glitches that only time shows, after TempGlitch (https://arxiv.org/abs/2605.21443): is something wrong?

Every frame of a clip with a glitch also occurs in a clean clip, so that one frame tells nothing; a clip and its clean
twin begin alike. The ladder shows 1 to 16 frames, each as a picture of its own or all on one sheet, and as a control
out of order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from edgevlm.evals.drawing import as_picture, font
from edgevlm.evals.items import Item, Suite, spread
from edgevlm.families.base import RGB

FRAMES = 16
"""Of a clip."""
LADDER = (1, 4, 8, 16)
_PER_CELL, _PLACES, _PHASES, _SIZE = 20, 24, 4, 192
_COLUMNS = 4


class State(NamedTuple):
    """What a frame shows: where the box is on the belt, None before and after it, and the belt's phase."""

    place: int | None
    phase: int


def clean(start: int, phase: int) -> list[State]:
    """Return a clip without a glitch: box and belt go on by one step a frame."""
    return [_state(start + step, phase + step) for step in range(FRAMES)]


def _state(place: int, phase: int) -> State:
    return State(place if 0 <= place < _PLACES else None, phase % _PHASES)


def _blinking(start: int, phase: int, at: int) -> list[State]:
    return [
        State(None, state.phase) if at <= step < at + 2 else state for step, state in enumerate(clean(start, phase))
    ]


def _jumping(start: int, phase: int, at: int) -> list[State]:
    return [_state(start + step + (5 if step >= at else 0), phase + step) for step in range(FRAMES)]


def _frozen(start: int, phase: int, at: int) -> list[State]:
    return [_state(start + _held(step, at), phase + _held(step, at)) for step in range(FRAMES)]


def _stuck(start: int, phase: int, at: int) -> list[State]:
    return [_state(start + _held(step, at), phase + step) for step in range(FRAMES)]


def _backwards(start: int, phase: int, at: int) -> list[State]:
    return [_state(start + step - (2 * (step - at) if step > at else 0), phase + step) for step in range(FRAMES)]


def _held(step: int, at: int) -> int:
    """Return the step of a clip that stands still for four frames from `at` on."""
    return step if step < at else max(at, step - 4)


GLITCHES: dict[str, Callable[[int, int, int], list[State]]] = {
    "blinking": _blinking,
    "jumping": _jumping,
    "frozen": _frozen,
    "stuck": _stuck,
    "backwards": _backwards,
}


class TempGlitch(Suite):
    """Yes or no, half of each; a clip and its twin are a family."""

    name = "tempglitch"
    asks = "sees what is wrong over time"

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return clips with their twins; every rung of the ladder has the same ones."""
        rungs = [(frames, "sheet") for frames in LADDER] + [(8, "pictures"), (8, "shuffled")]
        cells = [
            [item for index in range(_PER_CELL) for item in _twins(seed, index, frames, how)] for frames, how in rungs
        ]
        return spread(cells, count)

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return for each rung the share of pairs whose clip with a glitch got the higher probability of yes."""
        pairs: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        for row in rows:
            pairs[row["cell"], row["family"]][row["truth"]] = row["scores"]["yes"]
        told: dict[str, list[float]] = defaultdict(list)
        for (cell, _), scores in pairs.items():
            if len(scores) == 2:
                told[cell].append(float(np.sign(scores["yes"] - scores["no"]) / 2 + 0.5))
        return {f"pairs told apart, {cell}": float(np.mean(values)) for cell, values in told.items()}


def _twins(seed: int, index: int, frames: int, how: str) -> list[Item]:
    random = np.random.default_rng([seed, index])
    kind = tuple(GLITCHES)[index % len(GLITCHES)]
    start, phase, at = (int(random.integers(*each)) for each in ((1, 4), (0, _PHASES), (5, 9)))
    clips = {"yes": GLITCHES[kind](start, phase, at), "no": clean(start, phase)}
    family, cell = f"{kind}-{index}", f"{frames} frames, {how}"
    order = "out of order" if how == "shuffled" else "in order"
    question = (
        f"These are {frames} frames of a conveyor belt that moves a box, {order}."
        " Is there a glitch: does the box vanish, jump, stop or go back?"
    )
    if how == "sheet":
        question = "The frames are numbered on one sheet. " + question
    return [
        Item(
            f"{family}-{frames}-{how}-{truth}",
            cell,
            question,
            partial(_pictures, _sampled(clip, frames, how, seed + index), how),
            truth,
            ("yes", "no"),
            family=family,
            variant=truth,
        )
        for truth, clip in clips.items()
    ]


def _sampled(clip: Sequence[State], frames: int, how: str, seed: int) -> list[State]:
    """Return frames evenly spread over a clip, the middle one of a single frame."""
    places = np.round(np.linspace(0, FRAMES - 1, frames)).astype(int) if frames > 1 else np.array([FRAMES // 2])
    if how == "shuffled":
        places = np.random.default_rng(seed).permutation(places)
    return [clip[place] for place in places]


def _pictures(states: Sequence[State], how: str) -> list[RGB]:
    drawn = [frame(state) for state in states]
    if how != "sheet":
        return [as_picture(each) for each in drawn]
    rows = -(-len(drawn) // _COLUMNS)
    sheet = Image.new("RGB", (_SIZE * min(_COLUMNS, len(drawn)), _SIZE * rows), "white")
    for index, each in enumerate(drawn):
        ImageDraw.Draw(each).text((6, 4), str(index + 1), fill="black", font=font(20))
        sheet.paste(each, (index % _COLUMNS * _SIZE, index // _COLUMNS * _SIZE))
    return [as_picture(sheet)]


def frame(state: State) -> Image.Image:
    """Draw what a frame shows."""
    image = Image.new("RGB", (_SIZE, _SIZE), "#e8eef2")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 130, _SIZE, 150), fill="#555555")
    for stripe in range(-1, 9):
        x = stripe * 24 + state.phase * 6
        draw.line((x, 130, x + 8, 150), fill="#aaaaaa", width=3)
    draw.rectangle((0, 150, _SIZE, _SIZE), fill="#c8c0b0")
    if state.place is not None:
        left = state.place * (_SIZE - 30) / (_PLACES - 1)
        draw.rectangle((left, 98, left + 30, 129), fill="#b06020", outline="black", width=2)
    return image
