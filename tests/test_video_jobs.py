"""Batch and watch with videos: rows of clips, damaged ones, models that take none, and what is done stays done."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgevlm import VLM, GenerationConfig, ImageBudget, Video, VideoError
from edgevlm.decoding.output_format import OutputFormat
from edgevlm.families.base import FrameSampling
from edgevlm.jobs.batch import Batch, run_batch
from edgevlm.jobs.sinks import JsonlSink, SqliteSink
from edgevlm.jobs.spec import Defaults
from edgevlm.jobs.watch import Watch, Watcher
from tests.conftest import F32
from tests.families import qwen_vl
from tests.helpers.batches import QUESTION, read, write
from tests.helpers.clips import make_clip, moving_square
from tests.helpers.command import POSIX, cli

SHORT = GenerationConfig(max_new_tokens=4)
LOW = ImageBudget("low")
WHOLE = FrameSampling()
FRAMES = [moving_square(number, 24, 32) for number in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """A tiny Qwen3-VL, which takes videos."""
    return qwen_vl.tiny_vlm(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a clip, a GIF, a damaged clip and a folder of frames."""
    folder = tmp_path / "camera"
    (folder / "frames").mkdir(parents=True)
    clip = make_clip(folder / "clip.mkv", FRAMES)
    (folder / "cut.mkv").write_bytes(clip.read_bytes()[:100])
    first, *rest = (Image.fromarray(frame) for frame in FRAMES)
    first.save(folder / "clip.gif", save_all=True, append_images=rest, duration=125, loop=0)
    for number in range(5):
        Image.fromarray(FRAMES[number]).save(folder / "frames" / f"{number}.png")
    return folder


