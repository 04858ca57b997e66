"""The suite `real`: pictures of scikit-image's wheel, and twins that differ in what is asked and in nothing else."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import OptionError
from edgevlm.evals.ask import Scored
from edgevlm.evals.edits import Box, Hue, Mirror, Negative, Paste, Write
from edgevlm.evals.items import Item
from edgevlm.evals.results import summarize
from edgevlm.evals.run import Selection, ask, evaluate
from edgevlm.evals.suites import make_suite
from edgevlm.evals.suites.real import KINDS, PICTURES, Real, Twins, _all_twins
from edgevlm.families.base import RGB
from tests.helpers.command import cli
from tests.helpers.evaluating import Oracle

FAST = ["--device", "CPU", "--no-cache", "--kv-cache", "stateful"]


@pytest.fixture(scope="module")
def real() -> Real:
    pytest.importorskip("skimage", reason="scikit-image is not installed: pip install 'edgevlm[eval]'")
    suite = make_suite("real")
    assert isinstance(suite, Real)
    return suite


@pytest.fixture(scope="module")
def pairs(real: Real) -> list[tuple[Twins, Item, Item]]:
    """Every question with the two items made of it."""
    items = {item.id: item for item in real.items(None, 0)}
    found, numbers = [], Counter[str]()
    for twins in _all_twins():
        numbers[twins.kind] += 1
        name = f"{twins.kind}-{numbers[twins.kind]}"
        found.append((twins, items[f"{name}-original"], items[f"{name}-twin"]))
    return found


def test_sixty_questions_have_a_twin_with_another_answer(pairs: Sequence[tuple[Twins, Item, Item]]) -> None:
    assert Counter(twins.kind for twins, _, _ in pairs) == dict.fromkeys(KINDS, 10)
    assert {twins.picture for twins, _, _ in pairs} == set(PICTURES)
    assert len({(twins.picture, twins.question) for twins, _, _ in pairs}) == len(pairs)
    for twins, original, twin in pairs:
        assert (original.question, original.options, original.family) == (twin.question, twin.options, twin.family)
        assert original.truth == twins.truth != twins.twin_truth == twin.truth
        assert original.pictures()[0].shape == twin.pictures()[0].shape


def test_twins_differ_in_what_is_claimed_alone(pairs: Sequence[tuple[Twins, Item, Item]]) -> None:
    checked: Counter[str] = Counter()
    for twins, original, twin in pairs:
        (before,), (after,) = original.pictures(), twin.pictures()
        (kind,) = {type(edit) for edit in twins.twin_edits}
        checked[kind.__name__] += 1
        if kind is Mirror:
            assert after.tobytes() == before[:, ::-1].tobytes()
        elif kind is Negative:
            assert after.tobytes() == (255 - before).tobytes()
        elif kind is Hue:
            was, now = (np.array(Image.fromarray(each).convert("HSV"))[..., 1:].astype(int) for each in (before, after))
            assert np.abs(was - now).mean() < 3 and _changed(before, after).mean() > 0.05
        elif kind is Paste:
            beneath = np.zeros(before.shape[:2], bool)
            for edit in (*twins.edits, *twins.twin_edits):
                assert isinstance(edit, Paste)
                left, top, right, bottom = edit.onto
                beneath[top:bottom, left:right] = True
            changed = _changed(before, after)
            assert changed.any() and not changed[~beneath].any(), original.id
        else:
            words = [edit.text for edit in (*twins.edits, *twins.twin_edits) if isinstance(edit, Write)]
            assert kind is Write and [twins.truth in words[0], twins.twin_truth in words[1]] == [True, True]
            assert 0 < _changed(before, after).mean() < 0.06
    assert checked == {"Mirror": 10, "Hue": 7, "Negative": 3, "Paste": 30, "Write": 10}


def _changed(before: RGB, after: RGB) -> np.ndarray:
    return (before != after).any(-1)


def test_parts_that_are_pasted_lie_in_their_pictures(real: Real) -> None:
    def lies_in(box: Box, picture: str) -> bool:
        height, width = real._load(picture).shape[:2]
        left, top, right, bottom = box
        return 0 <= left < right <= width and 0 <= top < bottom <= height

    for twins in _all_twins():
        for edit in (*twins.edits, *twins.twin_edits):
            if isinstance(edit, Paste):
                assert lies_in(edit.part, edit.of) and lies_in(edit.onto, twins.picture), twins.question


def test_truths_stand_at_every_place_as_often(real: Real) -> None:
    for seed in range(3):
        items = real.items(None, seed)
        assert len({tuple(item.options) for item in items}) > 20
        for size in (2, 4):
            places = Counter(item.options.index(item.truth) for item in items if len(item.options) == size)
            assert set(places) == set(range(size)) and max(places.values()) - min(places.values()) <= 2
    some = real.items(7, 0)
    assert [item.id for item in some] == [item.id for item in real.items(None, 0)][:6]
    assert [item.facts["twins"] for item in some[::2]] == [item.facts["twins"] for item in some[1::2]]


class Habit:
    """Knows what is usual: takes the same option of a question, whatever the picture shows."""

    name, is_general = "habit", True
    prompts: Mapping[str, str] = {}

    def describe(self) -> dict[str, Any]:
        return {"model": self.name}

    def score(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        texts = dict(line.split(". ", 1) for line in question.splitlines() if line[1:3] == ". ")
        usual = min(options, key=lambda letter: texts[letter])
        return Scored({option: float(option == usual) for option in options}, 1.0)

    def generate(self, pictures: Any, question: str, max_new_tokens: int, schema: Any = None) -> str:
        raise AssertionError


def test_a_habit_is_told_from_sight(real: Real) -> None:
    habit = summarize(real, evaluate(real, Habit(), Selection(60, blind=False)))
    assert habit.figures["both twins right"] == 0 and habit.figures["twins answered alike"] == 1
    assert habit.total.accuracy <= 0.5 and habit.verdict.endswith("; both twins right 0%, answered alike 100%")
    seen = summarize(real, [ask(real, Oracle(real, [item]), item, blind=True) for item in real.items(36, 0)])
    assert (seen.figures["both twins right"], seen.figures["twins answered alike"]) == (1, 0)
    assert {f"both twins right, {kind}" for kind in KINDS} < set(seen.figures)
    assert seen.total.blind == pytest.approx(seen.total.chance)  # of grey it says the first, whatever the order


def test_without_its_pictures_the_suite_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    refused = cli("eval", "-m", "panel", "--suite", "real", *FAST)
    assert refused.exit_code == 1 and "pip install 'edgevlm[eval]'" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    monkeypatch.delitem(sys.modules, "skimage")
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    suite = make_suite("real")
    with pytest.raises(OptionError, match=r"is missing or another picture; install scikit-image.*edgevlm\[eval\]"):
        suite.items(None, 0)[0].pictures()


def test_the_bundled_model_is_refused(real: Real) -> None:
    refused = cli("eval", "-m", "panel", "--suite", "real", *FAST)
    assert refused.exit_code == 1 and "the suite real needs a general model" in refused.stderr
