"""Videos: frames out of clips, and Qwen-VL's views, prompts, positions and answers against transformers."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image

from edgevlm import VLM, GenerationConfig, ImageBudget, Video, VideoError
from edgevlm.cli.main import main
from edgevlm.errors import ImageError, OptionError, PromptError
from edgevlm.families.base import PIXEL_VALUES, Frames, FrameSampling
from edgevlm.families.idefics3 import in_words
from edgevlm.families.qwen_vl import Clip
from edgevlm.inputs.chat_template import user_message
from edgevlm.inputs.video import as_visuals, load_frames, probe_video
from edgevlm.metrics import Stopwatch
from edgevlm_export import ExportOptions, export
from tests.conftest import F32, make_checkpoint, noise
from tests.families import qwen_vl
from tests.families.idefics3 import make_reference
from tests.helpers.clips import RATE, make_clip, moving_square, static
from tests.helpers.json_files import read_json, write_json
from tests.helpers.serving import request, serving

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
QUESTION = "What moves?"
HIGH = ImageBudget("high")
TOKENS = 8
needs_torchvision = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="transformers' video processors need torchvision: nox -s video"
)


def numbers(frames: Frames) -> list[int]:
    """Return which frames of a clip of `moving_square` were sampled, told by their bits."""
    shown = []
    for frame in frames.pixels:
        columns = np.array_split(frame[frame.shape[0] * 5 // 8 :], 8, axis=1)
        shown.append(int(np.packbits([np.median(column) > 127 for column in columns])[0]))
    return shown


class Pair:
    """An export, and transformers on the same checkpoint."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.checkpoint = qwen_vl.make_checkpoint(folder / "saved", kind)
        self.sizes = {"shortest_edge": 256, "longest_edge": 64 * (200 if kind in qwen_vl.OF_QWEN3 else 24)}
        write_json(
            self.checkpoint / "video_preprocessor_config.json",
            {"size": self.sizes, "patch_size": qwen_vl.PATCH, "temporal_patch_size": 2, "merge_size": qwen_vl.MERGE},
        )
        self.vlm = VLM(
            export(self.checkpoint, folder / "out", ExportOptions("fp32", via="native", verify=False)).folder, F32
        )
        self.reference = qwen_vl.QwenReference(self.checkpoint)
        self.family: Any = self.vlm.processor.family

    def processor(self) -> Any:
        """Return the reference's processor, its video part included."""
        name = "Qwen3VL" if self.kind in qwen_vl.OF_QWEN3 else qwen_vl.NAMES[self.kind]
        made = getattr(transformers, f"{name}Processor")
        words = self.reference.processor.tokenizer
        return made(qwen_vl.image_processor(), words, self.video_processor(), chat_template=qwen_vl.TEMPLATE)

    def video_processor(self) -> Any:
        """Return the reference's video processor."""
        name = "Qwen3VLVideoProcessor" if self.kind in qwen_vl.OF_QWEN3 else "Qwen2VLVideoProcessor"
        return getattr(transformers, name)(
            size=self.sizes, patch_size=qwen_vl.PATCH, merge_size=qwen_vl.MERGE, cap_pixels_per_frame=False
        )

    def prepare(self, video: Video) -> Any:
        """Return the prompt of a question about a video."""
        return self.vlm.prepare([user_message(QUESTION, ["video"])], [video], GenerationConfig(), Stopwatch(), HIGH)

    def inputs(self, video: Video) -> dict[str, Any]:
        """Return the reference model's inputs of the views and token ids made here, which other tests compare."""
        visual = self.visual(video)
        grid = visual.layout.grid
        side = qwen_vl.MERGE
        ids = torch.tensor([self.prepare(video).ids])
        values = np.concatenate([view.inputs()[PIXEL_VALUES][0] for view in visual.views])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == self.reference.config.video_token_id).int(),
            "pixel_values_videos": torch.from_numpy(values),
            "video_grid_thw": torch.tensor([[len(visual), grid.rows * side, grid.cols * side]]),
        }
        if self.kind == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([visual.layout.interval_s])
        self.reference.model.model.rope_deltas = None
        return inputs

    def visual(self, video: Video) -> Any:
        """Return the views of a video."""
        return self.family.preprocess_video(load_frames(video, self.family, HIGH))


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("qwen3_vl", tmp_path_factory.mktemp("third"))


