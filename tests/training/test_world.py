"""The wider world: what stands before a ground is where its marks say, and what is not there is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from training import third, world
from training.data import KIND_OF, TAUGHT, Drawer
from training.draw import Pen, canvas
from training.gaze import asked_words
from training.scene import QA, Random, Scene
from training.wording import worded
from training.world import NOT_VISIBLE

RED = (255, 0, 0)


def dot(random: Random) -> Scene:
    """A red dot on nothing, marked."""
    image, pen, _ = canvas(random)
    x, y = image.width * 0.3, image.height * 0.6
    pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=RED)
    pen.mark(x, y, "red", "circle")
    return Scene(image, pen.marks)


@pytest.mark.parametrize("card", [True, False])
def test_marks_move_with_what_they_mark(card: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(world.ON_CARDS, "dot", float(card))
    monkeypatch.setattr(world, "_dimmed", lambda image, _: image)
    monkeypatch.setattr(world, "_reflect", lambda *_: None)
    for seed in range(30):
        scene = world.before_anything(dot, "dot", np.random.default_rng(seed))
        mark = scene.marks[0]
        if not (0 <= mark.x < scene.image.width and 0 <= mark.y < scene.image.height):
            continue  # a device may reach over the picture's edge
        pixel = scene.image.getpixel((int(mark.x), int(mark.y)))
        assert isinstance(pixel, tuple) and pixel[0] > 150 and max(pixel[1:]) < 90


def test_a_scene_is_opaque_where_it_is_drawn_and_nowhere_else() -> None:
    scene, opacity = world._cut_out(dot, (90, 90, 90), np.random.default_rng(0), False)
    clear = np.asarray(opacity)
    assert set(np.unique(clear)) == {0, 255}
    assert (np.asarray(scene.image)[clear == 255] == RED).all()
    assert 0.5 < (clear == 255).sum() / (np.pi * 9**2) < 1.5


def test_a_lamps_halo_lets_the_ground_through() -> None:
    towers = partial(world._cut_out, TAUGHT["tower"], (90, 90, 90))
    seen = [np.asarray(towers(np.random.default_rng(seed), False)[1]) for seed in range(12)]
    assert any(((each > 20) & (each < 235)).mean() > 0.01 for each in seen)
    assert all((each == 0).any() for each in seen)


def test_nothing_that_tells_a_place_is_asked_of_what_was_moved() -> None:
    for seed in range(60):
        scene = world.before_anything(TAUGHT["shape"], "shape", np.random.default_rng(seed))
        assert scene.pairs
        for pair in scene.pairs:
            assert pair.task != "point" and " x " not in f" {pair.answer}" and "top" not in pair.answer


def test_what_is_not_there_is_refused() -> None:
    for seed in range(20):
        scene = world.nothing(np.random.default_rng(seed))
        assert {(pair.task, pair.answer) for pair in scene.pairs} == {("refusal", NOT_VISIBLE)}
    for kind in TAUGHT:
        random = np.random.default_rng(5)
        scene = Scene(Image.new("RGB", (9, 9)))
        world.refuse(scene, KIND_OF.get(kind, kind), random)
        own = world.ASKED.get(KIND_OF.get(kind, kind), ())
        assert scene.pairs[0].answer == NOT_VISIBLE and scene.pairs[0].question not in own


def test_a_wording_asks_the_same() -> None:
    random = np.random.default_rng(1)
    pairs = [
        QA("count", "How many screws are there?", "3"),
        QA("presence", "Is the green light on?", "yes"),
        QA("light", "Which stack light is on?", "green"),
        QA("presence", "Is there a red star?", "no"),
        QA("chart", "What is the value of Mon?", "7"),
    ]
    for pair in pairs:
        said = {worded(pair, random).wording for _ in range(200)}
        assert len(said) > 3
        assert all(each in {"", pair.question} or pair.question != each for each in said)
    counted = {worded(pairs[0], random).wording.lower() for _ in range(300)} - {""}
    assert all("screws" in each or "bolts" in each for each in counted)
    lamps = {worded(pairs[1], random).wording.lower() for _ in range(300)} - {""}
    assert all("green" in each for each in lamps)
    assert asked_words("how many bolts?", [(0, 3), (4, 8), (9, 14)]) == []


def test_a_row_reads_the_wording_and_the_gaze_the_question(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=5)
    pen = Pen(Image.new("RGB", (200, 200)))
    pen.mark(20, 30, "green", "on")
    pair = QA("presence", "Is the green light on?", "yes", wording="Does the green one glow?")
    row = drawer.row(Scene(Image.new("RGB", (200, 200)), pen.marks, [pair]))
    text = tokenizer.decode(row[1])  # type: ignore[attr-defined]
    assert "Does the green one glow?" in text and "light on" not in text
    assert row[7], "the gaze finds the lamp by the question's own words"


def test_the_third_renderer_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(third, "FOLDERS", (tmp_path,))
    third.photographs.cache_clear()
    try:
        with pytest.raises(click.UsageError, match="lomiri-wallpapers"):
            third.photographs()
    finally:
        third.photographs.cache_clear()
