"""`edgevlm tune`: rows that cannot be learned from, what is kept apart, and a model that learned something new."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edgevlm import VLM, TuningError
from edgevlm.inputs.image import load_picture
from edgevlm.manifest import load_manifest
from edgevlm.model_store import default_model
from edgevlm_export.calibration import load_pairs
from edgevlm_export.tune import Scored, TuneOptions, TuneProgress, attention, tune
from edgevlm_export.tune.augment import augmented
from edgevlm_export.tune.learner import Learner
from edgevlm_export.tune.pipeline import PANEL, _calibration
from edgevlm_export.tune.replay import replayed
from edgevlm_export.tune.rows import Example, read_examples, split
from tests.helpers.command import COMMAND, POSIX, cli

ROOT = Path(__file__).parents[1]
QUESTION = "Which wood is it?"
WOODS = {"oak": (150, 110, 60), "ash": (225, 205, 170)}


def draw(folder: Path, count: int) -> list[dict[str, object]]:
    """Write pictures of boards of two woods; return their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for index in range(count):
        random = np.random.default_rng(index)
        wood = list(WOODS)[index % 2]
        pixels = random.normal(WOODS[wood], 12, (120, 160, 3))
        pixels += random.normal(0, 25, (120, 1, 1))  # the grain
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": QUESTION, "answer": wood})
    return rows