CLIPS: dict[str, tuple[list[np.ndarray], dict[str, Any]]] = {
    "as large as its views": ([moving_square(number, 24, 32) for number in range(20)], {"fps": 2}),
    "larger": ([moving_square(number, 90, 130) for number in range(20)], {"fps": 2}),
    "lower and wider": ([static(seed, 10, 15) for seed in range(9)], {"fps": 4}),
    "smaller": ([moving_square(number, 10, 15) for number in range(9)], {"fps": 4}),
    "some frames": ([static(seed, 24, 32) for seed in range(13)], {"num_frames": 6, "fps": None}),
}


@needs_torchvision
@pytest.mark.parametrize("clip", CLIPS)
def test_pixels_grid_and_prompt_equal_the_reference(pair: Pair, clip: str, tmp_path: Path) -> None:
    """transformers samples, resizes, writes the prompt; Pillow's resampling is a level off torchvision's at most."""
    from transformers.video_utils import VideoMetadata

    frames, options = CLIPS[clip]
    path = make_clip(tmp_path / "clip.mkv", frames)
    processor = pair.processor()
    text = processor.tokenizer.apply_chat_template(
        [user_message(QUESTION, ["video"])], chat_template=qwen_vl.TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    expected = processor(
        text=[text],
        videos=[torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)],
        video_metadata=[VideoMetadata(total_num_frames=len(frames), fps=float(RATE))],
        do_sample_frames=True,
        return_tensors="pt",
        **options,
    )
    video = Video(path, options.get("fps"), options.get("num_frames"))
    visual = pair.visual(video)
    assert pair.prepare(video).ids == expected["input_ids"][0].tolist()
    assert pair.inputs(video)["video_grid_thw"].tolist() == expected["video_grid_thw"].tolist()
    found = np.concatenate([view.inputs()[PIXEL_VALUES][0] for view in visual.views])
    wanted = expected["pixel_values_videos"].numpy()
    if clip in ("as large as its views", "some frames"):
        assert np.array_equal(found, wanted)
    level = float(np.diff(pair.family.video_lookup).max())
    assert np.abs(found - wanted).max() <= 1.001 * level
    assert np.mean(found != wanted) < 0.05
    if pair.kind == "qwen2_5_vl":
        assert expected["second_per_grid_ts"].tolist() == [np.float32(visual.layout.interval_s)]


@needs_torchvision
def test_sampling_equals_the_reference(pair: Pair) -> None:
    """Its `sample_frames`, but for places beyond the last frame."""
    from transformers.video_utils import VideoMetadata

    processor = pair.video_processor()
    for total in (2, 3, 4, 5, 7, 24, 61, 100, 299, 1801, 20000):
        for rate in (1.0, 8.0, 23.976, 30.0):
            metadata = VideoMetadata(total_num_frames=total, fps=rate)
            for fps in (0.3, 1, 2, 5.5):
                wanted = processor.sample_frames(metadata, fps=fps).tolist()
                found = pair.family.sample_frames(total, rate, FrameSampling(fps), HIGH)
                assert list(found) == [place for place in wanted if place < total], (total, rate, fps)
            for frames in (2, 4, 6, 24):
                if frames <= total:
                    wanted = processor.sample_frames(metadata, num_frames=frames).tolist()
                    assert pair.family.sample_frames(total, rate, FrameSampling(None, frames), HIGH) == wanted


