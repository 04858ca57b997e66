"""Where an answer comes from: for each of its tokens, the places of the picture that show what it says.

Answers alone leave the text part blind for tens of thousands of pictures; while it learns, some of its attention heads
are told these places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from training.draw import COLOURS
from training.scene import QA, Mark, Scene
from training.scenes.counting import MOST
from training.scenes.lights import ORDINALS
from training.scenes.things import PARTS, SHAPES

Places = frozenset[int]
Span = tuple[int, int]

_ALIASES = {
    "hole": "gap",
    "missing": "gap",
    "lack": "gap",
    "lit": "on",
    "showing": "on",
    "peak": "spike",
    "anomaly": "spike",
    "largest": "highest",
    "smallest": "lowest",
}
_WORDS = {*SHAPES, *PARTS, *COLOURS, "gap", "spike", "on", "highest", "lowest"}
_NOT_ASKED = {"on", "off", "top", "part"}
"""Names that questions use in another sense."""
SINK = -2
"""Instead of a place: the prompt's first token, to look at for want of anything in the picture."""
SINK_WEIGHT = 8.0
"""As many things as the sink is worth when things are counted."""
OUTSIDE = -1
"""What stands for the cell of a mark that is not in the picture."""
_WITHIN = 6
"""How many marks apart the neighbours of a reading may have been drawn."""


def gazes(scene: Scene, pair: QA, spans: Sequence[Span], side: int) -> list[Places]:
    """Return for each token of the answer the cells to look at, in a grid of `side` x `side`.

    `spans` are the characters of each token. An answer that spells a run of marks is followed mark by mark. Otherwise a
    token's places are those where what it names is drawn, among those that the question names, if it names any; a token
    that names nothing has the question's. What is not there has the sink; of counts, `counted` tells. Where lit lamps
    are listed, the places of one more token follow: what ends the list looks at all of them.
    """
    if _counts(pair):
        return [frozenset()] * len(spans)
    cells = [cell_of(scene, mark, side) for mark in scene.marks]
    asked = _asked(scene, pair, cells)
    units = [_unit(pair.answer, span) for span in spans]
    drawn = set() if _is_gauge(pair) else {mark.name for mark in scene.marks}
    named = [unit for unit in dict.fromkeys(units) if unit[1] in drawn]
    spelt = dict(zip(named, _spelt([unit[1] for unit in named], scene.marks) or (), strict=False))
    found: list[Places] = []
    for unit in units:
        if unit in spelt:
            found.append(frozenset({cells[spelt[unit]]}) - {OUTSIDE})
            continue
        here = frozenset(cell for cell, mark in zip(cells, scene.marks, strict=True) if mark.name == unit[1])
        found.append(((here & asked or asked) if asked else here) - {OUTSIDE})
    if _lists_lit(pair.question):
        found.append(asked - {OUTSIDE})
    return found


def counted(scene: Scene, pair: QA, side: int) -> dict[int, float]:
    """Return which share of its attention each cell and the sink should have to count what the question asks for.

    Attention gives the mean of what it looks at, not how much there is; beside a sink of fixed weight w, n things have
    n / (n + w) of it. Empty where nothing is counted.
    """
    if not _counts(pair):
        return {}
    names = _names(pair.question)
    if not names:
        names = {"on"} if re.search(r"\b(on|up)\b", pair.question) else {"on", "off"}
    marks = [scene.marks[i] for i in pair.about] or [mark for mark in scene.marks if mark.name in names]
    places = [cell_of(scene, mark, side) for mark in marks]
    places = [place for place in places if place >= 0]
    whole = len(places) + SINK_WEIGHT
    return {SINK: SINK_WEIGHT / whole} | {place: places.count(place) / whole for place in places}


def shares_told(pair: QA, spans: Sequence[Span]) -> list[float | None]:
    """Return for each token of the answer how far along its scale stands what it tells, 0 to 1.

    That is a reading, a count among `MOST`, or one of a point's coordinates in percent.
    """
    if pair.task == "point":
        comma = pair.answer.index(",")
        across, down = (int(number) / 100 for number in re.findall(r"\d+", pair.answer))
        return [across if start <= comma else down for start, _ in spans]
    share = min(int(pair.answer) / MOST, 1.0) if _counts(pair) else pair.share
    return [share] * len([start for start, _ in spans if start < len(pair.answer)])


def _counts(pair: QA) -> bool:
    return pair.answer.isdigit() and (pair.task == "count" or pair.question.startswith("How many"))


def _is_gauge(pair: QA) -> bool:
    """Return whether the answer tells a gauge's reading, whose digits are not those on its scale."""
    return pair.task == "gauge" or "a gauge" in pair.answer