def sha256(*paths: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_rows_of_videos_are_answered_as_the_model_answers_them(model: VLM, folder: Path) -> None:
    rows: list[Any] = [
        {"video": "clip.mkv", "question": QUESTION},
        {"video": "clip.mkv", "frames": 6, "question": QUESTION, "id": 7},
        {"video": "clip.mkv", "fps": 4, "question": QUESTION, "choices": ["yes", "no"]},
        {"video": "clip.gif", "frames": 4, "question": QUESTION},
        {"video": "frames", "fps": 4, "question": QUESTION},
        {"image": "clip.gif", "question": QUESTION},
    ]
    output = folder.parent / "out.jsonl"
    defaults = Defaults(None, OutputFormat(), SHORT, LOW, FrameSampling(fps=1))
    batch = Batch(write(folder / "jobs.jsonl", rows), output, str(model.folder), F32, defaults)
    assert run_batch(batch).to_dict() == {"jobs": 6, "answered": 6, "failed": 0, "resumed": 0}
    found = read(output)
    clip, gif = folder / "clip.mkv", folder / "clip.gif"
    expected = [
        Video(clip, fps=1), Video(clip, frames=6), Video(clip, fps=4), Video(gif, frames=4),
        Video(folder / "frames", fps=4), gif,
    ]  # fmt: skip
    for row, visual in zip(found, expected, strict=True):
        if "probabilities" in row:
            scores = model.score(visual, QUESTION, ["yes", "no"], SHORT, LOW)
            assert row["probabilities"] == pytest.approx(scores.probabilities, abs=1e-3)
        else:
            assert row["answer"] == model.generate(visual, QUESTION, SHORT, LOW).text
    assert found[1] | {"id": 7, "video": "clip.mkv", "frames": 6} == found[1]
    assert [row["sha256"] for row in found[:4]] == [sha256(clip)] * 3 + [sha256(gif)]
    assert found[4]["sha256"] == sha256(*(folder / "frames" / f"{number}.png" for number in range(5)))
    write(folder / "jobs.jsonl", [*rows, {"video": "clip.mkv", "frames": 2, "question": QUESTION}])
    assert run_batch(batch).to_dict() == {"jobs": 7, "answered": 7, "failed": 0, "resumed": 6}
    assert read(output)[:6] == found


BAD = [
    ({"video": "cut.mkv"}, "cut.mkv cannot be read as a video, it may be damaged: "),
    ({"video": "clip.mkv", "image": "clip.gif"}, "the row cannot be used: image and video exclude each other"),
    ({"image": "clip.gif", "fps": 2}, "the row cannot be used: fps and frames are for a video"),
    ({"video": "clip.mkv", "fps": 2, "frames": 2}, "fps and frames exclude each other"),
    ({"video": "clip.mkv", "frames": 0}, "frames must be at least 1"),
    ({"video": ["clip.mkv"]}, "Expected `str`, got `array` - at `$.video`"),
    ({"video": "no.mkv"}, "no such video file: "),
    ({"video": "empty"}, " is a folder without pictures"),
    ({"image": "clip.mkv"}, "is not an image"),
]


def test_a_bad_video_is_the_error_of_its_row(model: VLM, folder: Path) -> None:
    (folder / "empty").mkdir()
    rows = [{"question": QUESTION, **row} for bad, _ in BAD for row in (bad, {"video": "clip.mkv", "frames": 2})]
    output = folder.parent / "out.jsonl"
    options = ["-m", model.folder, "--device", "CPU", "--no-cache", "--max-new-tokens", 2, "--detail", "low"]
    result = cli("batch", write(folder / "jobs.jsonl", rows), "-o", output, *options)
    assert result.exit_code == 1
    found = read(output)
    for number, (_, message) in enumerate(BAD):
        assert message in found[2 * number]["error"]
        assert "\n" not in found[2 * number]["error"]
        assert "answer" in found[2 * number + 1]
    assert result.stderr.splitlines()[-1].startswith(f"{len(BAD)} of {len(rows)} rows answered")


def test_a_model_without_videos_refuses_them_row_by_row(exported: Path, folder: Path) -> None:
    rows = [{"video": "clip.mkv", "question": QUESTION}, {"image": "clip.gif", "question": QUESTION}]
    jobs, output = write(folder / "jobs.jsonl", rows), folder.parent / "out.jsonl"
    summary = run_batch(Batch(jobs, output, str(exported), F32, Defaults(config=SHORT, image_budget=LOW)))
    assert (summary.jobs, summary.failed) == (2, 1)
    refused, answered = read(output)
    assert refused["error"] == "this model takes pictures, not video; give it single frames as pictures"
    assert answered["answer"]


def test_outputs_older_than_videos_are_resumed(exported: Path) -> None:
    defaults = Defaults(QUESTION, config=SHORT)
    _, options = json.loads(defaults.config_digest(str(exported)))
    assert set(options) == {"question", "output_format", "config", "image_budget"}
    sampled = Defaults(QUESTION, config=SHORT, sampling=FrameSampling(frames=4))
    assert sampled.config_digest(str(exported)) != defaults.config_digest(str(exported))


class Stepped:
    """A watcher in this process whose time passes only when a test says so."""

    def __init__(self, vlm: VLM, folder: Path, store: Path, sampling: FrameSampling = WHOLE) -> None:
        self.now, self.told = 100.0, list[str]()
        self._sink = JsonlSink(store) if store.suffix == ".jsonl" else SqliteSink(store)
        defaults = Defaults(QUESTION, config=SHORT, image_budget=LOW, sampling=sampling)
        watch = Watch(folder, defaults, stable_for_s=1, give_up_after_s=20)
        self._watcher = Watcher(watch, vlm, self._sink, on_passed=self.told.append, clock=lambda: self.now)
        self._sink.__enter__()

    def after(self, seconds: float) -> None:
        """Let time pass, then do what is due."""
        self.now += seconds
        self._watcher.step()

    def end(self) -> None:
        self._sink.__exit__(None, None, None)


@POSIX
def test_videos_of_a_folder_are_answered_once(model: VLM, folder: Path) -> None:
    store, clip, cut = folder.parent / "answers.jsonl", folder / "clip.mkv", folder / "cut.mkv"
    damaged = bytearray(clip.read_bytes())
    damaged[600:] = bytes(len(damaged) - 600)  # a sound header, and no frame
    (folder / "zeros.mkv").write_bytes(damaged)
    for restarted in (False, True):
        watcher = Stepped(model, folder, store)
        watcher.after(0)
        watcher.after(1.1)
        assert {row["path"] for row in read(store) if "answer" in row} == {"clip.mkv", "clip.gif"}
        watcher.after(20)  # the damaged ones are given up
        watcher.after(30)
        watcher.end()
        found = {row["path"]: row for row in read(store)}
        assert len(read(store)) == len(found) == 4
        os.utime(clip)
        assert restarted or watcher.told == []
    assert found["clip.mkv"]["sha256"] == sha256(clip)
    assert found["clip.mkv"]["answer"] == model.generate(clip, QUESTION, SHORT, LOW).text
    assert found["clip.gif"]["answer"] == model.generate(folder / "clip.gif", QUESTION, SHORT, LOW).text
    assert "cut.mkv cannot be read as a video" in found["cut.mkv"]["error"]
    assert found["cut.mkv"]["sha256"] == sha256(cut)
    assert "zeros.mkv " in found["zeros.mkv"]["error"]


@POSIX
def test_a_clip_that_is_still_being_written_is_waited_for(model: VLM, folder: Path) -> None:
    store, path = folder.parent / "answers.db", folder / "slow.mp4"
    data = make_clip(folder.parent / "slow.mp4", FRAMES, "mpeg4", "yuv420p").read_bytes()
    path.write_bytes(data[: len(data) // 2])  # an MP4 has its index at its end
    watcher = Stepped(model, folder, store, FrameSampling(frames=4))
    watcher.after(0)
    watcher.after(1.1)
    path.write_bytes(data)
    watcher.after(11)
    watcher.after(1.1)
    watcher.end()
    with sqlite3.connect(store) as database:
        rows = dict(database.execute("SELECT path, answer FROM answers WHERE error IS NULL").fetchall())
    assert rows["slow.mp4"] == model.generate(Video(path, frames=4), QUESTION, SHORT, LOW).text
    assert rows["clip.gif"] == model.generate(Video(folder / "clip.gif", frames=4), QUESTION, SHORT, LOW).text


@POSIX
def test_a_model_without_videos_passes_them_over(vlm: VLM, folder: Path) -> None:
    store = folder.parent / "answers.jsonl"
    watcher = Stepped(vlm, folder, store)
    watcher.after(0)
    watcher.after(1.1)
    watcher.end()
    assert [row["path"] for row in read(store)] == ["clip.gif"]
    [told] = watcher.told
    assert told.endswith(
        ".mkv, this model takes pictures, not video; give it single frames as pictures; further such files are not told"
    )
    with pytest.raises(VideoError, match="this model takes pictures, not video"):
        Stepped(vlm, folder, store, FrameSampling(fps=1))


@POSIX
def test_without_pyav_videos_are_passed_over(model: VLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    watcher = Stepped(model, folder, folder.parent / "answers.jsonl")
    watcher.after(0)
    watcher.end()
    assert "videos need PyAV; install it with: pip install 'edgevlm[video]'" in watcher.told[0]


def test_wrong_samplings_are_told_at_once(exported: Path, folder: Path) -> None:
    jobs = write(folder / "jobs.jsonl", [{"question": QUESTION}])
    result = cli("batch", jobs, "-o", folder / "out.jsonl", "-m", exported, "--fps", "1", "--frames", "2")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "Error: fps and frames exclude each other; give one of them"
