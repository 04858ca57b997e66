"""What the default model learns from: pictures that are what their answers say, rows that train as single questions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from tests.conftest import heed_interrupts
from tests.serving import wait_until
from training import attention, second
from training.__main__ import main
from training.average import average
from training.data import IGNORED, MARKS, SCALES, TAUGHT, Drawer, collate, marked_patches, shrink
from training.deepen import deepen
from training.degrade import tilt
from training.draw import FAMILIES, MORE_FAMILIES, Pen, font_files, more_fonts
from training.enlarge import enlarge
from training.evaluate import Score, held_out, judge
from training.feed import LAG, _draw, _start_worker, batches, order
from training.forms import formed
from training.gaze import MOST, SINK, SINK_WEIGHT, asked_words, cell_of, counted, gazes
from training.guide import GUIDE, STEPS, Gaze, Guide, _misread
from training.model import IMAGE_SIZE, IMAGE_TOKENS, PATCH, SIDE, load_model, make_config, make_model, save_checkpoint
from training.muon import Muon
from training.scene import QA, Mark, Scene
from training.scenes import SCENES, charts, counting, gauges, lights, pages
from training.scenes.things import PARTS, SHAPES, Finish, Thing, draw, plural
from training.settings import Settings
from training.tokenizer import train_tokenizer
from training.train import Run, attention_mask, load_tokenizer, loss_of, rate_at, train


@pytest.fixture(scope="module", autouse=True)
def fonts() -> None:
    """Skip where the fonts that the pictures are written in are not installed."""
    try:
        font_files()
    except SystemExit as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def tokenizer() -> object:
    """The tokenizer, trained for these tests."""
    return train_tokenizer(seed=3)


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


def test_text_survives_the_tokenizer(tokenizer: object) -> None:
    for text in ("-42.7 °C", "LOT 7C-1184-B", "row 2, column 5", "red, green and blue"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        assert tokenizer.decode(ids) == text  # type: ignore[attr-defined]
    digits = tokenizer("1184", add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    assert len(digits) == 4


def test_a_row_trains_each_question_as_if_it_stood_alone(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=8)
    scenes = (drawer.scene(index) for index in range(100))
    scene = next(each for each in scenes if 3 <= len(each.pairs) == max(drawer.row(each)[4]))  # none of them left out
    model = make_model(make_config(tokenizer, 64, 1, 2), seed=2).eval()
    packed, _ = loss_of(model, collate([drawer.row(scene)]), "cpu")
    pixels = torch.from_numpy(shrink(scene.image).copy()).permute(2, 0, 1)[None, None].float() / 127.5 - 1
    total, count = 0.0, 0
    for pair in scene.pairs:
        prompt = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
        head = tokenizer(f"<|user|>{prompt}{pair.question}<|end|><|assistant|>")["input_ids"]  # type: ignore[operator]
        tail = tokenizer(f"{pair.answer}<|end|>")["input_ids"]  # type: ignore[operator]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.tensor([head + tail]), pixel_values=pixels).logits[0].float()
        wanted = logits[len(head) - 1 : -1].log_softmax(-1)
        total -= float(wanted[range(len(tail)), tail].sum())
        count += len(tail)
    assert float(packed.detach()) == pytest.approx(total / count, rel=0.02)


def test_a_question_that_follows_sees_the_one_before_it_and_its_answer(tokenizer: object) -> None:
    first, second, third = (
        QA("display", "Read the display.", "42"),
        QA("count", "How many displays are there?", "1", follows=True),
        QA("display", "What is shown?", "42"),
    )
    scene = Scene(Image.new("RGB", (180, 180)), [], [first, second, third])
    batch = collate([Drawer(tokenizer, seed=8).row(scene)])
    seen = attention_mask(torch.from_numpy(batch.segments))[0, 0].numpy()
    block = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
    for pairs in ([first], [first, second], [third]):
        said = [turn for pair in pairs for turn in (("user", pair.question), ("assistant", pair.answer))][:-1]
        said[0] = ("user", block + said[0][1])
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
        wanted = tokenizer(prompt)["input_ids"]  # type: ignore[operator]
        answers = [place for place in range(len(seen)) if batch.input_ids[0, seen[place]].tolist() == wanted]
        assert len(answers) == 1  # where the answer begins
        assert batch.positions[0, seen[answers[0]]].tolist() == list(range(len(wanted)))
        begun = [batch.labels[0, answers[0]]]
        assert tokenizer.decode(begun) == pairs[-1].answer[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("bf16", "near"), [(True, 1e-2), (False, 1e-5)])
def test_attention_gives_what_transformers_own_gives(tokenizer: object, bf16: bool, near: float) -> None:
    drawer = Drawer(tokenizer, seed=8)
    batch = collate([drawer.row(drawer.scene(index)) for index in range(4)])
    assert len(batch.counts)
    losses, grads = [], []
    for install in (lambda model: model.set_attn_implementation("eager"), attention.install):
        model = make_model(make_config(tokenizer, 64, 2, 3), seed=2)
        install(model)
        gaze = Gaze(model)
        loss, _ = loss_of(model, batch, "cpu", bf16)
        gazing = gaze.loss(batch)
        (loss + gazing).backward()
        losses.append((float(loss.detach()), float(gazing.detach())))
        grads.append({name: each.grad for name, each in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=near)
    for name, grad in grads[0].items():
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), grads[1][name].flatten(), 0)
        assert name.endswith("k_proj.bias") or float(cosine) > 1 - near, name  # which is zero, but for rounding


def test_labels_are_the_answers_and_nothing_else(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=9)
    scene = drawer.scene(4)
    _, _, labels, _, segments, *_ = drawer.row(scene)
    for number, pair in enumerate(scene.pairs, 1):
        ids = [label for label, segment in zip(labels, segments, strict=True) if segment == number and label != IGNORED]
        assert tokenizer.decode(ids) == f"{pair.answer}<|end|>"  # type: ignore[attr-defined]


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = Settings(
        tmp_path / "run", pictures=24, batch=4, width=64, vision_layers=1, text_layers=1, stop_minutes=0
    )
    for _ in range(6):
        train(settings)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["counts"] == {"pictures": 24}
    whole = Settings(tmp_path / "whole", pictures=24, batch=4, width=64, vision_layers=1, text_layers=1)
    train(whole)
    once = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)
    for name, weight in once["model"].items():
        torch.testing.assert_close(state["model"][name], weight, rtol=1e-2, atol=1e-3)
    assert (tmp_path / "whole" / "checkpoint" / "model.safetensors").is_file()
    going_on = replace(whole, folder=tmp_path / "next", start=tmp_path / "whole" / "checkpoint")
    run = Run(going_on, load_tokenizer(going_on), "pictures")
    for layer, weights in run.guide.state_dict().items():
        for name, weight in weights.items():
            assert weight.any()
            torch.testing.assert_close(weight, once["guide"][layer][name].bfloat16().float())


def test_each_batch_is_learned_from_again_after_others() -> None:
    assert list(islice(order(2), LAG + 4)) == [*range(LAG), LAG, 0, LAG + 1, 1]
    assert list(islice(order(3), 3 * LAG, 3 * LAG + 3)) == [2 * LAG, LAG, 0]


def test_what_is_learned_from_again_is_the_same_after_a_stop(tokenizer: object, tmp_path: Path) -> None:
    settings = Settings(tmp_path, pictures=2 * (LAG + 6), batch=2, seed=4)
    whole = [[half.pixels for half in batch] for batch in batches(settings, tokenizer, 0)]
    assert all(np.array_equal(*pair) for pair in zip(whole[0], whole[LAG + 1], strict=True))
    assert len(whole) == LAG + 6
    rest = [[half.pixels for half in batch] for batch in batches(settings, tokenizer, 2 * (LAG + 3))]
    assert len(rest) == 3
    for one, two in zip(rest, whole[-3:], strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one, two, strict=True))


@pytest.mark.skipif(os.name == "nt", reason="there is no group of processes to interrupt")
def test_ctrl_c_saves_what_was_learned(tmp_path: Path) -> None:
    small = "pictures=10**6, batch=4, warmup=1, width=64, vision_layers=1, text_layers=1, workers=2"
    code = (
        "from pathlib import Path; from training.settings import Settings; from training.train import train\n"
        f"if __name__ == '__main__': train(Settings(Path({str(tmp_path / 'run')!r}), {small}, save_minutes=1e-3))"
    )
    script = tmp_path / "run.py"
    script.write_text(code, encoding="utf-8")
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, script],
        start_new_session=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509
        env=environment,
        stderr=subprocess.PIPE,
    ) as run:
        state = tmp_path / "run" / "state.pt"
        try:
            wait_until(state.is_file, 300)  # a tokenizer is trained before
            state.unlink()  # another comes at once, and the last one with the interrupt
            os.killpg(run.pid, signal.SIGINT)
            _, errors = run.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # what hangs fails, and does not hang the tests
    assert b"KeyboardInterrupt" in errors
    assert torch.load(state, weights_only=True)["counts"]["pictures"] > 0


def test_sheets_teach_the_tower_and_leave_the_text_part_alone(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "run", pictures=8, batch=4, warmup=1, width=64, vision_layers=1, text_layers=1)
    tokenizer = load_tokenizer(settings)
    before = Run(settings, tokenizer, "sheets").model.state_dict()
    train(settings, sheets=True)
    run = Run(settings, tokenizer, "sheets")
    assert run.seen == 8
    assert Run(settings, tokenizer, "pictures").seen == 0
    changed = {name for name, weight in run.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all("vision_model" in name for name in changed)


def test_a_sheet_is_full_of_marks(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=13, sheets=True)
    counts = [len(marked_patches(drawer.scene(index))) for index in range(12)]
    assert min(counts) > 15
    assert sum(counts) / 12 > 50


def test_batches_come_in_order_whatever_the_workers(tokenizer: object, tmp_path: Path) -> None:
    def pixels(workers: int) -> Iterator[np.ndarray]:
        settings = Settings(tmp_path, pictures=12, batch=4, workers=workers, seed=4)
        return (half.pixels for batch in batches(settings, tokenizer, 0) for half in batch)

    for one, two in zip(pixels(1), pixels(2), strict=True):
        assert np.array_equal(one, two)


def test_the_rate_warms_up_stays_and_falls() -> None:
    settings = Settings(Path(), pictures=1000, warmup=100, decay=0.2)
    assert [round(rate_at(seen, settings), 3) for seen in (0, 50, 100, 500, 800, 900, 1000)] == [
        0,
        0.5,
        1,
        1,
        1,
        0.5,
        0,
    ]


def test_a_run_bounded_in_time_falls_by_the_clock(tmp_path: Path) -> None:
    settings = Settings(Path(), pictures=1000, warmup=100, decay=0.2, minutes=10)
    assert [round(rate_at(500, settings, minutes), 3) for minutes in (0, 8, 9, 10, 11)] == [1, 1, 0.5, 0, 0]
    assert rate_at(900, settings, 1) == pytest.approx(0.5)
    small: dict[str, Any] = {"batch": 4, "width": 64, "vision_layers": 1, "text_layers": 1, "warmup": 1}
    train(Settings(tmp_path / "run", pictures=10**6, minutes=1e-3, **small))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert 4 <= state["counts"]["pictures"] < 10**6
    assert state["minutes"]["pictures"] > 1e-3
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()
    settings = Settings(tmp_path / "run", pictures=10**6, **small)
    assert Run(settings, load_tokenizer(settings), "pictures").minutes == state["minutes"]["pictures"]
    assert Run(settings, load_tokenizer(settings), "sheets").minutes == 0  # another stage has its own time


@pytest.mark.parametrize("option", ["--minutes", "--warmup", "--pictures", "--decay"])
def test_a_run_of_no_length_is_refused_in_a_line(option: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["train", str(tmp_path / "run"), option, "0"])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_matrices_of_one_shape_move_as_torch_s_muon_moves_them_one_by_one() -> None:
    random = torch.Generator().manual_seed(5)
    shapes = [(48, 48), (48, 48), (96, 32), (32, 96), (96, 32)]
    begun = [torch.randn(shape, generator=random) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(each.clone()) for each in begun] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.01, "momentum": 0.95}
    optimisers = [Muon(ours, **settings), torch.optim.Muon(theirs, **settings)]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn(one.shape, generator=random)
        for optimiser in optimisers:
            optimiser.step()
    for before, one, other in zip(begun, ours, theirs, strict=True):
        assert float((one.detach() - before).norm()) > 0.05
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_pictures_for_a_gpu_come_in_shared_memory(tokenizer: object, tmp_path: Path) -> None:
    settings = Settings(tmp_path, pictures=4, batch=4, seed=4)
    with torch.multiprocessing.get_context("spawn").Pool(1, _start_worker, (tokenizer, settings, False, True)) as pool:
        drawn = pool.apply(_draw, (0,))
    [plain] = batches(settings, tokenizer, 0)
    for one, other in zip(drawn, plain, strict=True):
        assert one.pixels.is_shared()
        assert np.array_equal(one.pixels.numpy(), other.pixels)
        assert np.array_equal(one.labels, other.labels)


def test_the_runtime_sees_the_pixels_that_were_trained_on(tokenizer: object, tmp_path: Path) -> None:
    from edgevlm.families.base import ImageBudget
    from edgevlm.families.idefics3 import Idefics3
    from edgevlm_export.families import family_config
    from edgevlm_export.source.checkpoint import open_checkpoint

    save_checkpoint(make_model(make_config(tokenizer, 64, 1, 1), seed=1), tokenizer, tmp_path / "panel")
    family = Idefics3(family_config(open_checkpoint(tmp_path / "panel"))[0])
    for index in range(6):
        image = Drawer(tokenizer, seed=11).scene(index).image
        tiles = family.preprocess(np.asarray(image), ImageBudget("auto"))
        assert len(tiles) == 1
        trained = shrink(image).astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(tiles.views[0].inputs()["pixel_values"][0], trained.transpose(2, 0, 1), atol=1e-6)
    assert family.tokens_per_view == IMAGE_TOKENS
    assert family.view_size == (IMAGE_SIZE, IMAGE_SIZE)


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


def test_the_guide_scores_the_shares_at_their_patches(tokenizer: object) -> None:
    model = make_model(make_config(tokenizer, 64, 1, 1), seed=1)
    guide = Guide(model, "cpu")
    middle = 1.5 * 180 / SIDE
    marks = [Mark(middle, middle, "hub", 0.25)]
    scene = Scene(Image.new("RGB", (180, 180)), marks, [QA("gauge", "Read the gauge.", "25")])
    batch = collate([Drawer(tokenizer, seed=12).row(scene)])
    assert batch.shares.tolist() == [[0, SIDE + 1, 0.25]]  # row 1, column 1
    losses = []
    for step, other in ((12, 13), (12, 12), (3, 3)):
        guide.share.bias.data.fill_(-30.0)[[step, other]] = 0.0
        loss_of(model, batch, "cpu")
        losses.append(float(guide.loss(batch)[1].detach()))
    least = losses[0] - np.log(2)  # 0.25 lies midway between two of fifty steps
    assert losses == pytest.approx([least + np.log(2), least + 15, least + 30], rel=1e-2)


def test_all_pictures_weigh_the_same_in_what_the_guide_asks_of_shares() -> None:
    layer = torch.nn.Linear(4, STEPS + 1)
    torch.nn.init.zeros_(layer.weight)
    layer.bias.data.fill_(-30.0)[STEPS] = 0.0
    wrong, right = (0, 0, 0.0), (1, 0, 1.0)
    one = _misread(layer, torch.zeros(2, 3, 4), np.array([wrong, right]))
    many = _misread(layer, torch.zeros(2, 3, 4), np.array([wrong, right, right, right, right]))
    assert float(one.detach()) == pytest.approx(15, rel=1e-3)
    assert float(many.detach()) == pytest.approx(15, rel=1e-3)


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
            if pair.task == "count":
                assert sum(plural(kind) in pair.question for kind in kinds) == int(pair.answer)


def test_fewer_descriptions_are_learned_from(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=19)

    def descriptions(draw: Callable[[int], Scene]) -> int:
        return sum(pair.task == "description" for index in range(150) for pair in draw(index).pairs)

    assert descriptions(drawer._shuffled) < 0.5 * descriptions(drawer.scene)


def test_held_out_pictures_keep_to_their_own_fonts(tokenizer: object) -> None:
    before = held_out("label", 0).image.tobytes()
    Drawer(tokenizer, seed=12).scene(0, "label")
    assert held_out("label", 0).image.tobytes() == before
    assert {path.parent.name for path in font_files()} <= set(FAMILIES)
    with more_fonts():
        assert set(font_files()) >= set(font_files(FAMILIES))
        assert font_files() == font_files(FAMILIES + MORE_FAMILIES)
    assert not set(FAMILIES + MORE_FAMILIES) & set(second.FAMILIES)


def test_the_guide_asks_the_text_part_for_what_a_reading_tells(tokenizer: object) -> None:
    model = make_model(make_config(tokenizer, 64, 1, 1), seed=1)
    guide = Guide(model, "cpu")
    pair = QA("gauge", "Read the gauge.", "25", 2.0, share=0.25)
    batch = collate([Drawer(tokenizer, seed=12).row(Scene(Image.new("RGB", (180, 180)), [], [pair]))])
    told = batch.readings[:, 1].astype(int)
    assert tokenizer.decode(batch.labels[0, told]) == "25"  # type: ignore[attr-defined]
    assert batch.readings[:, 2].tolist() == [0.25, 0.25]
    losses = []
    for step, other in ((12, 13), (3, 3)):
        guide.recall.bias.data.fill_(-30.0)[[step, other]] = 0.0
        loss_of(model, batch, "cpu")
        losses.append(guide.loss(batch)[1])
    assert float((losses[1] - losses[0]).detach()) == pytest.approx(30 - np.log(2), rel=1e-2)
    torch.nn.init.normal_(guide.recall.weight)
    loss_of(model, batch, "cpu")
    guide.loss(batch)[1].backward()
    assert model.model.text_model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_the_guide_asks_the_tower_and_the_text_part_for_the_scale(tokenizer: object) -> None:
    model = make_model(make_config(tokenizer, 64, 1, 1), seed=1)
    guide = Guide(model, "cpu")
    middle = 1.5 * 180 / SIDE
    pair = QA("gauge", "Read the gauge.", "25", 2.0, share=0.25, scale="0..100")
    scene = Scene(Image.new("RGB", (180, 180)), [Mark(middle, middle, "0..100", 0.25)], [pair])
    spike = QA("chart", "Where is the spike?", "25", 5.0, share=0.25)
    two_scales = Scene(scene.image, [*scene.marks, Mark(90, 90, "0..10", 0.1)], [spike])
    drawer = Drawer(tokenizer, seed=12)
    batch = collate([drawer.row(scene), drawer.row(two_scales)])
    hundred, ten = SCALES.index("0..100"), SCALES.index("0..10")
    assert batch.scales.tolist() == [
        [0, SIDE + 1, hundred],
        [1, SIDE + 1, hundred],
        [1, SIDE * SIDE // 2 + SIDE // 2, ten],
    ]
    assert batch.told_scales.tolist() == [[0, *batch.readings[place, 1:2], hundred] for place in (0, 1)]
    assert batch.readings[:, 3].tolist() == [hundred, hundred, -1, -1]
    batch = collate([drawer.row(scene)])
    for layer in (guide.scale, guide.recall_scale):
        layer.bias.data.fill_(0.0)
        layer.bias.data[hundred] = 20.0
    losses = []
    for wrong in (None, guide.scale, guide.recall_scale):
        if wrong is not None:
            wrong.bias.data[ten] = 50.0
        loss_of(model, batch, "cpu")
        losses.append(float(guide.loss(batch)[1].detach()))
    assert np.diff(losses) == pytest.approx([30, 30], rel=1e-3)


def test_a_guide_from_before_the_scales_is_taken(tokenizer: object, tmp_path: Path) -> None:
    model = make_model(make_config(tokenizer, 64, 1, 1), seed=1)
    guide = Guide(model, "cpu")
    guide.share.bias.data.fill_(3.0)
    guide.joint.bias.data[MARKS.index("0..60")] = 5.0
    guide.save(tmp_path / GUIDE)
    kept = {name: each for name, each in load_file(tmp_path / GUIDE).items() if "scale" not in name}
    save_file(kept, tmp_path / GUIDE)
    other = Guide(model, "cpu")
    other.load(tmp_path / GUIDE)
    assert (other.share.bias == 3.0).all()
    assert torch.nonzero(other.scale.bias > 0).tolist() == [[SCALES.index("0..60")]]


def test_needles_to_learn_from_stand_anywhere() -> None:
    def on_numbers(draw: Callable[[np.random.Generator], Scene]) -> int:
        scenes = [draw(np.random.default_rng((13, seed))) for seed in range(150)]
        scales = [(low, high, step) for low, high, step in gauges.SCALES]
        shares = [pair.share for scene in scenes for pair in scene.pairs if pair.share is not None]
        ticks = {round(tick / ((high - low) / step), 9) for low, high, step in scales for tick in range(51)}
        return sum(round(share, 9) in ticks for share in shares)

    assert on_numbers(SCENES["gauge"]) > 15
    assert on_numbers(TAUGHT["gauge"]) == 0


def test_larger_pictures_keep_what_was_learned_from_smaller_ones(tokenizer: object, tmp_path: Path) -> None:
    config = make_config(tokenizer, 64, 1, 1)
    config.vision_config.image_size = 8 * PATCH
    old = make_model(config, seed=1)
    places = old.model.vision_model.embeddings.position_embedding.weight
    rows, columns = torch.arange(8.0).repeat_interleave(8), torch.arange(8.0).repeat(8)
    places.data[:, 0], places.data[:, 1] = rows / 7, columns / 7
    save_checkpoint(old, tokenizer, tmp_path / "old" / "checkpoint")
    Guide(old, "cpu").save(tmp_path / "old" / GUIDE)
    enlarge(tmp_path / "old" / "checkpoint", tmp_path / "new" / "checkpoint")
    new = load_model(tmp_path / "new" / "checkpoint")
    moved = new.model.vision_model.embeddings.position_embedding.weight.detach().view(SIDE, SIDE, -1)
    edge = -(-3 * SIDE // 16)
    inside = slice(edge, -edge)  # at the borders there is nothing to interpolate with
    wanted = ((torch.arange(SIDE) + 0.5) * 8 / SIDE - 0.5) / 7
    assert torch.allclose(moved[inside, :, 0], wanted[inside, None].expand(-1, SIDE), atol=0.01)
    assert torch.allclose(moved[:, inside, 1], wanted[None, inside].expand(SIDE, -1), atol=0.01)
    kept = {name: weight for name, weight in new.state_dict().items() if "position_embedding" not in name}
    before = load_model(tmp_path / "old" / "checkpoint").state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in kept.items())
    Guide(new, "cpu").load(tmp_path / "new" / GUIDE)
    assert new.model.vision_model(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)).last_hidden_state.shape[1] == IMAGE_TOKENS


def test_a_deeper_model_begins_with_the_answers_of_the_one_it_is_made_from(tokenizer: object, tmp_path: Path) -> None:
    old = make_model(make_config(tokenizer, 64, 1, 3), seed=1)
    save_checkpoint(old, tokenizer, tmp_path / "old" / "checkpoint")
    Guide(old, "cpu").save(tmp_path / "old" / GUIDE)
    deepen(tmp_path / "old" / "checkpoint", tmp_path / "new" / "checkpoint", text_layers=5, vision_layers=2)
    before, after = (load_model(tmp_path / name / "checkpoint") for name in ("old", "new"))
    layers = after.model.text_model.layers
    assert (len(layers), len(after.model.vision_model.encoder.layers)) == (5, 2)
    drawer = Drawer(tokenizer, seed=12)
    batch = collate([drawer.row(drawer.scene(0))])
    losses = [loss_of(model, batch, "cpu", bf16=False)[0] for model in (before, after)]
    assert torch.equal(*losses)
    for index, source in enumerate((0, 1, 1, 2, 2)):
        kept = before.model.text_model.layers[source]
        assert torch.equal(layers[index].mlp.up_proj.weight, kept.mlp.up_proj.weight)
    losses[1].backward()
    assert all(layer.mlp.down_proj.weight.grad.any() for layer in layers)  # the new ones learn from the first step on
    assert load_file(tmp_path / "new" / GUIDE).keys() == load_file(tmp_path / "old" / GUIDE).keys()
    guide = (tmp_path / "old" / GUIDE).read_bytes()
    deepen(tmp_path / "old" / "checkpoint", tmp_path / "old" / "deeper", text_layers=4, vision_layers=1)
    assert (tmp_path / "old" / GUIDE).read_bytes() == guide  # which both now lie beside


@pytest.mark.parametrize("layers", [1, 5])
def test_a_model_is_not_made_shallower_nor_more_than_twice_as_deep(
    layers: int, tokenizer: object, tmp_path: Path
) -> None:
    save_checkpoint(make_model(make_config(tokenizer, 64, 1, 2), seed=1), tokenizer, tmp_path / "old" / "checkpoint")
    with pytest.raises(SystemExit, match=f"2 layers of text_model.layers cannot become {layers}"):
        deepen(tmp_path / "old" / "checkpoint", tmp_path / "new" / "checkpoint", text_layers=layers)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_mean_of_two_checkpoints_is_one(share: float, tokenizer: object, tmp_path: Path) -> None:
    models = [make_model(make_config(tokenizer, 64, 1, 1), seed) for seed in (1, 2)]
    for name, model in zip(("one", "other"), models, strict=True):
        save_checkpoint(model, tokenizer, tmp_path / name / "checkpoint")
        guide = Guide(model, "cpu")
        guide.share.bias.data.fill_(len(name))
        guide.scale.bias.data.fill_(7.0)
        guide.save(tmp_path / name / GUIDE)
    old = {name: each for name, each in load_file(tmp_path / "one" / GUIDE).items() if "scale" not in name}
    save_file(old, tmp_path / "one" / GUIDE)
    average(*(tmp_path / name / "checkpoint" for name in ("one", "other", "mean")), share)
    mean = load_model(tmp_path / "mean" / "checkpoint").state_dict()
    for name, weight in mean.items():
        first, last = (model.state_dict()[name].bfloat16().float() for model in models)
        torch.testing.assert_close(weight, first + share * (last - first), rtol=1e-2, atol=1e-6)
    guide = load_file(tmp_path / "mean" / GUIDE)
    assert (guide["share.bias"] == 3.0 + share * 2.0).all()
    assert (guide["scale.bias"] == 7.0).all()


def test_the_guide_scores_the_marks(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=12)
    model = make_model(make_config(tokenizer, 64, 1, 1), seed=1)
    guide = Guide(model, "cpu")
    batch = collate([drawer.row(drawer.scene(index)) for index in range(2)])
    assert len(batch.marks)
    assert set(batch.marks[:, 0]) == {0, 1}
    loss_of(model, batch, "cpu")
    before = guide.loss(batch)
    for layer in (guide.layer, guide.joint):
        layer.bias.data.fill_(-20.0)
        for name in set(batch.marks[:, 2].tolist()):
            layer.bias.data.view(-1, len(MARKS))[:, name] = 0.0
    loss_of(model, batch, "cpu")
    named = len(set(batch.marks[:, 2].tolist()))
    wanted = 2 * IMAGE_TOKENS * named * np.log(2) / len(batch.marks)
    untold = np.log(IMAGE_TOKENS**0.5) + np.log(STEPS + 1)  # places, and the count that is asked for
    assert len(batch.readings)
    assert not len(batch.shares)
    assert [float(each.detach()) for each in guide.loss(batch)] == pytest.approx([wanted, wanted + untold], rel=1e-3)
    assert all(float(each.detach()) > 0 for each in before)


def test_an_image_token_holds_the_marks_of_its_own_patch(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=12)
    model = make_model(make_config(tokenizer, 64, 1, 1), seed=1)
    guide = Guide(model, "cpu")
    row = drawer.row(drawer.scene(0))
    batch = collate([(*row[:5], [(13, 0)], [], *row[7:10], [])])
    guide.joint.bias.data.fill_(-50.0)[0] = 50.0
    loss_of(model, batch, "cpu")
    guide.place.bias.data.fill_(0)
    wrongly_named = (float(guide.loss(batch)[1].detach()) - np.log(SIDE)) / 50
    assert wrongly_named == pytest.approx(IMAGE_TOKENS - 1)  # the other tokens, and not this one


def test_an_answer_s_signs_are_looked_for_where_they_are_drawn(tokenizer: object) -> None:
    marks = [Mark(10, 10, "4"), Mark(70, 10, "2"), Mark(110, 10, "."), Mark(170, 10, "2"), Mark(20, 170, "4")]
    pair = QA("display", "What does the display read?", "42.2")
    scene = Scene(Image.new("RGB", (180, 180)), marks, [pair])
    assert gazes(scene, pair, [(0, 1), (1, 2), (2, 3), (3, 4)], 6) == [{0}, {2}, {3}, {5}]


def test_what_a_question_names_says_where_to_look() -> None:
    marks = [Mark(10, 10, "star"), Mark(10, 10, "red"), Mark(170, 170, "ring"), Mark(170, 170, "red")]
    scene = Scene(Image.new("RGB", (180, 180)), marks)
    asked = QA("shape", "What colour is the ring?", "red")
    assert gazes(scene, asked, [(0, 3)], 6) == [{35}]
    counted_stars = QA("count", "How many stars are there?", "1")
    assert gazes(scene, counted_stars, [(0, 1)], 6) == [frozenset()]
    assert counted(scene, counted_stars, 6) == pytest.approx({SINK: 8 / 9, 0: 1 / 9})
    assert counted(scene, QA("count", "Count the crosses.", "0"), 6) == {SINK: 1.0}
    assert counted(scene, asked, 6) == {}
    absent = QA("presence", "Is there a red nut?", "no")
    assert gazes(scene, absent, [(0, 2)], 6) == [{SINK}]


def test_who_lists_lit_lamps_looks_at_each_and_at_all_of_them_in_the_end() -> None:
    for seed in range(40):
        scene = lights.indicator_row(np.random.default_rng((15, seed)))
        asked = scene.pairs[0]
        lit = [
            index for index, mark in enumerate(m for m in scene.marks if m.name in {"on", "off"}) if mark.name == "on"
        ]
        lamps = [cell_of(scene, mark, SIDE) for mark in scene.marks if mark.name in {"on", "off"}]
        spans = [(index, index + 1) for index in range(len(asked.answer))]
        *said, end = gazes(scene, asked, spans, SIDE)
        assert end == {lamps[index] for index in lit}
        for sign, places in zip(asked.answer, said, strict=True):
            if sign.isdigit():
                assert places == {lamps[int(sign) - 1]}
        if lit:
            assert asked.answer == lights.listed([str(index + 1) for index in lit])


def test_several_lamps_are_lit_in_more_of_the_lights_to_learn_from() -> None:
    def lamps(draw: Callable[[np.random.Generator], Scene]) -> list[int]:
        scenes = [draw(np.random.default_rng((16, seed))) for seed in range(200)]
        lists = [pair.answer for scene in scenes for pair in scene.pairs if pair.question.startswith("Which stack")]
        return [0 if listed == "none" else len(re.findall(r"[a-z]{3,}", listed.replace("and", ""))) for listed in lists]

    held_out, taught = lamps(SCENES["light"]), lamps(TAUGHT["light"])
    assert max(held_out) == 2
    assert max(taught) > 2
    assert sum(many > 1 for many in taught) > 1.5 * sum(many > 1 for many in held_out)


def test_what_is_looked_at_are_image_tokens_and_the_first_token(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=12)
    scene = Scene(Image.new("RGB", (180, 180)), [Mark(179, 179, "nut")], [QA("count", "Count the nuts.", "1")])
    batch = collate([drawer.row(scene)])
    assert len(batch.gazes) == 0
    seen, shares = batch.counts[:, 2].astype(int), batch.counts[:, 3]
    image = tokenizer.convert_tokens_to_ids("<image>")  # type: ignore[attr-defined]
    assert seen.tolist() == [0, np.flatnonzero(batch.input_ids[0] == image)[-1]]
    assert shares.tolist() == pytest.approx([8 / 9, 1 / 9])
    answer = int(batch.counts[0, 1])
    assert tokenizer.decode([batch.labels[0, answer]]) == "1"  # type: ignore[attr-defined]


def test_an_answer_may_stand_in_a_form(tokenizer: object) -> None:
    asked = [QA("count", "Count the nuts.", "10"), QA("light", "Which lamp is lit?", "red")]
    pairs = [formed(pair, np.random.default_rng(seed)) for seed in range(300) for pair in asked]
    inside = [pair for pair in pairs if pair.lead]
    assert 0.1 < len(inside) / len(pairs) < 0.2
    for pair in inside:
        call = re.fullmatch(r"<tool_call>(.*)</tool_call>", pair.lead + pair.answer + pair.close)
        found = json.loads(call[1] if call else pair.lead + pair.answer + pair.close)
        found = found["arguments"] if call else found
        [value] = found.values() if isinstance(found, dict) else found
        assert value in (10, "10", "red")
    assert any(pair.answer == "10" and pair.lead == "[" for pair in inside)


def test_of_a_form_only_what_follows_is_learned(tokenizer: object) -> None:
    marks = [Mark(10, 10, "4"), Mark(70, 10, "2")]
    pair = QA("display", "Read the display.", "42", lead='{"value": ', close="}")
    scene = Scene(Image.new("RGB", (180, 180)), marks, [pair])
    batch = collate([Drawer(tokenizer, seed=12).row(scene)])
    decode = tokenizer.decode  # type: ignore[attr-defined]
    text = decode(batch.input_ids[0])
    assert text.rstrip("\x00").split("<|assistant|>")[1].startswith('{"value": 42}')
    told = np.flatnonzero(batch.labels[0] != IGNORED)
    assert decode(batch.labels[0, told]) == "42}<|end|>"
    assert [told.tolist().index(place) for place in batch.gazes[:, 1]] == [0, 1]


def test_only_the_telling_words_of_a_question_are_told() -> None:
    question = "Is there a yellow nut on LED 3?"
    spans = [(word.start(), word.end()) for word in re.finditer(r" ?\w+|\?", question)]
    assert [question[slice(*spans[index])] for index in asked_words(question, spans)] == [
        " yellow",
        " nut",
        " LED",
        " 3",
    ]


def test_the_gaze_scores_the_attention_on_what_is_wanted(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=12)
    model = make_model(make_config(tokenizer, 64, 1, 3), seed=1)
    attention.install(model)
    gaze = Gaze(model)
    batch = collate([drawer.row(drawer.scene(index)) for index in range(4)])
    assert len(batch.gazes)
    loss_of(model, batch, "cpu")
    loss = gaze.loss(batch)
    loss.backward()
    text = model.model.text_model.layers
    assert float(loss.detach()) > 1
    assert all(text[index].self_attn.q_proj.weight.grad.abs().sum() > 0 for index in (0, 1, 2))


def test_the_gaze_counts_by_what_the_sink_has(tokenizer: object) -> None:
    marks = [Mark(20, 20, "nut"), Mark(90, 90, "nut"), Mark(150, 150, "nut")]
    scene = Scene(Image.new("RGB", (180, 180)), marks, [QA("count", "Count the nuts.", "3")])
    batch = collate([Drawer(tokenizer, seed=12).row(scene)])
    assert {round(share * MOST) for share in batch.readings[:, 2]} == {3}
    model = make_model(make_config(tokenizer, 64, 1, 3), seed=1)
    gaze, size = Gaze(model), batch.input_ids.shape[1]
    answer, (sink, *nuts) = int(batch.counts[0, 1]), batch.counts[:, 2].astype(int)

    def miscounted(*worth: float) -> float:
        weights = torch.zeros(1, 1, size, size)
        weights[0, 0, answer, [sink, *nuts]] = torch.tensor([SINK_WEIGHT, *worth]) / (SINK_WEIGHT + sum(worth))
        module = model.model.text_model.layers[2].self_attn
        for hook in module._forward_hooks.values():
            hook(module, None, (None, weights))
        return float(gaze.loss(batch))

    assert miscounted(1, 1, 1) == pytest.approx(0, abs=1e-4)
    assert 0 < miscounted(0.5, 1, 1.5) < 0.1
    assert miscounted(2, 2, 2) == pytest.approx(2.5, abs=0.2)  # three too many, beyond where errors count squared


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