def asked_words(question: str, spans: Sequence[Span]) -> list[int]:
    """Return the tokens of a question, whose characters are `spans`, that say what it is about."""
    words = [word for word in re.finditer(r"[A-Za-z0-9]+", question) if _tells(word)]
    return [
        index
        for index, (start, end) in enumerate(spans)
        if any(start < word.end() and word.start() < end for word in words)
    ]


def _tells(word: re.Match[str]) -> bool:
    if word.start() > 0 and (word.group()[0].isupper() or word.group()[0].isdigit()):
        return True
    return bool(_names(word.group()))


def _names(text: str) -> set[str]:
    """Return the marks that a question's words name."""
    words = {
        word
        for raw in re.findall(r"[a-z]+", text.lower())
        for word in (raw, raw.removesuffix("s"), raw.removesuffix("es"))
    }
    return {_ALIASES.get(word, word) for word in words if len(word) > 1 and word not in _NOT_ASKED} & _WORDS


def cell_of(scene: Scene, mark: Mark, side: int) -> int:
    """Return the cell a mark falls into, in a grid of `side` x `side`, or `OUTSIDE`."""
    width, height = scene.image.size
    if not (0 <= mark.x < width and 0 <= mark.y < height):
        return OUTSIDE
    return int(mark.y / height * side) * side + int(mark.x / width * side)


def _asked(scene: Scene, pair: QA, cells: list[int]) -> Places:
    """Return where the things are that the question is about, or names: where all of them are, or else any."""
    if pair.about:
        return frozenset(cells[index] for index in pair.about)
    if (lamp := _lamp(scene, pair.question)) is not None:
        return frozenset({cells[lamp]})
    if pair.task == "chart" and (bar := _bar(scene, pair.question)):
        return frozenset(cells[index] for index in bar)
    names = _names(pair.question) or ({"on"} if _lists_lit(pair.question) else set())
    names |= {"needle", "hub"} if _is_gauge(pair) else set()
    places = [
        frozenset(cell for cell, mark in zip(cells, scene.marks, strict=True) if mark.name == name) for name in names
    ]
    places = [each for each in places if each]
    common = frozenset.intersection(*places) if len(places) == len(names) and places else frozenset()
    if pair.task == "presence" and pair.answer == "no" and not common:
        return frozenset({SINK})
    return common or frozenset().union(*places)


def _lists_lit(question: str) -> bool:
    return re.search(r"\b(is|are) (on|lit)\b", question) is not None


def _lamp(scene: Scene, question: str) -> int | None:
    """Return the state's mark of the LED or the switch that the question counts off."""
    number = re.search(r"(?:LED|indicator|switch) (\d)", question)
    ordinal = re.search(r"(\w+) switch", question)
    if number:
        place = int(number[1]) - 1
    elif ordinal and ordinal[1] in ORDINALS:
        place = ORDINALS.index(ordinal[1])
    else:
        return None
    return [index for index, mark in enumerate(scene.marks) if mark.name in {"on", "off"}][place]


def _bar(scene: Scene, question: str) -> list[int]:
    """Return the marks of the bar that the question names by its label: its top, and the label."""
    marks = scene.marks
    for word in re.findall(r"\b[A-Z][a-zA-Z0-9]*", question[1:]):
        runs = [run for first in range(len(marks)) if (run := _run(list(word), marks, first))]
        tops = [index for index, mark in enumerate(marks) if mark.name == "top"]
        if runs and tops:
            return [runs[0][0], min(tops, key=lambda index: abs(marks[index].x - marks[runs[0][0]].x))]
    return []


def _unit(answer: str, span: tuple[int, int]) -> tuple[int, str]:
    """Return start and text of the word or the sign that a token is part of."""
    start, end = span
    while start < end and answer[start] == " ":
        start += 1
    if start >= end:
        return (start, "")
    for word in re.finditer(r"[a-z]{2,}", answer):
        if word.start() <= start < word.end():
            return (word.start(), word.group().removesuffix("s"))
    return (start, answer[start])


def _spelt(names: list[str], marks: list[Mark]) -> list[int] | None:
    """Return the marks that spell `names` in the order they were drawn, if one run alone does."""
    if len(names) < 2:
        return None
    runs = [run for first in range(len(marks)) if (run := _run(names, marks, first))]
    return runs[0] if runs and all(run[-1] == runs[0][-1] for run in runs) else None


def _run(names: list[str], marks: list[Mark], first: int) -> list[int] | None:
    if marks[first].name != names[0]:
        return None
    run = [first]
    for name in names[1:]:
        last = max(run)
        near = range(max(0, last - 2), min(len(marks), last + _WITHIN + 1))
        after = [index for index in near if marks[index].name == name and index not in run]
        if not after:
            return None
        run.append(after[0])
    return run
