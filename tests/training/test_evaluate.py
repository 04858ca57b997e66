"""How answers are judged."""

from __future__ import annotations

import numpy as np
import pytest

from training import grounds, real
from training.evaluate import Score, judge
from training.scene import QA


@pytest.mark.parametrize(
    ("wanted", "tolerance", "answer", "right"),
    [
        ("42.7", None, "42.7", True),
        ("42.7", None, "42.70", False),
        ("42", 2.0, "43.9", True),
        ("42", 2.0, "44.1", False),
        ("-3.0", 0.5, "3.0", False),
        ("42", 2.0, "about", False),
        ("x 10, y 20", 6.0, "x 15, y 15", True),
        ("x 10, y 20", 6.0, "x 15", False),
        ("a gauge from 0 to 10, reading 5", 0.2, "a gauge from 0 to 10, reading 5.1", True),
        ("a gauge from 0 to 10, reading 5", 0.2, "a chart from 0 to 10, reading 5", False),
    ],
)
def test_answers_are_judged(wanted: str, tolerance: float | None, answer: str, right: bool) -> None:
    assert judge(QA("task", "What?", wanted, tolerance), answer) is right


def test_the_interval_is_wilsons() -> None:
    low, high = Score("task", 8, 10).interval
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # a textbook's example


@pytest.mark.parametrize("name", real.ALL)
def test_a_real_photograph_is_there_and_training_does_not_draw_against_it(name: str) -> None:
    photograph = real.ALL[name]
    pytest.importorskip(photograph.package)
    assert photograph.file not in grounds.SCIKIT_IMAGE
    scene = real.scene(name)
    assert scene.image.mode == "RGB" and scene.pairs == [*photograph.pairs]


def test_each_part_of_the_coins_holds_as_many_as_the_answer_says() -> None:
    pytest.importorskip("skimage")
    from skimage import filters, measure, morphology

    pixels = np.asarray(real.scene("all coins").image.convert("L"), float)
    brighter = morphology.closing(pixels - filters.gaussian(pixels, 30) > 12, morphology.disk(3))
    coins = [each.bbox for each in measure.regionprops(measure.label(brighter)) if each.area > 300]
    assert len(coins) == 24
    for (left, top, right, bottom), number in real.COINS.items():
        found = [box for box in coins if box[0] < bottom and box[1] < right and box[2] > top and box[3] > left]
        whole = [box for box in found if box[0] >= top and box[1] >= left and box[2] <= bottom and box[3] <= right]
        assert len(found) == number
        assert len(whole) == number or right == 384  # the picture's own edge
