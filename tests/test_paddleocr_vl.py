"""PaddleOCR-VL: sizes and positions of patches against transformers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, PaddleOCRTextConfig, PaddleOCRVisionConfig, PaddleOCRVLConfig
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from edgevlm import ImageBudget
from edgevlm.families.base import PAGE_PROMPTS, PIXEL_VALUES
from edgevlm.families.packing import packed_order
from edgevlm.families.paddleocr_vl import PaddleOcrVL
from edgevlm_export.families import architecture, family_config
from edgevlm_export.families import paddleocr_vl as exporter
from edgevlm_export.families.text_models import DEFAULTS
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from tests.conftest import noise
from tests.families.paddleocr_vl import MERGE, TABLE_SIDE, TEMPLATE, image_processor, make_checkpoint, packed
from tests.helpers.checkpoints import check_class_defaults, check_refused
from tests.helpers.json_files import write_json

SIZES = [(1, 150), (5, 3), (3, 5), (20, 150), (150, 20), (33, 77), (101, 99), (427, 641), (64, 8)]


def family(processor: Any, **facts: Any) -> PaddleOcrVL:
    """Return the runtime's family from the facts that the exporter takes from such a processor's file."""
    names = ("resample", "rescale_factor", "image_mean", "image_std", "patch_size", "merge_size", "temporal_patch_size")
    return PaddleOcrVL(
        {
            "model_type": "paddleocr_vl",
            **exporter._TOKENS,
            "image_token_id": 4,
            "table_side": TABLE_SIDE,
            "min_pixels": processor.size["shortest_edge"],
            "max_pixels": processor.size["longest_edge"],
            **{name: getattr(processor, name) for name in names},
            **facts,
        }
    )


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_high_equals_the_reference(height: int, width: int) -> None:
    processor, image = image_processor(), noise(height, width)
    given = processor([image], input_data_format="channels_last", return_tensors="pt")
    [view] = family(processor).preprocess(image, ImageBudget("high")).views
    inputs = view.inputs()
    assert np.array_equal(inputs[PIXEL_VALUES].ravel(), packed(given))
    _, rows, cols = given["image_grid_thw"][0].tolist()
    order = packed_order(rows, cols, MERGE)
    indices, weights = get_vision_interpolation_indices_and_weights(given["image_grid_thw"], TABLE_SIDE)
    assert np.array_equal(inputs["table_indices"][0].T, indices.numpy()[order])
    assert np.array_equal(inputs["table_weights"][0].T, weights.numpy()[order])


def test_image_tokens_of_a_picture_of_1600_by_1200() -> None:
    made, image = family(PaddleOCRVLImageProcessorPil()), noise(1200, 1600)
    counts = [made.preprocess(image, ImageBudget(detail)).layout.tokens for detail in ("high", "auto", "low")]
    assert counts == [57 * 43, 57 * 43, 18 * 13]


def test_it_is_asked_in_its_own_words() -> None:
    prompts = family(image_processor()).page_prompts
    assert prompts.keys() == {*PAGE_PROMPTS, "spotting", "seal"}
    assert prompts["page"] == "OCR:"
    assert prompts["table"] == "Table Recognition:"


def test_a_small_page_is_enlarged_for_spotting_alone() -> None:
    made, small, large = family(image_processor()), noise(30, 1499), noise(1500, 20)
    assert made.page_picture(small, "spotting").shape == (60, 2998, 3)
    assert made.page_picture(small, "page") is small
    assert made.page_picture(large, "spotting") is large


def test_cells_and_places_are_part_of_an_answer(tmp_path: Path) -> None:
    shown = ["<fcel>", "<ecel>", "<lcel>", "<ucel>", "<xcel>", "<nl>", "<|LOC_0|>", "<|LOC_1000|>", "<|LOC_SEP|>"]
    hidden = ["<|begin_of_sentence|>", "</s>", "<mask:0>", "<|IMAGE_START|>", "<|CROP_ROW_SEP|>"]
    tokens = [{"content": token, "id": number, "special": True} for number, token in enumerate(hidden + shown)]
    write_json(tmp_path / "tokenizer.json", {"added_tokens": tokens})
    found = Checkpoint(tmp_path, "paddle", None, {}).text_tokens(TEMPLATE + family(image_processor()).block_text())
    assert list(found) == shown


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers saves it. Tests must not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("paddle") / "saved")


@pytest.mark.parametrize(
    ("file", "section", "changes", "line"),
    [
        ("config.json", "vision_config", {"num_attention_heads": 16}, "heads of 2 channels cannot be rotated"),
        ("config.json", "vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("config.json", "vision_config", {"hidden_act": "mish"}, "does not build the activation 'mish'"),
        ("config.json", "vision_config", {"image_size": 3}, "image_size 3 is less than a patch's 4"),
        ("config.json", "vision_config", {"spatial_merge_size": 3}, "merge_size of processor_config.json is 2"),
        ("config.json", "text_config", {"model_type": "ernie4_5_moe"}, "builds no 'ernie4_5_moe' decoder"),
        ("config.json", "", {"vision_end_token_id": 1}, "<|IMAGE_END|> is 5, vision_end_token_id of config.json 1"),
        ("processor_config.json", "image_processor", {"temporal_patch_size": 2}, "the encoder takes one picture"),
        ("processor_config.json", "image_processor", {"do_resize": False}, "sets do_resize to false"),
    ],
)
def test_what_is_not_built_is_refused(
    file: str, section: str, changes: dict[str, Any], line: str, checkpoint: Path, tmp_path: Path
) -> None:
    check_refused(checkpoint, tmp_path, file, section, changes, line)


def test_tensors_and_their_shapes_are_those_of_transformers(tmp_path: Path) -> None:
    """At the size of PaddleOCR-VL-0.9B, whose values its classes assume."""
    config = PaddleOCRVLConfig()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_json(tmp_path / "preprocessor_config.json", {})
    checkpoint = Checkpoint(tmp_path, "paddle", None, config.to_dict())
    facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, facts, wanted)
    assert dict(found.shapes) == {name: shape for name, shape in wanted.items() if "position_ids" not in name}
    assert overlooked([*found.sections, preprocessor]) == {}


def test_what_a_config_is_silent_about_is_what_the_class_has() -> None:
    text = {key: value for key, value in DEFAULTS["paddleocr_vl_text"].items() if key != "rope_theta"}
    classes = [
        (PaddleOCRVLConfig(), exporter._DEFAULTS),
        (PaddleOCRVisionConfig(), exporter._VISION_DEFAULTS),
        (PaddleOCRVLImageProcessorPil(), exporter._PREPROCESSOR_DEFAULTS),
        (PaddleOCRTextConfig(), text),
    ]
    check_class_defaults(classes)
    assert PaddleOCRTextConfig().rope_parameters["rope_theta"] == DEFAULTS["paddleocr_vl_text"]["rope_theta"]
