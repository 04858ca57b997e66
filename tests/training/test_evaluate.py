"""How answers are judged."""

from __future__ import annotations

import pytest

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
