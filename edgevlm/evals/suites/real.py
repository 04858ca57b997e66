"""Real pictures, each question about one with a twin: the picture changed by code so that the answer is another.

A model that knows such pictures and does not look answers twins alike, and is right about one of them at most. The
pictures are those of scikit-image's wheel that their authors gave to the public (CC0, public domain, or no known
copyright restrictions, as its `skimage/data/_fetchers.py` says of each); none is downloaded.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgevlm.errors import OptionError
from edgevlm.evals.edits import Edit, edited
from edgevlm.evals.items import Item, Suite
from edgevlm.families.base import RGB
from edgevlm.inputs.image import load_image

KINDS = ("count", "colour", "side", "presence", "text", "object")
PICTURES = {
    "astronaut": ("astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
    "brick": ("brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"),
    "camera": ("camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"),
    "cell": ("cell.png", "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515"),
    "chelsea": ("chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
    "coffee": ("coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
    "coins": ("coins.png", "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba"),
    "grass": ("grass.png", "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89"),
    "gravel": ("gravel.png", "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12"),
    "horse": ("horse.png", "c7fb60789fe394c485f842291ea3b21e50d140f39d6dcb5fb9917cc178225455"),
    "hubble": ("hubble_deep_field.jpg", "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4"),
    "ihc": ("ihc.png", "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef"),
    "retina": ("retina.jpg", "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6"),
    "rocket": ("rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
    "text": ("text.png", "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1"),
}
"""Each picture's file and its SHA-256: the answers are true of no other."""
_ITEMS = "real.jsonl"
_INSTALL = "install scikit-image, whose pictures it asks about: pip install 'edgevlm[eval]'"


class Twins(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A question with two answers: one about a picture, and one about its counterfactual twin."""

    kind: str
    picture: str
    question: str
    options: tuple[str, ...]
    truth: str
    edits: tuple[Edit, ...] = ()
    """What is done to the picture for the first answer: nothing, unless a label or another picture is put on it."""
    twin_truth: str
    twin_edits: tuple[Edit, ...]
    """What is done to the picture, as it is, for the second."""


class Real(Suite):
    """Sixty questions with their twins; the items about a picture are a family."""

    name = "real"
    asks = "sees what real pictures show"
    needs_general_model = True

    def __init__(self, data: Path | None = None) -> None:
        super().__init__(data)
        if not (spec := find_spec("skimage")) or not spec.origin:
            raise OptionError(f"the suite real needs more: {_INSTALL}")
        self._folder = Path(spec.origin).parent / "data"
        self._load: Callable[[str], RGB] = cache(self._picture)

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return items, twins together and the kinds in turn; of an odd `count` one less. Raises `OptionError`."""
        random = np.random.default_rng(seed)
        cells = [_shuffled([*enumerate(_twins(kind), 1)], random) for kind in KINDS]
        places: Counter[int] = Counter()
        pairs = []
        for number, twins in (each for turn in zip(*cells, strict=True) for each in turn):
            size = len(twins.options)
            pairs.append(self._items(f"{twins.kind}-{number}", twins, places[size], random))
            places[size] += 1
        chosen = None if count is None else max(1, count // 2)
        return [item for pair in pairs[:chosen] for item in pair]

    def _items(self, name: str, twins: Twins, place: int, random: np.random.Generator) -> list[Item]:
        options = _ordered(twins, place, random)
        sides = (("original", twins.truth, twins.edits), ("twin", twins.twin_truth, twins.twin_edits))
        return [
            Item(
                f"{name}-{side}",
                twins.kind,
                twins.question,
                partial(self._shown, twins.picture, edits),
                truth,
                options,
                is_lettered=True,
                family=twins.picture,
                variant=side,
                facts={"twins": name},
            )
            for side, truth, edits in sides
        ]

    def _shown(self, picture: str, edits: tuple[Edit, ...]) -> list[RGB]:
        return [edited(self._load(picture), edits, self._load)]

    def _picture(self, name: str) -> RGB:
        file, digest = PICTURES[name]
        try:
            data = (self._folder / file).read_bytes()
        except OSError:
            data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise OptionError(f"{self._folder / file} is missing or another picture; {_INSTALL}")
        return load_image(data)

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return how often both twins are right, and how often they are answered alike, in all and by kind.

        An answer is the option that is likeliest over all orders.
        """
        pairs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            pairs[row["facts"]["twins"]].append(row)
        both: dict[str, list[float]] = defaultdict(list)
        alike: dict[str, list[float]] = defaultdict(list)
        for pair in pairs.values():
            if len(pair) == 2:
                answers = [max(row["scores"], key=row["scores"].__getitem__) for row in pair]
                for name in ("", f", {pair[0]['cell']}"):
                    both[name].append(float(answers == [row["truth"] for row in pair]))
                    alike[name].append(float(answers[0] == answers[1]))
        return {
            f"{told}{name}": float(np.mean(values))
            for told, of in (("both twins right", both), ("twins answered alike", alike))
            for name, values in of.items()
        }

    def remark(self, figures: Mapping[str, float]) -> str:
        """Return how much of it is a habit rather than what is seen."""
        if "both twins right" not in figures:
            return ""
        both, alike = figures["both twins right"], figures["twins answered alike"]
        return f"; both twins right {both:.0%}, answered alike {alike:.0%}"


@cache
def _all_twins() -> tuple[Twins, ...]:
    lines = (files(__package__) / _ITEMS).read_text(encoding="utf-8").splitlines()
    return tuple(msgspec.json.decode(line, type=Twins) for line in lines)


def _twins(kind: str) -> list[Twins]:
    return [twins for twins in _all_twins() if twins.kind == kind]


def _shuffled(values: list[Any], random: np.random.Generator) -> list[Any]:
    return [values[index] for index in random.permutation(len(values))]


def _ordered(twins: Twins, place: int, random: np.random.Generator) -> tuple[str, ...]:
    """Return the options in a random order, but for the two truths, whose places go around."""
    size = len(twins.options)
    first = place % size
    second = (first + 1 + place // size % (size - 1)) % size
    others = _shuffled([each for each in twins.options if each not in (twins.truth, twins.twin_truth)], random)
    placed = {first: twins.truth, second: twins.twin_truth}
    return tuple(placed[index] if index in placed else others.pop() for index in range(size))
