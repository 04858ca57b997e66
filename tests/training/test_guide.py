"""Auxiliary supervision: what patches and tokens must name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from training.data import MARKS, SCALES, Drawer, collate
from training.guide import STEPS, Guide, _misread
from training.model import IMAGE_TOKENS, SIDE, make_config, make_model
from training.scene import QA, Mark, Scene
from training.settings import GUIDE
from training.train import loss_of


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


def test_the_guide_scores_the_marks(tokenizer: object) -> None:
    drawers = (Drawer(tokenizer, seed=seed) for seed in range(12, 200))
    batches = (collate([drawer.row(drawer.scene(index)) for index in range(2)]) for drawer in drawers)
    # Of things without shares along a scale, which something is asked to count.
    batch = next(
        each for each in batches if len(each.readings) and not len(each.shares) and len(set(each.marks[:, 0])) == 2
    )
    model = make_model(make_config(tokenizer, 64, 1, 1), seed=1)
    guide = Guide(model, "cpu")
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
