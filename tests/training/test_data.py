"""Rows train as single questions do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import IGNORED, Drawer, collate, shrink
from training.forms import formed
from training.gaze import asked_words
from training.model import IMAGE_SIZE, IMAGE_TOKENS, make_config, make_model, save_checkpoint
from training.scene import QA, Mark, Scene
from training.train import attention_mask, loss_of


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


def test_labels_are_the_answers_and_nothing_else(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=9)
    scene = drawer.scene(4)
    _, _, labels, _, segments, *_ = drawer.row(scene)
    for number, pair in enumerate(scene.pairs, 1):
        ids = [label for label, segment in zip(labels, segments, strict=True) if segment == number and label != IGNORED]
        assert tokenizer.decode(ids) == f"{pair.answer}<|end|>"  # type: ignore[attr-defined]


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


def test_fewer_descriptions_are_learned_from(tokenizer: object) -> None:
    drawer = Drawer(tokenizer, seed=19)

    def descriptions(draw: Callable[[int], Scene]) -> int:
        return sum(pair.task == "description" for index in range(150) for pair in draw(index).pairs)

    assert descriptions(drawer.shuffled) < 0.5 * descriptions(drawer.scene)


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
