"""Attention supervision: where an answer's words are looked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from training import attention
from training.data import Drawer, collate
from training.gaze import MOST, SINK, SINK_WEIGHT, cell_of, counted, gazes
from training.guide import Gaze
from training.model import SIDE, make_config, make_model
from training.scene import QA, Mark, Scene
from training.scenes import lights
from training.train import loss_of


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