def test_positions_embeddings_and_tokens_equal_the_reference(pair: Pair, tmp_path: Path) -> None:
    """Of a clip whose frames differ, among them two in one temporal patch."""
    path = make_clip(tmp_path / "clip.mkv", [static(seed, 40, 56) for seed in range(24)])
    video = Video(path, fps=2)
    prompt, inputs = pair.prepare(video), pair.inputs(video)
    names = {"input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts"}
    positions, _ = pair.reference.model.model.get_rope_index(**{key: inputs[key] for key in names & inputs.keys()})
    assert np.array_equal(prompt.inputs.positions, positions[:, 0].numpy())
    assert len(np.unique(prompt.inputs.positions[0])) > prompt.views
    with torch.inference_mode():
        features = pair.reference.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        ids = pair.reference.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    rows = pair.family.image_rows(np.asarray(prompt.ids))
    np.testing.assert_allclose(prompt.inputs_embeds[0, rows], features.pooler_output[0].numpy(), atol=1e-4)
    answer = pair.vlm.generate(video, QUESTION, image_budget=HIGH, max_new_tokens=TOKENS)
    count = len(answer.token_ids)
    assert list(answer.token_ids) == ids[0, len(prompt.ids) :][:count].tolist()
    assert count == TOKENS or answer.finish_reason == "stop"
    assert answer.views == prompt.views == 3
    assert answer.cached_views == 3


