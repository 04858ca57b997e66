"""Pictures are what their answers say."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training import second
from training.data import MARKS, TAUGHT, Drawer, collate, marked_patches
from training.degrade import tilt
from training.draw import FAMILIES, MORE_FAMILIES, Pen, font_files, more_fonts
from training.evaluate import held_out, judge
from training.gaze import MOST, cell_of, gazes
from training.model import SIDE
from training.scene import QA, Mark, Scene
from training.scenes import SCENES, charts, counting, gauges, pages
from training.scenes.things import PARTS, SHAPES, Finish, Thing, draw, plural


@pytest.mark.parametrize("name", SCENES)
def test_a_scene_is_its_seeds_alone(name: str) -> None:
    first, again, other = (SCENES[name](np.random.default_rng((5, seed))) for seed in (1, 1, 2))
    assert np.array_equal(first.image, again.image)
    assert first.pairs == again.pairs
    assert first.image.size != other.image.size or not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("name", SCENES)
def test_every_scene_asks_and_answers(name: str) -> None:
    for seed in range(60):
        scene = SCENES[name](np.random.default_rng((6, seed)))
        assert scene.pairs
        assert 1 <= len(scene.pairs) <= 8
        assert all(pair.question.endswith(("?", ".")) and pair.answer.strip() == pair.answer for pair in scene.pairs)
        assert all(judge(pair, pair.answer) for pair in scene.pairs)
        if name == "count":
            assert 0 <= int(scene.pairs[0].answer) <= 12


def test_presence_questions_are_answered_no_often_enough() -> None:
    answers = [
        pair.answer
        for name in ("light", "count", "shape")
        for seed in range(120)
        for pair in SCENES[name](np.random.default_rng((7, seed))).pairs
        if pair.task == "presence"
    ]
    assert 0.3 < answers.count("no") / len(answers) < 0.8


def test_a_sheet_is_full_of_marks(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=13, sheets=True)
    counts = [len(marked_patches(drawer.scene(index))) for index in range(12)]
    assert min(counts) > 15
    assert sum(counts) / 12 > 50


def test_marks_move_with_the_picture() -> None:
    for seed in range(20):
        image = Image.new("RGB", (300, 200), "black")
        ImageDraw.Draw(image).ellipse((216, 46, 224, 54), fill="white")
        scene = Scene(image, [Mark(220, 50, "circle", 0.4)])
        tilt(scene, np.random.default_rng(seed), 1.0)
        ys, xs = np.nonzero(np.asarray(scene.image.convert("L")) > 128)
        [mark] = scene.marks
        assert (mark.x, mark.y) == pytest.approx((xs.mean(), ys.mean()), abs=1.5)
        assert (mark.name, mark.share) == ("circle", 0.4)


def test_marks_are_named_patches_of_the_small_picture() -> None:
    marks = [Mark(299, 0, "A"), Mark(10, 199, "needle"), Mark(301, 5, "A"), Mark(5, -1, "A"), Mark(5, 5, "€")]
    scene = Scene(Image.new("RGB", (300, 200)), marks)
    assert marked_patches(scene) == [(SIDE - 1, MARKS.index("A")), (SIDE * (SIDE - 1), MARKS.index("needle"))]


@pytest.mark.parametrize("varied", [0.0, 1.0])
def test_a_gauge_s_hub_tells_its_reading(varied: float) -> None:
    for seed in range(20):
        scene = gauges.scene(np.random.default_rng(seed), varied=varied)
        [(hub, share)] = [(mark, mark.share) for mark in scene.marks if mark.name == "hub"]
        [scale] = [mark.name for mark in scene.marks if ".." in mark.name and (mark.x, mark.y) == (hub.x, hub.y)]
        assert scale in MARKS
        low, high = map(int, scale.split(".."))
        assert share is not None
        assert low + share * (high - low) == pytest.approx(float(scene.pairs[0].answer), abs=0.011 * (high - low))


def test_each_of_several_gauges_is_asked_for_what_it_reads() -> None:
    for seed in range(12):
        scene = pages.dials(np.random.default_rng((20, seed)))
        hubs = [index for index, mark in enumerate(scene.marks) if mark.name == "hub"]
        assert [max(pair.about) for pair in scene.pairs] == hubs
        for pair, hub in zip(scene.pairs, hubs, strict=True):
            here = [mark for mark in scene.marks if (mark.x, mark.y) == (scene.marks[hub].x, scene.marks[hub].y)]
            low, high = map(int, pair.scale.split(".."))
            assert pair.scale in {mark.name for mark in here}
            assert pair.share == scene.marks[hub].share == scene.marks[min(pair.about)].share
            assert pair.share is not None
            assert low + pair.share * (high - low) == pytest.approx(float(pair.answer), abs=0.011 * (high - low))
            [looked] = gazes(scene, pair, [(0, 1)], SIDE)
            assert looked
            assert looked <= {cell_of(scene, scene.marks[index], SIDE) for index in pair.about}
        assert len({re.sub(r"row (.), column (.)|\D", r"\1\2", pair.question) for pair in scene.pairs}) == len(hubs)


@pytest.mark.parametrize("module", [gauges, charts, counting])
def test_what_is_varied_is_drawn_in_other_ways_and_whole(module: ModuleType) -> None:
    plain, varied = ([module.scene(np.random.default_rng(seed), varied=v) for seed in range(30)] for v in (0.0, 1.0))
    again = [module.scene(np.random.default_rng(seed)) for seed in range(30)]
    assert all(np.array_equal(one.image, two.image) for one, two in zip(plain, again, strict=True))
    assert not any(np.array_equal(one.image, two.image) for one, two in zip(plain, varied, strict=True))
    for scene in varied:
        width, height = scene.image.size
        told = [mark for mark in scene.marks if len(mark.name) > 1]
        assert all(0 <= mark.x < width and 0 <= mark.y < height for mark in told)


def test_a_thing_hides_what_lies_under_it() -> None:
    for kind in (*SHAPES, *PARTS):
        thing = Thing(kind, "red", 60, 60, 40)
        drawn = []
        for finish in (None, Finish((0.3, 0.3), 1.0, (0, 0, 255))):
            image = Image.new("RGB", (120, 120), (250, 250, 250))
            pen = Pen(image)
            draw(np.random.default_rng(8), pen, thing, (200, 0, 0), (250, 250, 250), finish)
            assert [mark.name for mark in pen.marks] == [kind, "red"]
            drawn.append(np.asarray(image))
        bare, finished = drawn
        red, blue = (bare == (200, 0, 0)).all(-1), (finished == (0, 0, 255)).all(-1)
        assert (finished[red] == (200, 0, 0)).all()
        assert blue.sum() > 50


@pytest.mark.parametrize("varied", [0.0, 1.0])
def test_a_bar_s_name_tells_its_value_and_whether_it_is_the_highest(varied: float) -> None:
    drawn = [charts.scene(np.random.default_rng(seed), varied) for seed in range(40)]
    barred = [scene for scene in drawn if any(mark.name == "bar" for mark in scene.marks)]
    assert len(barred) > 10
    for scene in barred:
        described = scene.pairs[-1].answer
        bars = [mark for mark in scene.marks if mark.name == "bar"]
        values = [int(word) for word in re.findall(r" (\d+)", described)]
        scale = {int(mark.name[3:]) for mark in scene.marks if mark.name.startswith("0..")}
        assert [round(mark.share * scale.copy().pop()) for mark in bars if mark.share is not None] == values
        asked = scene.pairs[0]
        spans = [(index, index + 1) for index in range(len(asked.answer))]
        [highest] = [mark for mark in scene.marks if mark.name == "highest" and mark.y == bars[0].y]
        side = 12
        row, column = int(highest.y / scene.image.height * side), int(highest.x / scene.image.width * side)
        looked = frozenset[int]().union(*gazes(scene, asked, spans, side))
        assert any(abs(row - place // side) <= 1 and abs(column - place % side) <= 2 for place in looked)


def test_of_a_point_each_number_tells_its_own_coordinate(tokenizer: object) -> None:
    pair = QA("point", "At which point is the star, in percent?", "x 20, y 65", 6.0)
    batch = collate([Drawer(tokenizer, seed=12).row(Scene(Image.new("RGB", (180, 180)), [], [pair]))])
    told = dict.fromkeys((0.2, 0.65), "")
    for _, position, share, _ in batch.readings:
        told[share] += tokenizer.decode([batch.labels[0, int(position)]])  # type: ignore[attr-defined]
    assert "20" in told[0.2]
    assert "65" in told[0.65]


def test_each_counted_thing_tells_how_many_there_are() -> None:
    scenes = [TAUGHT["count"](np.random.default_rng((18, seed))) for seed in range(30)]
    for scene in scenes:
        kinds = [mark.name for mark in scene.marks if mark.share is not None]
        assert all(round(m.share * MOST) == kinds.count(m.name) for m in scene.marks if m.share is not None)
        for pair in scene.pairs:
            if pair.about:
                assert len(pair.about) == len(kinds) == int(pair.answer)
            elif pair.task == "count":
                assert sum(plural(kind) in pair.question for kind in kinds) == int(pair.answer)


def test_held_out_pictures_keep_to_their_own_fonts(tokenizer: object) -> None:
    before = held_out("label", 0).image.tobytes()
    Drawer(tokenizer, seed=12).scene(0, "label")
    assert held_out("label", 0).image.tobytes() == before
    assert {path.parent.name for path in font_files()} <= set(FAMILIES)
    with more_fonts():
        assert set(font_files()) >= set(font_files(FAMILIES))
        assert font_files() == font_files(FAMILIES + MORE_FAMILIES)
    assert not set(FAMILIES + MORE_FAMILIES) & set(second.FAMILIES)


def test_needles_to_learn_from_stand_anywhere() -> None:
    def on_numbers(draw: Callable[[np.random.Generator], Scene]) -> int:
        scenes = [draw(np.random.default_rng((13, seed))) for seed in range(150)]
        scales = [(low, high, step) for low, high, step in gauges.SCALES]
        shares = [pair.share for scene in scenes for pair in scene.pairs if pair.share is not None]
        ticks = {round(tick / ((high - low) / step), 9) for low, high, step in scales for tick in range(51)}
        return sum(round(share, 9) in ticks for share in shares)

    assert on_numbers(SCENES["gauge"]) > 15
    assert on_numbers(TAUGHT["gauge"]) == 0


def test_several_lamps_are_lit_in_more_of_the_lights_to_learn_from() -> None:
    def lamps(draw: Callable[[np.random.Generator], Scene]) -> list[int]:
        scenes = [draw(np.random.default_rng((16, seed))) for seed in range(200)]
        lists = [pair.answer for scene in scenes for pair in scene.pairs if pair.question.startswith("Which stack")]
        return [0 if listed == "none" else len(re.findall(r"[a-z]{3,}", listed.replace("and", ""))) for listed in lists]

    held_out, taught = lamps(SCENES["light"]), lamps(TAUGHT["light"])
    assert max(held_out) == 2
    assert max(taught) > 2
    assert sum(many > 1 for many in taught) > 1.5 * sum(many > 1 for many in held_out)
