"""Finding things in pictures: from what a model writes to pixels, and by every way a user can ask."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edgevlm import (
    VLM,
    Answer,
    DeviceError,
    GenerationConfig,
    ImageBudget,
    ImageError,
    IncompleteAnswerError,
    Locations,
    OptionError,
    PromptError,
    TokenLogprob,
)
from edgevlm.decoding.stream import collect
from edgevlm.families import LOCATING, make_family
from edgevlm.families.base import DETAILS
from edgevlm.inputs import image as image_module
from edgevlm.inputs.image import load_image, load_picture
from edgevlm.locate import MAX_LOCATIONS, MAX_PHRASE, Search
from edgevlm.locations import unturned
from edgevlm.server.run import Server
from edgevlm.strict_json import read_json
from edgevlm_export import ExportOptions, export
from tests.conftest import F32, noise, photograph
from tests.families.qwen_vl import BOX_TOKENS, TOKENS, make_checkpoint
from tests.helpers.command import POSIX, cli
from tests.helpers.serving import data_url, request, serving
from training.scenes.shapes import pointed_at

ROOT = Path(__file__).parents[1]
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
RED, GROUND = (210, 30, 40), (228, 226, 220)
PHRASE = "the red valve"
STORED = {  # how a file stores an upright picture, by EXIF orientation (Exif 3.0, 4.6.5.1.5)
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright[::-1].swapaxes(0, 1),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny seeded checkpoint of each Qwen-VL with the tokens around boxes, exported without compression."""
    folder = tmp_path_factory.mktemp("qwen")
    tokens = [*TOKENS, *BOX_TOKENS]
    return {
        kind: export(
            make_checkpoint(folder / kind, kind, tokens=tokens),
            folder / f"{kind}-fp32",
            ExportOptions("fp32", verify=False),
        ).folder
        for kind in QWEN
    }


@pytest.fixture(scope="module")
def models(exports: dict[str, Path]) -> dict[str, VLM]:
    return {kind: VLM(folder, F32) for kind, folder in exports.items()}


@pytest.fixture(scope="module")
def panel() -> VLM:
    return VLM("panel", F32)


