"""LightOnOCR: sizes against transformers' image processor, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, LightOnOcrConfig, PixtralVisionConfig
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from edgevlm import ImageBudget
from edgevlm.families.base import PIXEL_VALUES
from edgevlm_export.families import architecture, family_config
from edgevlm_export.families import lighton_ocr as exporter
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from tests.conftest import noise
from tests.families.lighton_ocr import PATCH, family, image_processor, make_checkpoint, packed
from tests.helpers.checkpoints import check_class_defaults, check_refused
from tests.helpers.json_files import write_json

SIZES = [(8, 8), (20, 150), (150, 20), (33, 77), (101, 99), (200, 300), (427, 641), (52, 52), (53, 52)]


@pytest.mark.parametrize("options", [{}, {"patch_size": {"height": 2 * PATCH, "width": 2 * PATCH}}])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_high_equals_the_reference(height: int, width: int, options: dict[str, Any]) -> None:
    processor, image = image_processor(**options), noise(height, width)
    given = processor([image], input_data_format="channels_last", return_tensors="pt")
    [view] = family(processor).preprocess(image, ImageBudget("high")).views
    assert np.array_equal(view.inputs()[PIXEL_VALUES].ravel(), packed(given))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 4000)])
def test_a_page_of_less_than_an_image_token_is_enlarged(size: tuple[int, int]) -> None:
    visual = family(image_processor()).preprocess(noise(*size), ImageBudget("high"))
    assert min(visual.layout) == 1
    [view] = visual.views
    assert min(view.pixels.shape[:2]) == 2 * PATCH


def test_image_tokens_of_a_picture_of_1600_by_1200() -> None:
    made, image = family(image_processor(size={"longest_edge": 1540})), noise(1200, 1600)
    made.patch_size = made.unit = 14
    counts = [made.preprocess(image, ImageBudget(detail)).layout.tokens for detail in ("high", "auto", "low")]
    assert counts[:2] == [55 * 41] * 2
    assert counts[2] == 18 * 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers saves it. Tests must not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("lighton") / "saved")


@pytest.mark.parametrize(
    ("file", "section", "changes", "line"),
    [
        ("config.json", "", {"projector_hidden_act": "silu"}, "the native route builds no projector_hidden_act 'silu'"),
        ("config.json", "vision_config", {"model_type": "siglip"}, "builds no 'siglip' vision encoder of LightOnOCR"),
        ("config.json", "vision_config", {"num_attention_heads": 16}, "heads of 2 channels cannot be rotated"),
        ("config.json", "vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "not build RoPE of type yarn"),
        ("config.json", "text_config", {"model_type": None}, "config.json states no text_config.model_type"),
        ("processor_config.json", "", {"spatial_merge_size": 4}, "spatial_merge_size of processor_config.json is 4"),
        ("processor_config.json", "image_processor", {"patch_size": 6}, "multiples of 6 pixels, and patches have 4"),
        ("processor_config.json", "image_processor", {"do_resize": False}, "sets do_resize to false"),
    ],
)
def test_what_is_not_built_is_refused(
    file: str, section: str, changes: dict[str, Any], line: str, checkpoint: Path, tmp_path: Path
) -> None:
    check_refused(checkpoint, tmp_path, file, section, changes, line)


def test_tensors_and_their_shapes_are_those_of_transformers(tmp_path: Path) -> None:
    """At the size of LightOnOCR-1B, whose values its class assumes."""
    config = LightOnOcrConfig()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_json(tmp_path / "preprocessor_config.json", {"patch_size": 14, "size": {"longest_edge": 1540}})
    stated = config.to_dict()
    checkpoint = Checkpoint(tmp_path, "lighton", None, stated)
    facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, facts, wanted)
    assert dict(found.shapes) == wanted
    assert overlooked([*found.sections, preprocessor]) == {}


def test_what_a_config_is_silent_about_is_what_the_class_has() -> None:
    classes = [
        (LightOnOcrConfig(), exporter._DEFAULTS),
        (PixtralVisionConfig(), exporter._VISION_DEFAULTS),
        (PixtralImageProcessorPil(), exporter._PREPROCESSOR_DEFAULTS),
    ]
    check_class_defaults(classes)
    assert PixtralVisionConfig().rope_parameters["rope_theta"] == exporter._THETA
