"""Batches: pictures drawn by seed, several questions about each sharing its encoding.

A row is one picture's prompt prefix followed by its questions and answers. Each question sees the prefix and itself,
not the other questions, and its positions continue the prefix, so that every one is trained as if it stood alone; but
some follow the question before them and see it and its answer, as in a conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from training import world
from training.degrade import degrade
from training.draw import more_fonts
from training.forms import formed
from training.gaze import OUTSIDE, SINK, asked_words, cell_of, counted, gazes, shares_told
from training.model import IMAGE_SIZE, IMAGE_TOKENS, SIDE
from training.scene import Random, Scene, chance
from training.scenes import SCENES, charts, counting, displays, gauges, lights, pages, shapes, sheets, towers
from training.wording import worded

VARIED = 0.4
"""The share of gauges, charts and counts to learn from that are less alike than those of the held-out set."""
TAUGHT = SCENES | {
    "display": partial(displays.scene, varied=0.5),
    "gauge": partial(gauges.scene, ticked=0.0, varied=VARIED, wide=0.4),
    "chart": partial(charts.scene, varied=VARIED),
    "count": partial(counting.scene, varied=0.6),
    "light": partial(lights.scene, several=0.4),
    "tower": towers.scene,
    "shape": partial(shapes.scene, everywhere=True),
}
"""What is drawn to learn from. A model that has seen many needles stand on numbers takes to saying round ones: where it
doubts a digit, its neighbours share what it believes, and the zero of a number does not."""

KIND_OF = {"tower": "light"}
"""What the kinds are that are drawn by two modules."""
IGNORED = -100
SCALES = tuple(
    dict.fromkeys(f"{low}..{high}" for low, high, *_ in (*gauges.SCALES, *((0, top) for top in charts.TOPS)))
)
"""The names of all scales, of gauges and of charts."""
MARKS = (
    *"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.-%°",
    *("circle", "square", "triangle", "star", "cross", "diamond", "hexagon", "ring", "nut", "washer", "screw", "gear"),
    *("red", "green", "blue", "yellow", "orange", "purple", "white", "black", "gray"),
    *("on", "off", "part", "gap", "needle", "hub", "top", "spike"),
    *("bar", "highest", "lowest"),
    *SCALES,
)
"""What the vision tower is told about single patches while it learns."""
_MARK_INDEX = {name: index for index, name in enumerate(MARKS)}
LONGEST = IMAGE_TOKENS + 112
"""Tokens of a row; a question that would make it longer is left out."""
WEIGHTS = {
    "display": 6.5,
    "label": 5.5,
    "gauge": 8.0,
    "chart": 2.0,
    "count": 5.5,
    "missing": 0.6,
    "light": 1.5,
    "tower": 4.0,
    "shape": 1.5,
}
"""How often a kind of scene is drawn: more of those that learn slowly."""
DESCRIBED = 0.3
"""The share of descriptions that are learned from: with all of them half of the loss is theirs."""
FOLLOWING = 0.25
"""The share of questions that follow another one about the picture."""
SHEETS_AMONG, PAGES_AMONG, NOTHING_AMONG = 0.03, 0.12, 0.035
"""Shares of sheets and of pages among the scenes: the first keep up what the vision tower knows, the others teach the
text part where to look. And the share of pictures that show nothing that is asked about."""
OUTSIDE_AMONG = 0.6
"""The share of scenes that stand before a photograph or a texture."""
REFUSED = 0.2
"""The share of scenes that are also asked what one of another kind would be asked."""


Pairs: TypeAlias = list[tuple[int, int]]
Shares: TypeAlias = list[tuple[int, int, float]]
Measured: TypeAlias = list[tuple[int, float]]
Readings: TypeAlias = list[tuple[int, float, int]]
Row: TypeAlias = tuple[
    np.ndarray, list[int], list[int], list[int], list[int], Pairs, Measured, Pairs, Pairs, Shares, Readings
]


@dataclass(frozen=True)
class Batch:
    """One batch as NumPy arrays; B pictures, S positions."""

    pixels: Any  # (B, H, W, 3) uint8, an array; a tensor where it lies on a GPU
    input_ids: np.ndarray  # (B, S) int64
    labels: np.ndarray  # (B, S) int64, already shifted: the id to predict at each position
    positions: np.ndarray  # (B, S) int64
    segments: np.ndarray  # (B, S) int16: 0 the prefix, k the k-th question, -1 padding
    marks: np.ndarray  # (n, 3) int64: picture, patch, what is drawn there (index into MARKS)
    shares: np.ndarray  # (n, 3) float64: picture, patch, how far along its scale stands what is there
    gazes: np.ndarray  # (n, 3) int64: picture, position, position to look at for the id to predict there
    words: np.ndarray  # (n, 3) int64: picture, position, position of a word that says what is asked
    counts: np.ndarray  # (n, 4) float64: picture, position, position to look at, share of the attention
    readings: np.ndarray  # (n, 4) float64: picture, position, share and scale of what is told there, -1 if none

    @property
    def scales(self) -> np.ndarray:
        """`(n, 3)` int64: picture, patch, which scale (index into `SCALES`) measures what is there."""
        picture, patch, name = self.marks.T
        first = _MARK_INDEX[SCALES[0]]
        measuring = name >= first
        return np.stack([picture[measuring], patch[measuring], name[measuring] - first], 1)

    @property
    def told_scales(self) -> np.ndarray:
        """`(n, 3)` int64: picture, position, the scale of what is told there."""
        return self.readings[self.readings[:, 3] >= 0][:, [0, 1, 3]].astype(np.int64)


class Drawer:
    """Draws picture number `index` of a seed, always the same."""

    def __init__(self, tokenizer: Any, seed: int, ramp: int = 0, sheets: bool = False) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._names = list(TAUGHT)
        share = np.array([WEIGHTS.get(name, 1.0) for name in self._names])
        self._share = share / share.sum()
        self._ramp = ramp
        self._sheets = sheets
        self._ids: dict[str, tuple[list[int], Pairs]] = {}
        image_tokens = "<image>" * IMAGE_TOKENS
        block = f"<fake_token_around_image><global-img>{image_tokens}<fake_token_around_image>"
        self._prefix = self._encode(f"<|user|>{block}")[0]
        self._first = self._prefix.index(tokenizer.convert_tokens_to_ids("<image>"))

    def scene(self, index: int, name: str | None = None) -> Scene:
        """Return the scene, its picture as a camera saw it."""
        random = np.random.default_rng((self._seed, index, *((2,) if self._sheets else ())))
        with more_fonts():
            scene = self._drawn(random, name)
        strength = 1.0 if index >= self._ramp else 0.2 + 0.8 * index / self._ramp
        degrade(scene, random, strength)
        return scene

    def _drawn(self, random: Random, name: str | None) -> Scene:
        chosen = 1.0 if name else 0.0 if self._sheets else random.random()
        if chosen < SHEETS_AMONG:
            return sheets.scene(random)
        chosen -= SHEETS_AMONG
        if chosen < NOTHING_AMONG:
            return world.nothing(random)
        is_page = chosen - NOTHING_AMONG < PAGES_AMONG
        kind = "page" if is_page else name or str(random.choice(self._names, p=self._share))
        draw: Callable[[Random], Scene] = pages.scene if is_page else TAUGHT[kind]
        outside = chance(random, 0.3 if is_page else OUTSIDE_AMONG)
        scene = world.before_anything(draw, KIND_OF.get(kind, kind), random) if outside else draw(random)
        if chance(random, REFUSED):
            world.refuse(scene, KIND_OF.get(kind, kind), random)
        return scene

    def batch(self, first: int, count: int) -> list[Batch]:
        """Return pictures `first` to `first + count - 1` in two halves: the shorter rows, the longer ones."""
        rows = [self.row(self.shuffled(index)) for index in range(first, first + count)]
        rows.sort(key=lambda row: len(row[1]))
        half = -(-count // 2)
        return [collate(part) for part in (rows[:half], rows[half:]) if part]

    def shuffled(self, index: int, name: str | None = None) -> Scene:
        """Return a scene with its questions in the order and the words in which they are asked."""
        scene = self.scene(index, name)
        random = np.random.default_rng((self._seed, index, 1))
        random.shuffle(scene.pairs)
        scene.pairs = [pair for pair in scene.pairs if pair.task != "description" or chance(random, DESCRIBED)]
        scene.pairs = [formed(worded(pair, random), random) for pair in scene.pairs]
        scene.pairs = [replace(pair, follows=chance(random, FOLLOWING)) for pair in scene.pairs]
        return scene

    def row(self, scene: Scene) -> Row:
        """Return pixels, ids, labels, positions, segments and marks of one picture, without what makes it too long."""
        ids, labels = list(self._prefix), [IGNORED] * len(self._prefix)
        positions, segments = list(range(len(ids))), [0] * len(ids)
        looks: Pairs = []
        words: Pairs = []
        counts: Shares = []
        readings: Readings = []
        turn = self._encode("<|end|><|user|>")[0]
        for number, pair in enumerate(scene.pairs, 1):
            follows = pair.follows and segments[-1] > 0
            words_of = pair.wording or pair.question
            question, asked = self._encode(f"{words_of}<|end|><|assistant|>")
            lead = self._encode(pair.lead)[0]
            answer, spans = self._encode(f"{pair.answer}{pair.close}<|end|>")
            before = turn if follows else []
            head = before + question + lead
            text = head + answer[:-1]
            if len(ids) + len(text) > LONGEST and number > 1:
                continue
            places = gazes(scene, pair, [span for span in spans if span[0] < len(pair.answer)], SIDE)
            first = len(ids) + len(head) - 1
            telling = [len(ids) + len(before) + index for index in asked_words(words_of, asked[:-2])]
            words += [(first + index, word) for index in range(len(answer)) for word in telling]
            looks += [(first + index, self._seen(place)) for index, each in enumerate(places) for place in each]
            shares = counted(scene, pair, SIDE)
            counts += [(first + i, self._seen(at), share) for i in range(len(places)) for at, share in shares.items()]
            told, scale = shares_told(pair, spans), SCALES.index(pair.scale) if pair.scale in SCALES else -1
            readings += [(first + index, each, scale) for index, each in enumerate(told) if each is not None]
            start = positions[-1] + 1 if follows else len(self._prefix)
            labels += [IGNORED] * (len(head) - 1) + answer
            ids += text
            positions += range(start, start + len(text))
            segments += [segments[-1] if follows else number] * len(text)
        marks, measured = marked_patches(scene), measured_patches(scene)
        return shrink(scene.image), ids, labels, positions, segments, marks, measured, looks, words, counts, readings

    def _seen(self, place: int) -> int:
        """Return the position of an image token, or of the sink."""
        return 0 if place == SINK else self._first + place

    def _encode(self, text: str) -> tuple[list[int], Pairs]:
        """Return token ids and the characters of each."""
        found = self._ids.get(text)
        if found is None:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            found = self._ids[text] = (encoded["input_ids"], encoded["offset_mapping"])
            if len(self._ids) > 20_000:
                self._ids.clear()
        return found


def shrink(image: Image.Image) -> np.ndarray:
    """Return the picture as the checkpoint's processor makes it: longer side first, then the square."""
    width, height = image.size
    if width >= height:
        side = int(IMAGE_SIZE / (width / height))
        size = (IMAGE_SIZE, side + side % 2)
    else:
        side = int(IMAGE_SIZE * (width / height))
        size = (side + side % 2, IMAGE_SIZE)
    small = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def marked_patches(scene: Scene) -> Pairs:
    """Return patch and index into `MARKS` of every mark inside the picture."""
    placed = ((cell_of(scene, mark, SIDE), _MARK_INDEX.get(mark.name)) for mark in scene.marks)
    return [(patch, name) for patch, name in placed if patch != OUTSIDE and name is not None]


def measured_patches(scene: Scene) -> Measured:
    """Return patch and share of every mark that measures something."""
    placed = dict.fromkeys((cell_of(scene, mark, SIDE), mark.share) for mark in scene.marks)
    return [(patch, share) for patch, share in placed if patch != OUTSIDE and share is not None]


def collate(rows: list[Row]) -> Batch:
    """Pad rows to the longest."""
    longest = -(-max(len(row[1]) for row in rows) // 16) * 16

    def pad(part: int, value: int, kind: type) -> np.ndarray:
        return np.array([row[part] + [value] * (longest - len(row[part])) for row in rows], kind)

    def flat(part: int, kind: type = np.int64, width: int = 3) -> np.ndarray:
        found = [(index, *each) for index, row in enumerate(rows) for each in row[part]]  # type: ignore[misc]
        return np.array(found, kind).reshape(-1, width)

    return Batch(
        np.stack([row[0] for row in rows]),
        pad(1, 0, np.int64),
        pad(2, IGNORED, np.int64),
        pad(3, 0, np.int64),
        pad(4, -1, np.int16),
        flat(5),
        flat(6, np.float64),
        flat(7),
        flat(8),
        flat(9, np.float64, 4),
        flat(10, np.float64, 4),
    )