def places(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an answer that tells the places, scores to four digits: a cached prompt rounds differently."""
    names = ("phrase", "locations", "width", "height", "orientation", "dropped")
    rounded = [{**each, "score": pytest.approx(each["score"], rel=1e-4)} for each in answer["locations"]]
    return {name: answer[name] for name in names} | {"locations": rounded}


# From what a model writes to pixels


def written(vlm: VLM, text: str) -> Answer:
    """Return the answer of a model that has written `text`, in its own tokens, each with a log-probability of -0.5."""
    blank = vlm.generate(noise(32, 32), "?", max_new_tokens=1)
    ids = vlm.processor.tokenizer.encode(text, add_special_tokens=False)
    tokens = tuple(TokenLogprob(each, vlm.grammar_tokenizer.token_bytes(each), -0.5) for each in ids)
    return replace(blank, text=text, token_ids=tuple(ids), logprobs=tokens, satisfied=True)


def said(kind: str, *boxes: Sequence[int]) -> str:
    """Return boxes as a model of one kind writes them."""
    if kind == "qwen2_vl":
        return "".join("<|box_start|>({},{}),({},{})<|box_end|>".format(*box) for box in boxes)
    rows = ",".join(f'\n\t{{"bbox_2d": {[*box]}, "label": "red valve"}}' for box in boxes)
    return f"```json\n[{rows}\n]\n```" if boxes else "```json\n[]\n```"


def find(vlm: VLM, text: str, picture: Any, budget: ImageBudget | None = None) -> Locations:
    search = Search.of(vlm.processor.family, PHRASE, MAX_LOCATIONS)
    return search.read(written(vlm, text), load_picture(picture), budget or ImageBudget())


def drawn(width: int, height: int, box: Sequence[int]) -> np.ndarray:
    """Return a picture `(height, width, 3)` with a red box from pixel x1, y1 up to, not including, x2, y2."""
    pixels = np.full((height, width, 3), GROUND, np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = RED
    return pixels


def extent(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box around all that is red."""
    rows, cols = np.nonzero((pixels == RED).all(axis=-1))
    return int(cols.min()), int(rows.min()), int(cols.max()) + 1, int(rows.max()) + 1


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", QWEN)
def test_a_drawn_box_comes_back_from_every_orientation(
    models: dict[str, VLM], tmp_path: Path, kind: str, orientation: int, suffix: str
) -> None:
    vlm, upright = models[kind], drawn(200, 100, (25, 25, 150, 50))
    path, exif = tmp_path / f"picture{suffix}", Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    assert np.array_equal(load_image(path), upright)
    assert vlm.processor.family.resized(100, 200, ImageBudget()) == (32, 64)
    box = [8, 8, 48, 16] if kind == "qwen2_5_vl" else [125, 250, 750, 500]
    found = find(vlm, said(kind, box), path)
    assert (found.size, found.orientation, found.dropped) == ((200, 100), orientation, 0)
    assert found.stored_size == stored.shape[1::-1]
    [place], [turned] = found.locations, found.stored()
    assert place.point is turned.point is None
    assert place.box == extent(upright)
    assert turned.box == extent(stored)
    with Image.open(path) as image:
        in_hand = find(vlm, said(kind, box), image)
    assert (in_hand.locations, in_hand.stored()) == (found.locations, found.stored())


@pytest.mark.parametrize("kind", QWEN)
@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize(("width", "height"), [(640, 427), (427, 640), (96, 64), (33, 77), (300, 40), (8, 8)])
def test_resized_is_the_size_that_the_encoder_sees(
    models: dict[str, VLM], kind: str, detail: Any, width: int, height: int
) -> None:
    """Qwen2.5-VL's pixels are those of the view: a corner of it is the picture's corner, whatever the resize."""
    family, budget = models[kind].processor.family, ImageBudget(detail)
    picture = np.asarray(Image.fromarray(photograph("china.jpg")).resize((width, height)))
    [view] = family.preprocess(picture, budget).views
    seen = family.resized(height, width, budget)
    assert seen == view.pixels.shape[:2]
    full = [0, 0, seen[1], seen[0]] if kind == "qwen2_5_vl" else [0, 0, 1000, 1000]
    [place] = find(models[kind], said(kind, full), picture, budget).locations
    assert place.box == (0, 0, width, height)


def test_a_crop_moves_a_box_by_its_corner(models: dict[str, VLM]) -> None:
    whole = drawn(400, 200, (120, 60, 280, 160))
    crop = whole[40:180, 100:300]
    for pixels, box in ((whole, (120, 60, 280, 160)), (crop, (20, 20, 180, 120))):
        height, width = pixels.shape[:2]
        sides = (width, height, width, height)
        numbers = [round(1000 * each / side) for each, side in zip(box, sides, strict=True)]
        [place] = find(models["qwen3_vl"], said("qwen3_vl", numbers), pixels).locations
        assert place.box is not None
        assert extent(pixels) == box
        off = [side / 2000 for side in sides]
        assert all(abs(a - b) <= most for a, b, most in zip(place.box, box, off, strict=True))


@pytest.mark.parametrize("kind", QWEN)
def test_boxes_are_clipped_sorted_and_those_without_area_left_out(models: dict[str, VLM], kind: str) -> None:
    vlm, picture = models[kind], noise(64, 128)
    height, width = vlm.processor.family.resized(64, 128, ImageBudget()) if kind == "qwen2_5_vl" else (1000, 1000)
    half = [width // 2, height // 2]
    boxes = [[*half, 0, 0], [0, 0, *half], [0, 0, 0, height], [width, height, width, height]]
    found = find(vlm, said(kind, *boxes), picture)
    assert [each.box for each in found.locations] == [(0, 0, 64, 32)]
    assert found.dropped == 3
    if kind == "qwen2_5_vl":
        beyond = find(vlm, said(kind, [*half, 99999, 99999], [width + 1, 0, width + 9, height]), picture)
        assert [each.box for each in beyond.locations] == [(64, 32, 128, 64)]
        assert beyond.dropped == 1
    if kind != "qwen2_vl":
        assert find(vlm, said(kind), picture).locations == ()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_point_turns_with_its_picture(orientation: int) -> None:
    upright = np.zeros((3, 5), np.uint8)
    upright[2, 1] = 1
    [[row, col]] = np.argwhere(STORED[orientation](upright))
    assert unturned((1.5, 2.5), (5, 3), orientation) == (col + 0.5, row + 0.5)


def test_a_score_is_the_mean_over_the_tokens_of_coordinates(models: dict[str, VLM]) -> None:
    vlm = models["qwen3_vl"]
    answer = written(vlm, said("qwen3_vl", [1, 42, 300, 421], [5, 6, 7, 8]))
    text, spans = "", []
    for token in answer.logprobs:
        spans.append((len(text), len(text) + len(token.text)))
        text += token.text
    places = [found.span(1) for found in re.finditer(r"\[(\d+, \d+, \d+, \d+)\]", text)]
    digits = [{at for at in range(*span) if text[at].isdigit()} for span in places]
    logprobs = [-0.01 * number for number in range(len(spans))]
    counted = [
        [logprob for span, logprob in zip(spans, logprobs, strict=True) if digits_of & set(range(*span))]
        for digits_of in digits
    ]
    tokens = tuple(replace(token, logprob=each) for token, each in zip(answer.logprobs, logprobs, strict=True))
    search = Search.of(vlm.processor.family, PHRASE, 9)
    found = search.read(replace(answer, logprobs=tokens), load_picture(noise(50, 50)), ImageBudget())
    expected = [math.exp(sum(each) / len(each)) for each in counted]
    assert [place.score for place in found.locations] == pytest.approx(expected, rel=1e-12)
    assert all(0 < place.score < 1 for place in found.locations)


def test_logits_that_are_no_numbers_are_an_error(models: dict[str, VLM]) -> None:
    vlm = models["qwen3_vl"]
    answer = written(vlm, said("qwen3_vl", [1, 2, 3, 4]))
    tokens = tuple(replace(token, logprob=math.nan) for token in answer.logprobs)
    with pytest.raises(DeviceError, match="no numbers"):
        Search.of(vlm.processor.family, PHRASE, 9).read(
            replace(answer, logprobs=tokens), load_picture(noise(50, 50)), ImageBudget()
        )


# Under the grammar


PHRASES = (
    PHRASE,
    'a "{label}" \\ <|im_end|><|box_start|>(1,2),(3,4)<|box_end|>',
    '"bbox_2d": [1, 2, 3, 4]',
    "Größe 東京 🙂",
)


@pytest.mark.parametrize("phrase", PHRASES)
@pytest.mark.parametrize("kind", QWEN)
def test_what_is_written_always_parses(models: dict[str, VLM], kind: str, phrase: str) -> None:
    """A seeded model knows nothing: whatever it writes is the family's convention, read by another parser."""
    for height, width in ((64, 64), (90, 130), (130, 40)):
        found = models[kind].locate(noise(height, width), phrase, max_locations=3)
        assert found.answer.satisfied
        assert found.answer.finish_reason == "stop"
        boxes = parsed(kind, b"".join(token.data for token in found.answer.logprobs).decode(), phrase)
        assert len(boxes) == len(found.locations) + found.dropped <= 3
        assert found.size == (width, height)
        for place in found.locations:
            assert place.label == phrase
            assert place.box is not None and 0 < place.score <= 1
            left, top, right, bottom = place.box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def parsed(kind: str, text: str, phrase: str) -> list[list[int]]:
    """Return the boxes of an answer as the published models' own users read them."""
    if kind == "qwen2_vl":
        pattern = r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>"
        assert re.fullmatch(f"(?:{pattern})+", text), text
        return [[*map(int, box)] for box in re.findall(pattern, text)]
    fenced = re.fullmatch(r"```json\n(.*)\n?```", text, re.DOTALL)
    assert fenced, text
    rows = json.loads(fenced[1])
    label = re.sub("^(the|a) ", "", phrase)
    assert all(row["label"] == label and len(row["bbox_2d"]) == 4 and len(row) == 2 for row in rows)
    return [row["bbox_2d"] for row in rows]


@pytest.mark.parametrize("kind", QWEN)
def test_it_is_the_same_every_time(models: dict[str, VLM], kind: str) -> None:
    first, second = (models[kind].locate(noise(90, 130), PHRASE, max_locations=5) for _ in range(2))
    assert first.places() == second.places()
    assert first.answer.token_ids == second.answer.token_ids


def test_some_of_it_is_boxes(models: dict[str, VLM]) -> None:
    """Else the tests above would be about nothing."""
    pictures = [noise(60 + 10 * number, 100) for number in range(8)]
    found = [models[kind].locate(each, PHRASE, max_locations=3) for kind in QWEN for each in pictures]
    assert sum(len(each.locations) for each in found) >= 3


def test_an_answer_that_the_context_cuts_is_an_error(models: dict[str, VLM]) -> None:
    vlm = models["qwen2_vl"]
    search = Search.of(vlm.processor.family, PHRASE, 1)
    with pytest.raises(IncompleteAnswerError, match="not whole"):
        collect(vlm.events(search.messages, [noise(64, 64)], search.config(GenerationConfig(), 4)))


# The bundled model


def star(width: int, height: int, x: float, y: float, colour: tuple[int, int, int] = RED) -> Image.Image:
    """Return plain ground with a star around x, y."""
    image, radius = Image.new("RGB", (width, height), GROUND), min(width, height) * 0.12
    turns = [(radius if corner % 2 == 0 else 0.45 * radius, corner * math.pi / 5) for corner in range(10)]
    ImageDraw.Draw(image).polygon([(x + r * math.sin(a), y - r * math.cos(a)) for r, a in turns], fill=colour)
    return image


@pytest.mark.parametrize(("width", "height"), [(400, 300), (640, 480), (300, 500), (800, 300), (1200, 900)])
@pytest.mark.parametrize(("across", "down"), [(0.25, 0.27), (0.78, 0.62), (0.5, 0.8), (0.8, 0.2)])
def test_the_bundled_model_points_at_a_star(panel: VLM, width: int, height: int, across: float, down: float) -> None:
    found = panel.locate(star(width, height, across * width, down * height), "the red star")
    [place] = found.locations
    assert place.box is None and place.point is not None
    # Within the tolerance of its training: 6 % of each side.
    assert abs(place.point[0] - across * width) <= 0.06 * width
    assert abs(place.point[1] - down * height) <= 0.06 * height
    assert place.label == "the red star"


def test_the_bundled_model_points_in_a_turned_photograph(panel: VLM, tmp_path: Path) -> None:
    upright, exif = star(300, 400, 90, 300), Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.jpg"
    Image.fromarray(np.ascontiguousarray(STORED[6](np.asarray(upright)))).save(path, exif=exif, quality=95)
    found = panel.locate(path, "star")
    assert (found.size, found.stored_size, found.orientation) == ((300, 400), (400, 300), 6)
    [place], [stored] = found.locations, found.stored()
    assert place.point is not None and stored.point is not None
    assert abs(place.point[0] - 90) <= 18 and abs(place.point[1] - 300) <= 24
    assert stored.point == (place.point[1], 300 - place.point[0])


# What cannot be


def test_a_model_without_a_convention_says_which_have_one(vlm: VLM) -> None:
    with pytest.raises(OptionError, match=re.escape(LOCATING)) as caught:
        vlm.locate(noise(64, 64), PHRASE)
    assert "\n" not in str(caught.value)


def test_what_a_model_is_asked(models: dict[str, VLM], panel: VLM) -> None:
    """In the words of the published models' cookbooks, and of the bundled model's training."""

    def asked(vlm: VLM, phrase: str) -> str:
        [message] = Search.of(vlm.processor.family, phrase, 1).messages
        assert [each["type"] for each in message["content"]] == ["image", "text"]
        return str(message["content"][1]["text"])

    told = asked(models["qwen2_5_vl"], "the  top right\nbrown cake")
    assert told == "Locate the top right brown cake, output its bbox coordinates using JSON format."
    assert asked(models["qwen3_vl"], "the {phrase}").startswith("Locate every instance")
    assert '"{phrase}". Report bbox' in asked(models["qwen3_vl"], "the {phrase}")
    assert asked(models["qwen2_vl"], PHRASE).endswith("sentence describes: the red valve")
    for phrase in ("star", "the star", "A star"):
        assert asked(panel, phrase) in pointed_at("star")


def test_a_tokenizer_without_the_convention_s_tokens_is_an_error(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2_vl")
    folder = export(checkpoint, tmp_path / "export", ExportOptions("fp32", verify=False)).folder
    with pytest.raises(OptionError, match=r"box_start") as caught:
        VLM(folder, F32).locate(noise(64, 64), PHRASE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("phrase", ["", "  \n", "a\x00b", "\ud800", "x" * (MAX_PHRASE + 1), None])
def test_a_phrase_that_cannot_be_looked_for(panel: VLM, phrase: Any) -> None:
    with pytest.raises(PromptError, match="look for"):
        panel.locate(noise(64, 64), phrase)


def test_pictures_and_numbers_that_cannot_be(panel: VLM, models: dict[str, VLM]) -> None:
    with pytest.raises(ImageError, match="no such image file"):
        panel.locate("nonesuch.png", PHRASE)
    for images in ([noise(8, 8), noise(8, 8)], [], None):
        with pytest.raises(ImageError, match="one picture"):
            panel.locate(images, PHRASE)  # type: ignore[arg-type]
    for most in (0, MAX_LOCATIONS + 1):
        with pytest.raises(OptionError, match="max_locations"):
            panel.locate(noise(8, 8), PHRASE, max_locations=most)
    with pytest.raises(OptionError, match="no option"):
        panel.locate(noise(8, 8), PHRASE, detial="low")
    found = models["qwen3_vl"].locate(noise(64, 64), PHRASE)
    with pytest.raises(ImageError, match="64x64 pixels, and this one has 32x64"):
        found.draw(noise(64, 32))


# On the command line

EXACT = ("--inference-precision", "f32", "--no-cache")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    star(400, 300, 100, 80).save(tmp_path / "star.png")
    return tmp_path / "star.png"


def test_the_command_prints_places(picture: Path, panel: VLM) -> None:
    [place] = panel.locate(picture, "the red star").locations
    assert place.point is not None
    result = cli("locate", picture, "the red star", "-m", "panel", *EXACT)
    x, y = place.point
    assert (result.exit_code, result.stdout) == (0, f"1  point {x:.1f} {y:.1f}  score {place.score:.2f}\n")
    assert result.stderr == ""
    piped = cli("locate", "-", "the red star", "-m", "panel", *EXACT, stdin=picture.read_bytes())
    assert piped.stdout == result.stdout


def test_the_command_prints_json_and_draws(picture: Path, panel: VLM, tmp_path: Path) -> None:
    before = picture.read_bytes()
    for name in ("marked.png", "marked.jpg", "marked.webp"):
        output = tmp_path / name
        result = cli("locate", picture, "the red star", "-m", "panel", *EXACT, "--json", "-o", output)
        assert result.exit_code == 0, result.stderr
        printed = read_json(result.stdout)
        found = panel.locate(picture, "the red star")
        assert found.places() == places(printed)
        assert {"answer", "timings", "generated_tokens"} <= set(printed)
        with Image.open(output) as marked:
            assert marked.size == (400, 300)
            changed = np.abs(np.asarray(marked.convert("RGB")).astype(int) - load_image(picture)).max(axis=-1) > 100
        [place] = found.locations
        assert place.point is not None
        rows, cols = np.nonzero(changed)
        assert len(rows) > 10
        assert abs(cols - place.point[0]).max() < 40
        assert abs(rows - place.point[1]).max() < 40
    assert picture.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"star.png", "marked.png", "marked.jpg", "marked.webp"}


FULL_DISK = """
import resource, sys

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from edgevlm.cli.main import main

main(sys.argv[1:])
"""


@POSIX
def test_what_cannot_be_written_leaves_what_was_there(picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "marked.png"
    output.write_bytes(b"of before")
    command = [sys.executable, "-c", FULL_DISK, "locate", picture, "star", "-m", "panel", *EXACT, "-o", output]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("1  point ")
    assert done.stderr == f"Error: cannot write {output}: File too large\n"
    assert output.read_bytes() == b"of before"
    assert {each.name for each in tmp_path.iterdir()} == {"star.png", "marked.png"}


def test_a_picture_too_wide_for_the_format_is_an_error(tmp_path: Path) -> None:
    Image.new("RGB", (17000, 40), GROUND).save(tmp_path / "wide.png")
    result = cli("locate", tmp_path / "wide.png", "star", "-m", "panel", *EXACT, "-o", tmp_path / "marked.webp")
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: cannot write .*marked.webp: .*\n", result.stderr)
    assert [each.name for each in tmp_path.iterdir()] == ["wide.png"]


def test_boxes_are_drawn_where_they_are(models: dict[str, VLM]) -> None:
    pixels = np.full((100, 200, 3), GROUND, np.uint8)
    found = find(models["qwen3_vl"], said("qwen3_vl", [200, 200, 750, 700], [0, 0, 1000, 1000]), pixels)
    marked = np.asarray(found.draw(pixels))
    assert marked.shape == pixels.shape
    assert (pixels == GROUND).all()
    changed = (marked != GROUND).any(axis=-1)
    assert changed[20, 40:150].all() and changed[69, 40:150].all()
    assert changed[20:70, 40].all() and changed[20:70, 149].all()
    assert changed[0].all() and changed[-1].all() and changed[:, 0].all() and changed[:, -1].all()
    assert not changed[50:65, 80:140].any()


def test_the_command_with_boxes_and_with_nothing(
    exports: dict[str, Path], models: dict[str, VLM], tmp_path: Path
) -> None:
    options = [*EXACT, "--max-locations", "3"]
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.fromarray(noise(60 + 10 * number, 100)).save(path)
        found = models["qwen3_vl"].locate(path, PHRASE, max_locations=3)
        result = cli("locate", path, PHRASE, "-m", exports["qwen3_vl"], *options)
        assert result.exit_code == 0, result.stderr
        assert len(result.stdout.splitlines()) == len(found.locations)
        assert all(
            re.fullmatch(r"\d+  box( \d+\.\d){4}  score [01]\.\d\d", line) for line in result.stdout.splitlines()
        )
        assert ("(found nothing: the red valve)" in result.stderr) == (not found.locations)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonesuch.png", PHRASE), "no such image file: nonesuch.png"),
        (("PICTURE", " "), "say what to look for"),
        (
            ("PICTURE", PHRASE, "-o", "marked.gif"),
            "-o takes a name that ends in .png, .jpg, .jpeg, .webp, not marked.gif",
        ),
        (("PICTURE", PHRASE, "-o", "nonesuch/marked.png"), "no such folder"),
        (("PICTURE", PHRASE, "-o", "PICTURE"), "is the picture itself"),
        (("PICTURE", PHRASE, "--max-locations", "0"), "max_locations must be between 1 and 100, not 0"),
        (("PICTURE", PHRASE, "-m", "nonesuch"), "nonesuch"),
    ],
)
def test_the_command_s_errors_are_one_line(picture: Path, arguments: Sequence[str], message: str) -> None:
    before = picture.read_bytes()
    given = [str(picture) if each == "PICTURE" else each for each in arguments]
    result = cli("locate", *given, *([] if "-m" in given else ["-m", "panel"]))
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert picture.read_bytes() == before


def test_a_model_without_a_convention_on_the_command_line(exported: Path, picture: Path, tmp_path: Path) -> None:
    result = cli("locate", picture, PHRASE, "-m", exported, "-o", tmp_path / "marked.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: this model has no known way of writing places; {LOCATING} have one\n"
    assert not (tmp_path / "marked.png").exists()


def test_the_example_of_the_page_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the last digits, in which CPUs differ."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "locate.md").read_text(encoding="utf-8")
    [(command, shown)] = re.findall(r"```console\n\$ edgevlm (.*)\n(.*\n)```", page)
    result = cli(*shlex.split(command))
    assert result.exit_code == 0, result.stderr
    assert re.sub(r"[\d.]+", "#", result.stdout) == re.sub(r"[\d.]+", "#", shown)
    [printed], [told] = (re.findall(r"point (\S+) (\S+)", each) for each in (result.stdout, shown))
    with Image.open(ROOT / "examples" / "shape.png") as image:
        for ours, theirs, side in zip(printed, told, image.size, strict=True):
            assert abs(float(ours) - float(theirs)) <= 0.03 * side


# Over HTTP


@pytest.fixture(scope="module")
def server(panel: VLM) -> Iterator[Server]:
    with serving(panel, model_name="panel") as server:
        yield server


def part(image: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image), **fields}}


def locate(server: Server, **fields: Any) -> tuple[int, Any]:
    status, _, body = request(server, "POST", "/v1/locate", fields)
    return status, read_json(body)


def test_the_server_answers_as_the_api_does(server: Server, panel: VLM, picture: Path) -> None:
    status, answer = locate(server, model="panel", image=part(picture), phrase="the red star")
    assert status == 200, answer
    expected = panel.locate(picture, "the red star")
    assert expected.places() == places(answer)
    assert (answer["object"], answer["model"]) == ("locations", "panel")
    assert answer["usage"]["completion_tokens"] == expected.answer.generated_tokens
    assert answer["timings"]["total_s"] > 0
    again, same = locate(server, image=part(picture, detail="auto"), phrase="the red star", max_locations=1, user="me")
    assert again == 200
    assert expected.places() == places(same)
    assert b'edgevlm_requests_total{path="/v1/locate",status="200"}' in request(server, "GET", "/metrics")[2]


def test_the_server_decodes_the_picture_once(
    server: Server, panel: VLM, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, decode, decoded = panel.locate(picture, "the red star"), image_module._decode, []
    monkeypatch.setattr(image_module, "_decode", lambda *given: decoded.append(given) or decode(*given))
    status, answer = locate(server, image=part(picture), phrase="the red star")
    assert status == 200, answer
    assert expected.places() == places(answer)
    assert len(decoded) == 1


def test_the_server_gives_boxes_with_a_limit(models: dict[str, VLM]) -> None:
    image = Image.fromarray(noise(80, 100))
    with serving(models["qwen2_5_vl"]) as server:
        status, answer = locate(server, image=part(image), phrase=PHRASE, max_locations=2, max_image_tokens=16)
    assert status == 200, answer
    expected = models["qwen2_5_vl"].locate(image, PHRASE, max_locations=2, max_image_tokens=16)
    assert expected.places() == places(answer)


SMALL = star(64, 48, 30, 20)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"phrase": PHRASE}, "invalid_request", "image"),
        ({"image": part(SMALL)}, "invalid_request", "phrase"),
        ({"image": part(SMALL), "phrase": ""}, "invalid_request", "phrase"),
        ({"image": part(SMALL), "phrase": "  "}, "invalid_prompt", "phrase"),
        ({"image": part(SMALL), "phrase": 5}, "invalid_request", "phrase"),
        ({"image": part(SMALL), "phrase": PHRASE, "max_locations": 0}, "invalid_request", "max_locations"),
        ({"image": part(SMALL), "phrase": PHRASE, "max_image_tokens": 3}, "invalid_value", None),
        ({"image": part(SMALL), "phrase": PHRASE, "temperature": 1}, "unsupported_parameter", "temperature"),
        ({"image": part(b"no picture"), "phrase": PHRASE}, "invalid_image", "image.image_url"),
        ({"image": {"type": "image_url", "image_url": "http://x/y.png"}, "phrase": PHRASE}, "remote_image_refused",
         "image.image_url"),
        ({"image": {"type": "text", "text": "x"}, "phrase": PHRASE}, "invalid_request", "image.type"),
    ],
)  # fmt: skip
def test_the_server_s_errors(server: Server, fields: dict[str, Any], code: str, param: str | None) -> None:
    status, answer = locate(server, **fields)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, param), answer
    assert "\n" not in answer["error"]["message"]


def test_the_server_s_other_errors(server: Server, vlm: VLM, picture: Path) -> None:
    status, answer = locate(server, model="nonesuch", image=part(SMALL), phrase=PHRASE)
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    truncated = picture.read_bytes()[:-200]
    status, answer = locate(server, image=part(truncated), phrase=PHRASE)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_image", "image")
    assert request(server, "GET", "/v1/locate")[0] == 405
    with serving(vlm) as other:
        status, answer = locate(other, image=part(SMALL), phrase=PHRASE)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_value", "model")
    assert LOCATING in answer["error"]["message"]


def test_the_facts_of_the_bundled_model_are_what_it_is_known_by(panel: VLM) -> None:
    facts = dict(panel.manifest.family_config)
    assert make_family("idefics3", facts).grounding is not None
    assert make_family("idefics3", {**facts, "image_seq_len": 144}).grounding is None