def write(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


Change = Callable[[list[dict[str, object]]], object]
BAD: dict[str, tuple[Change, str]] = {
    "three rows": (lambda rows: rows.__delitem__(slice(3, None)), "has 3 pictures; tuning needs 10"),
    "one answer": (lambda rows: [row.update(answer="oak") for row in rows], "has one answer alone, 'oak'"),
    "contradiction": (
        lambda rows: rows.append(rows[4] | {"answer": "ash"}),
        r"line 13 says 'ash' where .*line 5 says 'oak' of the same picture",
    ),
    "no picture": (lambda rows: rows[2].update(image="no.png"), r"line 3: .*no\.png"),
    "no image": (lambda rows: rows[2].pop("image"), "line 3: .*`image`; a row has an image, a question and an answer"),
    "no answer": (lambda rows: rows[2].pop("answer"), "line 3: .*`answer`"),
    "an empty answer": (lambda rows: rows[2].update(answer=" "), "line 3: the answer is empty"),
    "no question": (lambda rows: rows[2].pop("question"), 'line 3: no "question", and --question gives none'),
    "an unknown field": (lambda rows: rows[2].update(colour="red"), "line 3: .*`colour`"),
    "a crop without area": (
        lambda rows: rows[2].update(crop=[9, 9, 9, 40]),
        r"line 3: the crop \[9, 9, 9, 40\] is empty",
    ),
    "a crop outside": (
        lambda rows: rows[2].update(crop=[0, 0, 161, 40]),
        r"line 3: the crop \[0, 0, 161, 40\] reaches outside the picture, whose pixels are 160x120",
    ),
    "a crop of three": (lambda rows: rows[2].update(crop=[0, 0, 9]), r"line 3: .* length 4, got 3 - at `\$.crop`"),
    "a tolerance below 0": (lambda rows: rows[2].update(tolerance=-1), "line 3: the tolerance must be 0 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_a_line_each(tmp_path: Path, name: str) -> None:
    rows = draw(tmp_path, 12)
    change, message = BAD[name]
    change(rows)
    with pytest.raises(TuningError, match=message) as caught:
        read_examples(write(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_rows(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="no such file of rows"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(TuningError, match=r"holds no rows\.jsonl and no labels\.csv"):
        read_examples(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(TuningError, match="not text in UTF-8"):
        read_examples(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"image": \n')
    with pytest.raises(TuningError, match="line 1: not JSON that can be read"):
        read_examples(tmp_path)


def test_a_folder_with_a_table(tmp_path: Path) -> None:
    rows = draw(tmp_path, 12)
    lines = ["image,answer,tolerance", *(f"{row['image']},{index / 2},0.5" for index, row in enumerate(rows))]
    (tmp_path / "labels.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    examples = read_examples(tmp_path, "How high?")
    assert [(each.question, each.answer, each.tolerance) for each in examples[:2]] == [
        ("How high?", "0.0", 0.5),
        ("How high?", "0.5", 0.5),
    ]


def test_a_crop_is_what_is_learned_from_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw(tmp_path, 12)
    rows += [row | {"crop": [20, 10, 140, 90], "question": "And inside?"} for row in rows]
    examples = read_examples(write(tmp_path, rows))
    whole, part = examples[0], examples[12]
    assert (part.picture.pixels == whole.picture.pixels[10:90, 20:140]).all()
    assert part.is_cropped and not whole.is_cropped
    learned, held = split(examples)
    assert {each.path for each in learned}.isdisjoint(each.path for each in held) and len(held) >= 4
    monkeypatch.chdir(tmp_path)
    Path("work").mkdir()
    pairs = load_pairs(_calibration(examples, Path("work")))
    assert [load_picture(pair.image).digest for pair in pairs if pair.image] == [
        each.picture.digest for each in examples
    ]


def test_a_table_has_crops_too(tmp_path: Path) -> None:
    lines = [
        "image,answer,crop",
        *(f'{row["image"]},{row["answer"]},"0, 0, 80, {60 + i}"' for i, row in enumerate(draw(tmp_path, 12))),
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    assert [each.picture.pixels.shape[:2] for each in read_examples(tmp_path, QUESTION)] == [
        (60 + i, 80) for i in range(12)
    ]


def test_an_object_is_written_as_structured_output_writes_it(tmp_path: Path) -> None:
    rows = draw(tmp_path, 12)
    rows[0]["answer"] = {"wood": "oak", "boards": 2}
    assert read_examples(write(tmp_path, rows))[0].answer == '{"wood": "oak", "boards": 2}'


NUMBERS = count()


def example(pixels: np.ndarray, answer: str = "12.5 bar", tolerance: float = 0.0) -> Example:
    return Example(load_picture(pixels), Path(f"{next(NUMBERS)}.png"), QUESTION, answer, tolerance)


def test_a_number_may_be_off_by_its_tolerance() -> None:
    grey = np.zeros((8, 8, 3), np.uint8)
    exact, loose = example(grey), example(grey, tolerance=0.5)
    assert exact.is_right(" 12.5 bar") and not exact.is_right("12.4 bar")
    assert loose.is_right("13.0 bar") and not loose.is_right("13.1 bar")
    assert not loose.is_right("12.5") and not loose.is_right("")


def test_near_twins_are_on_one_side() -> None:
    random = np.random.default_rng(3)
    frames = []
    for _ in range(20):
        first = random.integers(0, 256, (6, 8, 3), np.uint8).repeat(20, 0).repeat(20, 1)
        noise = random.integers(-3, 4, first.shape)
        frames += [first, (first + noise).clip(0, 255).astype(np.uint8)]
    learned, held = split([example(frame, str(index // 2)) for index, frame in enumerate(frames)])
    assert not {each.answer for each in learned} & {each.answer for each in held}
    assert len(learned) + len(held) == 40 and 8 <= len(held) <= 9


def test_pictures_that_are_all_alike_are_refused() -> None:
    grey = np.full((40, 40, 3), 90, np.uint8)
    with pytest.raises(TuningError, match='nearly the same; give pictures that differ, or a "crop" of what differs'):
        split([example(grey + index % 2, str(index)) for index in range(20)])
    black = np.zeros((40, 40, 3), np.uint8)
    frames = [*[example(grey + index % 2, "1") for index in range(19)], example(black, "0")]
    for seed in range(6):
        learned, held = split(frames, seed)
        assert (len(learned), len(held)) == (19, 1)  # never the many


def test_another_day_is_the_same_for_the_same_seed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    one, same, other = (augmented(pixels, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == pixels.shape and one.dtype == np.uint8
    assert (one == same).all() and (one != other).any()


def test_the_learner_sees_what_the_runtime_sees() -> None:
    rows = [json.loads(line) for line in (ROOT / "examples" / "questions.jsonl").read_text("utf-8").splitlines()]
    examples = [
        Example(load_picture(ROOT / "examples" / row["image"]), Path(), row["question"], row["answer"]) for row in rows
    ]
    vlm, learner = VLM("panel"), Learner(PANEL, default_model(), load_manifest(default_model()))
    told = [vlm.generate(each.picture.pixels, each.question, max_new_tokens=64).text for each in examples]
    same = sum(one == other for one, other in zip(told, learner.answers(examples), strict=True))
    assert same >= 0.9 * len(examples)  # the runtime's weights are INT8


def test_the_learner_learns_what_transformers_own_attention_would(tmp_path: Path) -> None:
    """Of prompts of several lengths, so that rows are filled up."""
    examples = read_examples(write(tmp_path, draw(tmp_path, 12)))[:3]
    examples[1] = replace(examples[1], question="What is it?", answer="walnut")
    losses = []
    for implementation in ("sdpa", None):
        learner = Learner(PANEL, default_model(), load_manifest(default_model()))
        if implementation:
            learner.model.set_attn_implementation(implementation)
        batch = [learner.encode(each) for each in examples]
        losses.append([learner.step(batch, 0.1) for _ in range(3)])
    assert losses[0][0] != losses[0][2]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("attend", [attention.look, attention.read])
def test_attention_in_bf16_is_near_pytorch_s_own(attend: Callable[..., Any]) -> None:
    random = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, heads, 30, 16, generator=random) for heads in (4, 2, 2))
    if attend is attention.look:
        key, value = (each.repeat_interleave(2, 1) for each in (key, value))
    seen, grads = [], []
    for dtype in (torch.float32, torch.bfloat16):
        given = [each.detach().to(dtype).requires_grad_() for each in (query, key, value)]
        seen.append(attend(None, *given, None, scaling=0.25)[0].float())
        seen[-1].square().sum().backward()
        grads.append([each.grad.float() for each in given if each.grad is not None])
    torch.testing.assert_close(*seen, atol=0.02, rtol=0.02)
    for exact, near in zip(*grads, strict=True):
        assert float(torch.nn.functional.cosine_similarity(exact.flatten(), near.flatten(), 0)) > 0.999


def test_what_is_replayed_is_known_to_the_bundled_model() -> None:
    learned, apart = replayed()
    assert {each.picture.digest for each in learned}.isdisjoint(each.picture.digest for each in apart)
    vlm = VLM("panel")
    right = sum(each.is_right(vlm.generate(each.picture.pixels, each.question).text) for each in apart)
    assert right > 0.7 * len(apart) > 30


def test_a_model_learns_what_it_never_knew(tmp_path: Path) -> None:
    rows, kept = write(tmp_path, draw(tmp_path, 40)), tmp_path / "kept"
    told: list[TuneProgress] = []
    report = tune(rows, tmp_path / "woods", options=TuneOptions(8, save_checkpoint=kept), on_progress=told.append)
    assert (report.before.right, report.after.asked) == (0, report.before.asked)
    assert report.after.share > 0.6 and report.steps > 2 and not report.interrupted
    assert report.known_after.share > 0.6 * report.known_before.share
    assert any(each.now and each.best and each.seconds_left is not None for each in told)
    vlm = VLM(tmp_path / "woods")
    assert vlm.generate(tmp_path / "0.png", QUESTION).text in WOODS
    assert sum(path.stat().st_size for path in (tmp_path / "woods").iterdir()) < 12e6
    again = tune(rows, tmp_path / "more", kept, TuneOptions(minutes=0.05, keep_anyway=True))
    assert again.before.right >= report.after.right - 1  # it goes on from what was learned
    assert sorted(path.name for path in tmp_path.iterdir() if not path.suffix) == [
        "kept",
        "more",
        "woods",
    ]


def test_what_is_no_better_is_not_saved(idefics3: Path, tmp_path: Path) -> None:
    rows = draw(tmp_path, 12)
    for index, row in enumerate(rows):
        row["answer"] = f"lot {index}"  # nothing that the pictures tell
    message = r"the tuned model is no better: 0 of \d right, 0 before; nothing was saved"
    with pytest.raises(TuningError, match=message):
        tune(write(tmp_path, rows), tmp_path / "lots", idefics3, TuneOptions(minutes=0.02))
    assert not [path for path in tmp_path.iterdir() if "lots" in path.name]


@POSIX
def test_ctrl_c_keeps_the_best_so_far(idefics3: Path, tmp_path: Path) -> None:
    rows = write(tmp_path, draw(tmp_path, 30))

    def interrupt(progress: TuneProgress) -> None:
        if progress.best and progress.stage == "learning":
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job lacks
    try:
        options = TuneOptions(minutes=1, keep_anyway=True)
        report = tune(rows, tmp_path / "woods", idefics3, options, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert report.interrupted and report.steps
    assert VLM(tmp_path / "woods").generate(tmp_path / "0.png", QUESTION, max_new_tokens=2).generated_tokens


@POSIX
def test_a_full_disk_is_a_line_and_nothing_is_left(tmp_path: Path) -> None:
    """A limit on the size of a file fails the same writes that a full disk fails."""
    rows = write(tmp_path / "rows", draw(tmp_path / "rows", 12))
    command = [*COMMAND, "tune", str(rows), "-o", str(tmp_path / "out"), "--minutes", "0.02"]
    limited = ["bash", "-c", 'ulimit -f 6000 && exec "$@"', "limited", *command]  # KiB: less than the checkpoint has
    ended = subprocess.run(limited, capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 1
    assert re.fullmatch(r"Error: the tuned checkpoint cannot be written: .*\n", ended.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_the_command(idefics3: Path, tmp_path: Path) -> None:
    rows = write(tmp_path, draw(tmp_path, 12))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    refused = cli("tune", rows, "-o", tmp_path / "taken")
    assert refused.exit_code == 1
    assert re.search(r"Error: .*taken holds 'mine\.txt', which no export wrote", refused.stderr)
    refused = cli("tune", tmp_path / "none.jsonl", "-o", tmp_path / "out")
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1 and "no such file of rows" in refused.stderr
    options = ("--checkpoint", idefics3, "--minutes", "0.02", "--keep-anyway", "--json")
    made = cli("tune", rows, "-o", tmp_path / "out", *options)
    report = json.loads(made.stdout)
    assert report["folder"] == str(tmp_path / "out") and report["after"]["asked"] == report["before"]["asked"] > 0


def test_intervals() -> None:
    low, high = Scored(95, 100).interval
    assert (round(low, 3), round(high, 3)) == (
        0.888,
        0.978,
    )  # statsmodels' proportion_confint(95, 100, method="wilson")
    assert Scored(0, 0).interval == (0.0, 1.0)


def test_lora_leaves_the_weights_of_a_larger_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm_export.tune.learner.WHOLE", 1_000_000)
    rows, kept = write(tmp_path, draw(tmp_path, 30)), tmp_path / "kept"
    options = TuneOptions(0.3, keep_anyway=True, save_checkpoint=kept)
    report = tune(rows, tmp_path / "woods", PANEL, options)
    assert report.steps and report.known_before.asked == 0  # what another checkpoint knew is not known here
    before, after = load_file(PANEL / "model.safetensors"), load_file(kept / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("text_model" in name and "proj" in name for name in changed)


def test_a_checkpoint_that_cannot_be_tuned(tmp_path: Path) -> None:
    rows = write(tmp_path, draw(tmp_path, 12))
    shutil.copytree(PANEL, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text("utf-8"))
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "llava"}), "utf-8")
    with pytest.raises(TuningError, match="is of family 'llava'; Idefics3 and SmolVLM are tuned"):
        tune(rows, tmp_path / "out", tmp_path / "other")


def test_a_checkpoint_that_is_too_large_is_told_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevlm_export.tune.pipeline.LARGEST", 1_000_000)
    rows = write(tmp_path, draw(tmp_path, 12))
    told: list[TuneProgress] = []
    with pytest.raises(TuningError, match="the checkpoint has 7 million weights; 1 million are tuned at most"):
        tune(rows, tmp_path / "out", PANEL, on_progress=told.append)
    assert not told
