"""Granite for Docling exported natively, against transformers: tiles, taps, a second page, and what is refused."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    GraniteDoclingConfig,
    GraniteDoclingTextConfig,
    GraniteDoclingVisionConfig,
)
from transformers.models.granite_docling import image_processing_pil_granite_docling as reference_tiles

from edgevlm import VLM, GenerationConfig, ImageBudget
from edgevlm.errors import SourceError
from edgevlm.families.base import IMAGE_EMBEDS, Family
from edgevlm.families.tiling import nearest_grid
from edgevlm.inputs.chat_template import text_message, user_message
from edgevlm.jobs.convert import page_prompts
from edgevlm.metrics import Stopwatch
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import architecture, family_config
from edgevlm_export.families import granite_docling as exporter
from edgevlm_export.families.text_models import DEFAULTS
from edgevlm_export.routes import native as native_route
from edgevlm_export.samples import pixel_values
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from tests.conftest import F32, noise, photograph
from tests.families.base import Reference
from tests.families.granite_docling import (
    DOCLANG,
    IMAGE_SEQ_LEN,
    IMAGE_TOKENS,
    TILE,
    family,
    image_processor,
    make_checkpoint,
    make_reference,
    reference_pixels,
)
from tests.helpers.checkpoints import QUICK, check_class_defaults, check_refused
from tests.helpers.graphs import check_fused, runtime_kinds
from tests.helpers.json_files import read_json, write_json

QUESTION = "Convert this page to DocLang."
HIGH = ImageBudget("high")
PAGE = (
    '<doclang><heading level="2"><location value="10"/><location value="20"/><location value="400"/>'
    '<location value="500"/>Pump 12</heading><text><location value="10"/><location value="20"/>'
    '<location value="400"/><location value="500"/>The pressure is 4.2 bar.</text></doclang>'
)
SIZES = [(1, 1), (2, 3), (1, 500), (500, 1), (TILE, TILE), (3 * TILE, 4 * TILE), (33, 77), (101, 99), (427, 641)]
"""Heights and widths of pictures."""
SPREADS = [
    {"dense_max_patches": 60, "dense_max_scale": 0.8, "dense_min_aspect": 1.2, "dense_max_aspect": 4.0},
    {"dense_max_patches": 48, "dense_max_scale": 1.0},
    {"dense_max_patches": 50, "dense_min_aspect": 1.0},
    {"dense_max_patches": 8, "dense_max_scale": 0.7, "dense_max_aspect": 2.0, "max_patches": 1},
]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_patches": 32}, {"max_patches": 1}, {"min_patches": 3, "resample": 2}, {"crop_to_patches": False}],
)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_high_equals_the_reference(height: int, width: int, options: dict[str, Any]) -> None:
    processor, image = image_processor(**options), noise(height, width)
    made = family(processor if processor.crop_to_patches else image_processor(max_patches=1))
    found, wanted = made.preprocess(image, HIGH), reference_pixels(image, processor)
    assert np.array_equal(pixel_values(found.views), wanted)


def test_a_photograph_at_the_real_size_equals_the_reference() -> None:
    processor, image = image_processor(size={"height": 512, "width": 512}, max_patches=32), photograph("china.jpg")
    found = family(processor).preprocess(image, HIGH)
    assert found.layout == (2, 3)
    assert np.array_equal(pixel_values(found.views), reference_pixels(image, processor))


def test_grids_equal_the_reference() -> None:
    """Also where a side would be longer than 16 tiles."""
    sides = np.exp(np.random.default_rng(1).uniform(0, np.log(3000), (200, 2))).astype(int).tolist()
    exact = [(a * 100, b * 100) for a, b in itertools.product(range(1, 8), repeat=2)]
    longest = 0
    for (height, width), most in itertools.product([*sides, *exact], (6, 32, 60)):
        cols, rows = reference_tiles.get_optimal_tiled_canvas((height, width), (512, 512), 1, most)
        assert nearest_grid(height, width, 512, 1, most, 16) == (rows, cols), (height, width, most)
        longest = max(longest, *nearest_grid(height, width, 512, 1, most))
    assert longest > 16


@pytest.mark.parametrize("rule", SPREADS)
def test_spreads_have_the_reference_s_grids(rule: dict[str, Any]) -> None:
    processor = image_processor(size={"height": 512, "width": 512}, **{"max_patches": 20, **rule})
    made, differ = family(processor), 0
    for height, width in [(700, 1000), (1000, 700), (3000, 4200), (4200, 3000), (3000, 9000), (2000, 9000), (300, 500)]:
        grid = processor.get_tile_grid(height, width)
        most = made._most_patches(height, width)
        assert made._grid(height, width, most) == grid, (height, width)
        differ += most != processor.max_patches
    assert (differ > 0) == (processor.max_patches > 1)


@pytest.mark.parametrize("fine", [False, True])
def test_the_image_block_equals_the_reference_s(fine: bool, checkpoint: Path) -> None:
    reference = make_reference(checkpoint).processor
    made = family(image_processor(), IMAGE_SEQ_LEN * (4 if fine else 1))
    for rows, cols in [(1, 1), (1, 2), (2, 1), (3, 4), (16, 16)]:
        inputs = {"rows": [[rows]], "cols": [[cols]], **({"tile_fine_mask": None} if fine else {})}
        assert made.image_text((rows, cols)) == reference.replace_image_token(inputs, 0)


def test_image_tokens_of_a_picture_of_1600_by_1200() -> None:
    made, image = family(image_processor(size={"height": 512, "width": 512}, max_patches=32), 64), noise(1200, 1600)
    assert tokens(made, image, "high") == 13 * 64
    assert tokens(made, image, "auto") == 7 * 64
    assert tokens(made, image, "low") == 64


def tokens(made: Family, image: np.ndarray, detail: Any) -> int:
    return made.image_text(made.preprocess(image, ImageBudget(detail)).layout).count("<image>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the published form. Tests must not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("granite") / "saved")


@pytest.fixture(scope="module")
def pair(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, VLM]:
    """The reference and the export without compression, made of one piece for each stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_route, "PARTITION_WEIGHTS", 1000)
        options = ExportOptions("fp32", via="native")
        report = export(checkpoint, tmp_path_factory.mktemp("exported") / "out", options)
    assert report.verification is not None
    assert report.verification.greedy_agreement == 1
    return make_reference(checkpoint), VLM(report.folder, F32)