def test_a_picture_and_a_video_share_a_prompt(third: Pair, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", [static(seed, 40, 56) for seed in range(4)])
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": QUESTION}]
    message = {"role": "user", "content": content}
    images = [noise(40, 56), Video(path)]
    prompt = third.vlm.prepare([message], images, GenerationConfig(), Stopwatch(), HIGH)
    ids = np.asarray(prompt.ids)
    config = third.reference.config
    assert (ids == config.image_token_id).sum() + (ids == config.video_token_id).sum() == prompt.image_tokens
    assert (ids == config.image_token_id).any() and (ids == config.video_token_id).any()
    with pytest.raises(PromptError, match="not in the order of its pictures and videos"):
        third.vlm.prepare([message], images[::-1], GenerationConfig(), Stopwatch(), HIGH)


def test_a_sliding_window_encodes_what_is_new(pair: Pair) -> None:
    frames = [static(seed, 24, 32) for seed in range(200, 212)]
    for start, known in ((0, 0), (2, 3), (4, 3), (0, 4)):
        times = [index / 2 for index in range(start, start + 8)]
        answer = pair.vlm.generate(Video(frames[start : start + 8], times_s=times), QUESTION, max_new_tokens=1)
        assert (answer.views, answer.cached_views) == (4, known)


def test_a_conversation_keeps_its_video(third: Pair, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", [static(seed, 24, 32) for seed in range(4)])
    chat = third.vlm.chat(max_new_tokens=4)
    first = chat.ask(QUESTION, str(path))
    path.unlink()
    second = chat.ask("And then?")
    assert second.views == second.cached_views == first.views == 2
    assert second.image_tokens == first.image_tokens
    assert second.cached_tokens >= first.prompt_tokens - 1


def test_times_are_told_to_the_model(third: Pair) -> None:
    frames = [moving_square(number, 24, 32) for number in range(3)]
    visual = third.visual(Video(frames, times_s=[10, 10.5, 12]))
    assert visual.layout == Clip(visual.layout.grid, (10.25, 12.0), 2.0)
    text = third.family.image_text(visual.layout)
    assert text.startswith("<10.2 seconds><|vision_start|>")
    assert "<12.0 seconds>" in text


SEEKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "mp4, B-frames": ("clip.mp4", {"codec": "libx264", "pixels": "yuv420p", "gop_size": 12, "max_b_frames": 2}),
    "mkv": ("clip.mkv", {"codec": "libx264", "pixels": "yuv420p", "gop_size": 12, "max_b_frames": 2}),
    "ts": ("clip.ts", {"codec": "mpeg2video", "pixels": "yuv420p", "gop_size": 12, "max_b_frames": 0, "rate": 25}),
    "avi": ("clip.avi", {"codec": "mpeg4", "pixels": "yuv420p", "gop_size": 12}),
    "one key frame": ("clip.mp4", {"codec": "libx264", "pixels": "yuv420p", "gop_size": 1000}),
}


@pytest.mark.parametrize("frames", [1, 5, 17, 118])
@pytest.mark.parametrize("container", SEEKABLE)
def test_the_frames_that_are_asked_for_are_found(third: Pair, container: str, frames: int, tmp_path: Path) -> None:
    name, options = SEEKABLE[container]
    path = make_clip(tmp_path / name, [moving_square(number) for number in range(120)], **options)
    found = load_frames(Video(path, frames=frames), third.family, HIGH)
    wanted = np.linspace(0, 119, frames).round()
    assert numbers(found) == wanted.astype(int).tolist()
    rate = options.get("rate", RATE)
    np.testing.assert_allclose(found.times_s, wanted / rate)
    assert {frame.shape for frame in found.pixels} == {found.pixels[0].shape}


def test_a_long_clip_is_sampled(third: Pair, tmp_path: Path) -> None:
    """Two hours at a frame a second: key frames are sought, 64 frames kept at the size of views."""
    path = make_clip(
        tmp_path / "long.mp4",
        [moving_square(number % 120, 64, 96) for number in range(7200)],
        "libx264",
        "yuv420p",
        1,
        gop_size=10,
    )
    found = load_frames(Video(path), third.family, ImageBudget())
    assert len(found.pixels) == 64
    assert numbers(found) == [place % 120 for place in np.linspace(0, 7199, 64).round().astype(int).tolist()]
    assert found.times_s[-1] == 7199
    with pytest.raises(PromptError, match="use fewer pictures or frames"):
        third.vlm.generate(Video(path, frames=768), QUESTION)


def test_folders_gifs_bytes_and_lists_are_videos(third: Pair, tmp_path: Path) -> None:
    frames = [moving_square(number, 24, 32) for number in range(11)]
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{number}.png")
    (folder / "notes.txt").write_text("no frame", encoding="utf-8")
    family = third.family
    from_folder = load_frames(Video(folder, fps=4), family, HIGH)
    assert numbers(from_folder) == list(range(11))
    assert from_folder.times_s == [number / 4 for number in range(11)]
    assert numbers(load_frames(Video(folder, frames=3), family, HIGH)) == [0, 5, 10]
    assert numbers(load_frames(Video(frames), family, HIGH)) == list(range(11))
    clip = make_clip(tmp_path / "clip.mkv", frames)
    assert numbers(load_frames(Video(clip.read_bytes(), frames=3), family, HIGH)) == [0, 5, 10]
    gif = tmp_path / "clip.gif"
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(gif, save_all=True, append_images=rest, duration=125, loop=0)
    found = load_frames(Video(gif, frames=3), family, HIGH)
    assert numbers(found) == [0, 5, 10]
    np.testing.assert_allclose(found.times_s, [0, 5 / 8, 10 / 8], atol=0.05)
    kinds = [type(each) for each in as_visuals([str(clip), folder, str(gif), frames[0]])]
    assert kinds == [Video, Video, str, np.ndarray]


def test_frames_are_turned_as_the_file_asks(third: Pair, tmp_path: Path) -> None:
    """A phone held upright writes rows as columns, and a matrix that turns them clockwise."""
    path = make_clip(tmp_path / "clip.mp4", [moving_square(5)] * 3, "libx264", "yuv420p")
    still, turned = (
        b"".join(value.to_bytes(4, "big", signed=True) for value in (a, b, 0, c, d, 0))
        for a, b, c, d in ((65536, 0, 0, 65536), (0, 65536, -65536, 0))
    )
    whole, track, rest = path.read_bytes().split(still)  # the file's own matrix, and the track's
    path.write_bytes(whole + still + track + turned + rest)
    frames = load_frames(Video(path), third.family, HIGH)
    height, width = frames.pixels[0].shape[:2]
    assert height > width
    upright = np.rot90(frames.pixels[0], 1)
    assert numbers(Frames([upright], [0], 1, 1)) == [5]


def test_a_cover_picture_is_no_video(third: Pair, tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sounds: Any = container.add_stream("aac", rate=8000)
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(moving_square(1), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(sounds.encode(frame))
        container.mux(sounds.encode())
    with pytest.raises(VideoError, match="holds no video"):
        load_frames(Video(path), third.family, HIGH)


def test_one_frame_is_a_video_too(pair: Pair, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", [moving_square(1, 24, 32)])
    visual = pair.visual(Video(path))
    assert len(visual) == 1
    assert np.array_equal(*visual.views[0].pixels)
    assert pair.vlm.generate(Video(path), QUESTION, max_new_tokens=1).views == 1


def test_budgets_bound_the_views(pair: Pair) -> None:
    video = Video([static(seed, 200, 300) for seed in range(4)])
    for budget in (ImageBudget("low"), ImageBudget(max_image_tokens=5), ImageBudget("high", 12)):
        visual = pair.family.preprocess_video(load_frames(video, pair.family, budget))
        assert visual.layout.grid.tokens <= (budget.max_image_tokens or 64)
    assert len(pair.family.sample_frames(500, 8, FrameSampling(), ImageBudget(max_views=3))) <= 6
    assert len(pair.family.sample_frames(500, 8, FrameSampling(), ImageBudget())) == 64
    assert len(pair.family.sample_frames(500, 8, FrameSampling(), HIGH)) in (124, 125)


def sound(path: Path) -> Path:
    """Write a clip of sound alone."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: Path, length: int) -> Path:
    """Write the beginning of a clip."""
    clip = make_clip(path, [moving_square(number) for number in range(30)], "libx264", "yuv420p")
    path.write_bytes(clip.read_bytes()[:length])
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def emptied(path: Path) -> Path:
    path.mkdir()
    return path


def unknown(path: Path) -> Path:
    """Write a clip in a codec that nobody knows."""
    data = make_clip(path, [moving_square(number) for number in range(3)], "libvpx", "yuv420p").read_bytes()
    path.write_bytes(data.replace(b"V_VP8", b"V_XY8"))
    return path


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nhttp://127.0.0.1:9/part.ts\n#EXT-X-ENDLIST\n"
BAD: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "missing": ("no.mp4", lambda path: path, "no such video file: "),
    "empty": ("clip.mp4", lambda path: written(path, b""), " is empty, not a video"),
    "text": ("clip.mp4", lambda path: written(path, b"Dear diary"), " cannot be read as a video, it may be damaged: "),
    "playlist": ("clip.ts", lambda path: written(path, PLAYLIST), " cannot be read as a video, it may be damaged: "),
    "without its end": ("clip.mp4", lambda path: cut(path, 2000), " cannot be read as a video, it may be damaged: "),
    "unknown codec": ("clip.mkv", unknown, " has video of a codec that PyAV does not decode here"),
    "sound": ("clip.mp4", sound, " holds no video, only sound or text"),
    "empty folder": ("frames", emptied, " is a folder without pictures; "),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_video(third: Pair, case: str, tmp_path: Path) -> None:
    name, make, message = BAD[case]
    path = make(tmp_path / name)
    for look in (lambda: probe_video(Video(path)), lambda: load_frames(Video(path), third.family, HIGH)):
        with pytest.raises(VideoError) as error:
            look()
        assert message in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_broken_stream_is_an_error_or_its_good_frames(third: Pair, tmp_path: Path) -> None:
    """Whatever bytes are turned over."""
    frames = [static(number, 48, 64) for number in range(16)]
    whole = make_clip(tmp_path / "clip.mkv", frames, "libx264", "yuv420p").read_bytes()
    random = np.random.default_rng(5)
    for _ in range(12):
        data = bytearray(whole)
        for place in random.integers(len(data) // 4, len(data), 40):
            data[place] ^= 0xFF
        try:
            found = load_frames(Video(bytes(data), frames=6), third.family, HIGH)
        except VideoError as error:
            assert "\n" not in str(error)
        else:
            assert 1 <= len(found.pixels) <= 6
    short = load_frames(Video(whole[: len(whole) * 2 // 3]), third.family, HIGH)  # a recording that was cut off
    assert 4 <= len(short.pixels) < 16


def test_wrong_samplings(third: Pair) -> None:
    frames = [moving_square(number, 24, 32) for number in range(3)]
    for wrong in ({"fps": 0}, {"fps": float("nan")}, {"frames": 0}, {"fps": 1, "frames": 1}, {"times_s": [0, 1]}):
        with pytest.raises(OptionError):
            Video(frames, **wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="must rise"):
        Video(frames, times_s=[0, 2, 1])
    with pytest.raises(VideoError, match="has no frames"):
        load_frames(Video([]), third.family, HIGH)
    with pytest.raises(VideoError, match="more than 768"):
        load_frames(Video([frames[0]] * 769), third.family, HIGH)
    with pytest.raises(ImageError, match="times longer"):
        load_frames(Video([np.zeros((8, 2000, 3), np.uint8)]), third.family, HIGH)


def test_a_family_without_video_says_so(exported: Path, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", [moving_square(number) for number in range(3)])
    with pytest.raises(VideoError, match=r"^this model takes pictures, not video; "):
        VLM(exported, F32).generate(str(path), QUESTION)


def test_without_pyav_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    path = written(tmp_path / "clip.mp4", b"clip")
    with pytest.raises(VideoError, match=r"^videos need PyAV; install it with: pip install 'edgevlm\[video\]'$"):
        probe_video(Video(path))


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["run", *map(str, arguments)])


def test_the_command_line_takes_videos(third: Pair, tmp_path: Path) -> None:
    frames = [moving_square(number, 24, 32) for number in range(20)]
    path = make_clip(tmp_path / "clip.mkv", frames)
    options = ("-m", third.vlm.folder, "--device", "CPU", "--no-cache", "--max-new-tokens", 2, "--json")
    result = run(path, QUESTION, *options, "--frames", 6)
    assert result.exit_code == 0, result.output
    assert '"views": 3' in result.stdout
    result = run(path, QUESTION, *options, "--fps", 4)
    assert '"views": 5' in result.stdout
    result = run(path, QUESTION, "--fps", 4, "--frames", 6, *options)
    assert result.exit_code != 0
    result = run(path, *options)
    assert result.exit_code != 0


def test_the_server_takes_videos(third: Pair, exported: Path, tmp_path: Path) -> None:
    data = make_clip(tmp_path / "clip.mkv", [static(seed, 24, 32) for seed in range(20)]).read_bytes()

    def body(content: bytes = data, **fields: Any) -> dict[str, Any]:
        url = "data:video/x-matroska;base64," + base64.b64encode(content).decode()
        video = {"type": "video_url", "video_url": {"url": url, **fields}}
        return {"messages": [{"role": "user", "content": [video, {"type": "text", "text": QUESTION}]}], "max_tokens": 2}

    with serving(third.vlm) as server:
        counts = []
        for fields in ({}, {"frames": 8}, {"fps": 8}):
            status, _, answer = request(server, "POST", "/v1/chat/completions", body(**fields))
            assert status == 200, answer
            counts.append(json.loads(answer)["usage"]["prompt_tokens_details"]["image_tokens"])
        assert counts[0] < counts[1] < counts[2]
        wrong = [({"frames": 0}, "frames"), ({"fps": 1, "frames": 1}, "exclude each other"), ({"tracks": 1}, "tracks")]
        for fields, message in wrong:
            status, _, answer = request(server, "POST", "/v1/chat/completions", body(**fields))
            assert status == 400
            assert message in json.loads(answer)["error"]["message"]
        status, _, answer = request(server, "POST", "/v1/chat/completions", body(b"no clip"))
        error = json.loads(answer)["error"]
        assert (status, error["code"]) == (400, "invalid_video")
        assert error["param"] == "messages.0.content.0.video_url"
    with serving(VLM(exported, F32)) as server:
        status, _, answer = request(server, "POST", "/v1/chat/completions", body())
        assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_video")


class Smol:
    """An export of a tiny SmolVLM2, and transformers on the same checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = make_checkpoint(folder / "saved", "smolvlm", max_position_embeddings=2048)
        settings = read_json(self.checkpoint / "preprocessor_config.json")
        sampling = {"fps": 1, "max_frames": 12, "video_size": {"longest_edge": 96}}
        write_json(self.checkpoint / "preprocessor_config.json", settings | {"video_sampling": sampling})
        out = export(self.checkpoint, folder / "out", ExportOptions("fp32", via="native", verify=False)).folder
        self.vlm = VLM(out, F32)
        self.reference = make_reference(self.checkpoint)

    def video_processor(self) -> Any:
        """Return the reference's video processor, from the checkpoint's file."""
        return transformers.SmolVLMVideoProcessor.from_pretrained(self.checkpoint)

    def prepare(self, video: Video) -> Any:
        """Return the prompt of a question about a video."""
        return self.vlm.prepare([user_message(QUESTION, ["video"])], [video], GenerationConfig(), Stopwatch(), HIGH)


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Smol:
    return Smol(tmp_path_factory.mktemp("smol"))


@needs_torchvision
@pytest.mark.parametrize("size", [(64, 64), (70, 130), (40, 24)])
def test_smolvlm2_s_prompt_and_pixels_equal_the_reference(smol: Smol, size: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip("num2words")
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE
    from transformers.video_utils import VideoMetadata

    frames = [static(seed, *size) for seed in range(40)]
    path = make_clip(tmp_path / "clip.mkv", frames)
    words = smol.reference.processor.tokenizer
    pictures = smol.reference.processor.image_processor
    processor = transformers.SmolVLMProcessor(pictures, words, smol.video_processor(), image_seq_len=4)
    text = words.apply_chat_template(
        [user_message(QUESTION, ["video"])],
        chat_template=DEFAULT_CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    expected = processor(
        text=[text],
        videos=[torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)],
        video_metadata=[VideoMetadata(total_num_frames=40, fps=float(RATE), duration=40 / RATE)],
        do_sample_frames=True,
        return_tensors="pt",
    )
    assert smol.prepare(Video(path)).ids == expected["input_ids"][0].tolist()
    family: Any = smol.vlm.processor.family
    visual = family.preprocess_video(load_frames(Video(path), family, HIGH))
    found = np.concatenate([view.inputs()[PIXEL_VALUES] for view in visual.views])
    wanted = expected["pixel_values"][0].numpy()
    assert found.shape == wanted.shape == (5, 3, 64, 64)
    level = float(np.diff(family.video_lookup).max())
    assert np.abs(found - wanted).max() <= 2.001 * level
    assert np.mean(found != wanted) < 0.05


@needs_torchvision
def test_smolvlm2_s_sampling_equals_the_reference(smol: Smol) -> None:
    from transformers.video_utils import VideoMetadata

    processor, family = smol.video_processor(), smol.vlm.processor.family
    assert (processor.num_frames, processor.fps) == (12, 1)
    for total in (1, 2, 5, 24, 61, 300, 1801, 20000):
        for rate in (1.0, 8.0, 23.976, 30.0):
            metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
            for fps in (None, 0.3, 1, 2, 5.5):
                wanted = processor.sample_frames(metadata, fps=fps).tolist()
                assert family.sample_frames(total, rate, FrameSampling(fps), HIGH) == wanted, (total, rate, fps)


def test_smolvlm2_s_embeddings_and_tokens_equal_the_reference(smol: Smol, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", [static(seed, 40, 56) for seed in range(40)])
    video, family = Video(path), smol.vlm.processor.family
    prompt = smol.prepare(video)
    visual = family.preprocess_video(load_frames(video, family, HIGH))
    values = torch.from_numpy(np.concatenate([view.inputs()[PIXEL_VALUES] for view in visual.views]))[None]
    ids = torch.tensor([prompt.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": values}
    model = smol.reference.model
    with torch.inference_mode():
        features = np.concatenate([each.reshape(-1, 64) for each in model.get_image_features(values).pooler_output])
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, len(prompt.ids) :].tolist()
    rows = family.image_rows(np.asarray(prompt.ids))
    np.testing.assert_allclose(prompt.inputs_embeds[0, rows], features, atol=1e-4)
    answer = smol.vlm.generate(video, QUESTION, image_budget=HIGH, max_new_tokens=TOKENS)
    assert list(answer.token_ids) == tokens[: len(answer.token_ids)]
    assert answer.views == answer.cached_views == 5
    later = Video([static(seed, 40, 56) for seed in (8, 16, 39, 40)], times_s=[1, 2, 5, 6])
    sampled = family.sample_frames(40, RATE, video.sampling, HIGH)
    known = len({8, 16, 39, 40} & {*sampled})
    assert smol.vlm.generate(later, QUESTION, max_new_tokens=1).cached_views == known > 0


def test_numbers_in_words() -> None:
    written = {1: "one", 12: "twelve", 20: "twenty", 64: "sixty-four", 100: "one hundred"}
    written |= {305: "three hundred and five", 768: "seven hundred and sixty-eight"}
    assert {number: in_words(number) for number in written} == written
