"""GLM-OCR: sizes of pictures against transformers' image processor, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, GlmOcrConfig, GlmOcrTextConfig, GlmOcrVisionConfig
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

from edgevlm import ImageBudget
from edgevlm.families.base import PIXEL_VALUES
from edgevlm.families.glm_ocr import GlmOcr
from edgevlm_export.families import architecture, family_config
from edgevlm_export.families import glm_ocr as exporter
from edgevlm_export.families.text_models import DEFAULTS
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from tests.conftest import noise
from tests.families.glm_ocr import image_processor, make_checkpoint
from tests.helpers.checkpoints import check_class_defaults, check_refused
from tests.helpers.json_files import write_json

SIZES = [(1, 150), (5, 3), (3, 5), (20, 150), (150, 20), (33, 77), (101, 99), (427, 641), (64, 8)]


def family(processor: Any) -> GlmOcr:
    """Return the runtime's family from the facts that the exporter takes from such a processor's file."""
    names = ("resample", "rescale_factor", "image_mean", "image_std", "patch_size", "merge_size", "temporal_patch_size")
    return GlmOcr(
        {
            "model_type": "glm_ocr",
            "image_token": "<|image|>",
            "image_token_id": 10,
            "vision_start": "<|begin_of_image|>",
            "vision_end": "<|end_of_image|>",
            "min_pixels": processor.size["shortest_edge"],
            "max_pixels": processor.size["longest_edge"],
            **{name: getattr(processor, name) for name in names},
        }
    )


@pytest.mark.parametrize("options", [{}, {"size": {"shortest_edge": 1001, "longest_edge": 5003}}])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_high_equals_the_reference(height: int, width: int, options: dict[str, Any]) -> None:
    processor, image = image_processor(**options), noise(height, width)
    given = processor([image], input_data_format="channels_last", return_tensors="pt")
    [view] = family(processor).preprocess(image, ImageBudget("high")).views
    assert np.array_equal(view.inputs()[PIXEL_VALUES][0], given["pixel_values"].numpy())


def test_image_tokens_of_a_picture_of_1600_by_1200() -> None:
    made, image = family(Glm46VImageProcessorPil()), noise(1200, 1600)
    counts = [made.preprocess(image, ImageBudget(detail)).layout.tokens for detail in ("high", "auto", "low")]
    assert counts == [57 * 43, 57 * 43, 18 * 13]


def test_it_is_asked_in_its_own_words() -> None:
    prompts = family(image_processor()).page_prompts
    assert prompts["page"] == "Text Recognition:"
    assert prompts["formula"] == "Formula Recognition:"
    assert "chart" not in prompts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers saves it. Tests must not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("glm") / "saved")


@pytest.mark.parametrize(
    ("file", "section", "changes", "line"),
    [
        ("config.json", "vision_config", {"num_heads": 16}, "heads of 2 channels cannot be rotated"),
        ("config.json", "vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("config.json", "vision_config", {"out_hidden_size": 32}, "out_hidden_size is 32, and the decoder has 64"),
        ("config.json", "vision_config", {"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ("config.json", "text_config", {"model_type": "glm4v_moe_text"}, "builds no 'glm4v_moe_text' decoder"),
        ("config.json", "text_config", {"attention_bias": True}, "edgevlm does not know text_config.attention_bias"),
        ("config.json", "", {"image_end_token_id": 1}, "<|end_of_image|> is 7, image_end_token_id of config.json 1"),
        ("preprocessor_config.json", "", {"do_resize": False}, "sets do_resize to false"),
    ],
)
def test_what_is_not_built_is_refused(
    file: str, section: str, changes: dict[str, Any], line: str, checkpoint: Path, tmp_path: Path
) -> None:
    check_refused(checkpoint, tmp_path, file, section, changes, line)


def test_tensors_and_their_shapes_are_those_of_transformers(tmp_path: Path) -> None:
    """At the size of GLM-OCR's classes, with the decoder's channels that their vision encoder asks for."""
    config = GlmOcrConfig(text_config={"hidden_size": 1536})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    write_json(tmp_path / "preprocessor_config.json", {})
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 16, 16]}  # of heads of 96 channels
    stated = config.to_dict()
    stated["text_config"]["rope_parameters"] = rope
    checkpoint = Checkpoint(tmp_path, "glm", None, stated)
    facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, facts, wanted)
    assert dict(found.shapes) == wanted
    assert overlooked([*found.sections, preprocessor]) == {}


def test_what_a_config_is_silent_about_is_what_the_class_has() -> None:
    text = {key: value for key, value in DEFAULTS["glm_ocr_text"].items() if key != "rope_theta"}
    classes = [
        (GlmOcrConfig(), exporter._DEFAULTS),
        (GlmOcrVisionConfig(), exporter._VISION_DEFAULTS),
        (Glm46VImageProcessorPil(), exporter._PREPROCESSOR_DEFAULTS),
        (GlmOcrTextConfig(), text),
    ]
    check_class_defaults(classes)
    assert GlmOcrTextConfig().rope_parameters["rope_theta"] == DEFAULTS["glm_ocr_text"]["rope_theta"]