def test_taps_equal_the_reference_s(pair: tuple[Reference, VLM]) -> None:
    """They stand at the image tokens, and text has none."""
    reference, vlm = pair
    images = [photograph("china.jpg"), photograph("flower.jpg")[:, :200]]
    prompt = vlm.prepare([user_message(QUESTION, 2)], images, GenerationConfig(), Stopwatch(), HIGH)
    inputs = reference.inputs(images, QUESTION)
    with torch.inference_mode():
        found = reference.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])
    places = np.asarray(prompt.ids) == vlm.processor.family.image_token_id
    assert list(prompt.inputs.extras) == ["deepstack_embeds.0", "deepstack_embeds.1"]
    for rows, wanted in zip(prompt.inputs.extras.values(), found.deepstack_features, strict=True):
        np.testing.assert_allclose(rows[places], torch.cat(wanted).numpy(), atol=1e-4)
        assert not rows[~places].any()


def test_a_second_page_equals_the_reference(pair: tuple[Reference, VLM]) -> None:
    """It reuses what was computed for the first."""
    reference, vlm = pair
    pages, config = [photograph("china.jpg"), photograph("flower.jpg")[:, :300]], GenerationConfig(max_new_tokens=32)
    chat = vlm.chat(config, image_budget=HIGH)
    first, second = (chat.ask(QUESTION, page) for page in pages)
    messages = [user_message(QUESTION, 1), text_message("assistant", first.text), user_message(QUESTION, 1)]
    words = reference.processor.tokenizer
    text = words.apply_chat_template(
        messages, chat_template=reference.processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    inputs = dict(reference.processor(text=[text], images=[pages], return_tensors="pt"))
    with torch.inference_mode():
        ids = reference.model.generate(**inputs, do_sample=False, max_new_tokens=32)
    assert second.prompt_tokens == inputs["input_ids"].shape[1]
    assert list(second.token_ids) == ids[0, second.prompt_tokens :].tolist()[: len(second.token_ids)]
    assert second.cached_tokens >= first.prompt_tokens - 1
    assert (second.cached_views, second.views) == (first.views, inputs["pixel_values"].shape[1])


def test_merged_tokens_reach_the_taps_after_them_alone(checkpoint: Path, tmp_path: Path) -> None:
    """A quarter is merged in layer 2, and layers 0 and 2 are tapped."""
    options = ExportOptions("fp32", via="native", verify=False, merge_tokens=0.25)
    whole = VLM(export(checkpoint, tmp_path / "whole", QUICK).folder, F32)
    merged = VLM(export(checkpoint, tmp_path / "merged", options).folder, F32)
    view = whole.processor.preprocess([photograph("china.jpg")], ImageBudget("low"))[0].views
    [want], [got] = (list(vlm.vision.encode(view)) for vlm in (whole, merged))
    np.testing.assert_allclose(got["deepstack_embeds.0"], want["deepstack_embeds.0"], atol=1e-5)
    for name in ("deepstack_embeds.1", IMAGE_EMBEDS):
        assert got[name].shape == want[name].shape
        assert np.abs(got[name] - want[name]).max() > 0.01
        assert (got[name] * want[name]).sum() > 0.9 * np.linalg.norm(got[name]) * np.linalg.norm(want[name])


def test_the_parts_run_fused(tmp_path: Path) -> None:
    """Four products a layer, two of each tap and of the connector; the scalars of attention break no fusion."""
    checkpoint = make_checkpoint(tmp_path / "saved", text_config={"num_hidden_layers": 2})
    folder = export(checkpoint, tmp_path / "out", QUICK).folder
    check_fused(folder)
    kinds = runtime_kinds(VLM(folder, F32).vision._compiled)
    assert kinds["FullyConnected"] == 4 * 4 + 2 * 2 + 2
    assert kinds["MVN"] == 2 * 4 + 1 + 2 + 3
    assert kinds["Softmax"] == kinds["MatMul"] == 0


def test_answers_in_doclang_are_text_that_docling_reads(pair: tuple[Reference, VLM]) -> None:
    from docling_core.transforms.deserializer.doclang import DocLangDocDeserializer

    tokenizer, manifest = pair[1].processor.tokenizer, pair[1].manifest
    assert list(manifest.text_tokens) == DOCLANG
    ids = tokenizer.encode(PAGE)
    assert {tokenizer.token(each) for each in ids} >= {"<doclang>", '<location value="10"/>', "</text>"}
    answer = tokenizer.decode(ids)
    assert answer == PAGE
    markdown = DocLangDocDeserializer().deserialize_str(answer).export_to_markdown()
    assert "Pump 12" in markdown
    assert "The pressure is 4.2 bar." in markdown
    assert page_prompts(pair[1])["table"] == "<doclang> [<table>]"
    asked = pair[1].processor.prompt_ids([user_message("<doclang> [<text>] <image>", 0)], [])
    assert {tokenizer.token(each) for each in asked} & {*DOCLANG, *IMAGE_TOKENS} == {"<doclang>", "<text>"}


def test_every_token_of_doclang_s_vocabulary_is_text(checkpoint: Path, tmp_path: Path) -> None:
    """Those that the specification recommends, among control tokens of the model."""
    from doclang import get_special_tokens

    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    content = read_json(folder / "tokenizer.json")
    known = {token["content"] for token in content["added_tokens"]}
    names = [each for each in dict.fromkeys(get_special_tokens()) if each not in known]
    added = [{**content["added_tokens"][0], "id": 5000 + number, "content": each} for number, each in enumerate(names)]
    write_json(folder / "tokenizer.json", content | {"added_tokens": content["added_tokens"] + added})
    written = family(image_processor()).block_text() + "<|im_start|><|im_end|>"
    found = Checkpoint(folder, "granite", None, {}).text_tokens(written)
    assert {*found} == {*names, *DOCLANG}


@pytest.mark.parametrize(
    ("file", "section", "changes", "line"),
    [
        (
            "config.json",
            "",
            {"density_router_hidden_size": 8},
            "config.json has a density router (density_router_hidden_size 8)",
        ),
        ("config.json", "vision_config", {"image_size": 64}, "tiles of 32 pixels, and vision_config.image_size 64"),
        ("config.json", "vision_config", {"patch_size": [4, 8]}, "patch_size must be the side of a square"),
        ("config.json", "vision_config", {"scale_factor": 3}, "8 patches a side cannot be folded by 3 and by half"),
        ("config.json", "vision_config", {"out_hidden_size": 32}, "must be the decoder's hidden_size 64"),
        ("config.json", "vision_config", {"deepstack_visual_indexes": [4]}, "must be rising indexes of 4 blocks"),
        ("config.json", "vision_config", {"deepstack_visual_indexes": [0, 1, 2, 3]}, "more than the decoder's layers"),
        ("config.json", "text_config", {"residual_multiplier": 0}, "residual_multiplier must be a number above 0"),
        ("config.json", "text_config", {"attention_softcap": 2.0}, "does not know text_config.attention_softcap"),
        ("processor_config.json", "", {"image_seq_len": 64}, "says 64 image tokens a tile"),
        (
            "processor_config.json",
            "image_processor",
            {"size": {"height": 32, "width": 64}},
            "size must be a square, not 64x32",
        ),
        ("processor_config.json", "image_processor", {"min_patches": 13}, "min_patches 13 is more than max_patches 12"),
        ("processor_config.json", "image_processor", {"do_rescale": False}, "sets do_rescale to false"),
        ("processor_config.json", "image_processor", {"dense_max_scale": "x"}, "dense_max_scale must be a number"),
    ],
)
def test_what_is_not_built_is_refused(
    file: str, section: str, changes: dict[str, Any], line: str, checkpoint: Path, tmp_path: Path
) -> None:
    check_refused(checkpoint, tmp_path, file, section, changes, line)


def test_a_fine_route_that_is_not_there_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(
        tmp_path / "saved", pictures=image_processor(fine_route=True), vision_config={"use_fine_route": False}
    )
    with pytest.raises(SourceError, match=r"fine_route needs vision_config\.use_fine_route, which is false"):
        export(checkpoint, tmp_path / "out", QUICK)


def test_heads_that_predict_further_tokens_are_passed_over(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    extra = {f"mtp.blocks.0.{name}.weight": np.ones(4, np.float32) for name in ("proj", "embed_norm")}
    save_file(tensors | extra, folder / "model.safetensors")
    assert export(folder, tmp_path / "out", QUICK).manifest.family == "granite_docling"
    save_file(tensors | {"model.other.weight": np.ones(4, np.float32)}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"no place for, such as model\.other\.weight"):
        export(folder, tmp_path / "other", QUICK)


@pytest.mark.parametrize("has_fine", [True, False])
def test_tensors_and_their_shapes_are_those_of_transformers(has_fine: bool, tmp_path: Path) -> None:
    """At the size of the 500M checkpoint, every value left to its class."""
    config = GraniteDoclingConfig(vision_config={"use_fine_route": has_fine})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_json(tmp_path / "preprocessor_config.json", {})
    stated = {"model_type": "granite_docling", "vision_config": {} if has_fine else {"use_fine_route": False}}
    checkpoint = Checkpoint(tmp_path, "granite", None, stated)
    facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, facts, wanted)
    assert found.shapes.items() <= wanted.items()
    assert {*found.unused} - {*exporter._UNUSED} == wanted.keys() - found.shapes.keys()
    assert overlooked([*found.sections, preprocessor]) == {}
    assert (facts["image_seq_len"], facts["preprocessing"]["tile"], facts["image_token_id"]) == (64, 512, 100337)


def test_what_a_config_is_silent_about_is_what_the_class_has() -> None:
    text = {key: value for key, value in DEFAULTS["granite_docling_text"].items() if key != "rope_theta"}
    classes = [
        (GraniteDoclingConfig(), exporter._DEFAULTS),
        (GraniteDoclingTextConfig(), text),
        (GraniteDoclingVisionConfig(), exporter._VISION_DEFAULTS),
        (reference_tiles.GraniteDoclingImageProcessorPil(), exporter._PREPROCESSOR_DEFAULTS),
    ]
    check_class_defaults(classes)
    assert GraniteDoclingTextConfig().rope_parameters["rope_theta"] == DEFAULTS["granite_docling_text"]["rope_theta"]
