"""MiniCPM-V 4.6: sizes and slices at the published resolution, names of tensors, and what is refused."""

from __future__ import annotations

import re
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.vision_utils import get_vision_nearest_position_ids

from edgevlm.errors import SourceError
from edgevlm.families import make_family
from edgevlm.families.base import PIXEL_VALUES, ImageBudget
from edgevlm.families.minicpm import MiniCPM, Slices, packed_order
from edgevlm_export.families import architecture, family_config
from edgevlm_export.source.checkpoint import open_checkpoint
from edgevlm_export.source.config_reader import overlooked
from edgevlm_export.source.safetensors_reader import Weights
from tests.conftest import noise
from tests.families.minicpm import NAMED, make_checkpoint
from tests.helpers.json_files import read_json, write_json

PATCH, TABLE = 14, 70
SIZES = [(1, 1), (9, 150), (150, 9), (448, 448), (449, 448), (300, 1400), (900, 700), (1200, 1600), (1344, 1344)]


def family() -> MiniCPM:
    """Return the runtime's family as the defaults of the reference's image processor make it."""
    processor = transformers.MiniCPMV4_6ImageProcessorPil()
    names = ("scale_resolution", "max_slice_nums", "image_mean", "image_std", "rescale_factor", "resample")
    preprocessing = {name: getattr(processor, name) for name in names}
    facts = {**NAMED, "image_token_id": 4, "use_image_id": True, "patch_size": PATCH, "table_side": TABLE}
    made = make_family("minicpmv4_6", {**facts, "preprocessing": preprocessing})
    assert isinstance(made, MiniCPM)
    return made


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_slices_pixels_and_positions_are_those_of_transformers(size: tuple[int, int]) -> None:
    made, pixels = family(), noise(*size)
    wanted = transformers.MiniCPMV4_6ImageProcessorPil()(
        [pixels], input_data_format="channels_last", return_tensors="pt"
    )
    visual = made.preprocess(pixels, ImageBudget("high"))
    layout = visual.layout
    assert isinstance(layout, Slices)
    assert [layout.rows, layout.cols] == wanted["grids"][0]
    sizes = wanted["target_sizes"]
    assert [[side // PATCH for side in view.pixels.shape[:2]] for view in visual.views] == sizes.tolist()
    assert layout.tokens == sizes.prod(-1).sum() // 16
    start, values = 0, wanted["pixel_values"][0].numpy()
    for view, (rows, cols) in zip(visual.views, sizes.tolist(), strict=True):
        order, stop = packed_order(rows, cols), start + rows * cols * PATCH
        patches = values[:, :, start:stop].reshape(3, PATCH, rows * cols, PATCH).transpose(2, 0, 1, 3)[order]
        inputs = view.inputs()
        assert np.array_equal(inputs[PIXEL_VALUES][0], patches.reshape(rows * cols, -1))
        places = get_vision_nearest_position_ids(torch.tensor([[rows, cols]]), TABLE)
        assert np.array_equal(inputs["patch_position_ids"][0], places.numpy()[order])
        start = stop


def test_a_budget_takes_fewer_slices() -> None:
    made, pixels = family(), noise(1200, 1600)
    free = made.preprocess(pixels, ImageBudget("high"))
    few, low = (made.preprocess(pixels, ImageBudget(*each)) for each in (("high", 300), ("low", None)))
    assert len(free) > len(few) > len(low) == 1
    text = made.image_texts([free.layout, low.layout])[1]
    assert text.startswith("<image_id>1</image_id><image><|image_pad|>")
    assert "<slice>" not in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("minicpm")


@lru_cache
def saved(folder: Path) -> Path:
    """A tiny checkpoint. Tests must not change it."""
    return make_checkpoint(folder / "saved")


def read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, facts, Weights(checkpoint))
    assert overlooked([*found.sections, preprocessor]) == {}


@pytest.mark.parametrize(
    ("file", "section", "changes", "line"),
    [
        ("config.json", "", {"downsample_mode": "4x"}, "builds no downsample_mode '4x'"),
        ("config.json", "", {"merger_times": 2}, "builds no merger_times 2"),
        ("config.json", "", {"merge_kernel_size": [4, 4]}, "builds no merge_kernel_size [4, 4]"),
        ("config.json", "", {"drop_vision_last_layer": True}, "builds no drop_vision_last_layer True"),
        ("config.json", "", {"insert_layer_id": 3}, "insert_layer_id must be one of 3 layers, not 3"),
        ("config.json", "", {"image_token_id": None}, "states no image_token_id"),
        ("config.json", "vision_config", {"window_kernel_size": [4, 4]}, "vision_config.window_kernel_size [4, 4]"),
        ("config.json", "vision_config", {"patch_size": 8}, "vision_config.patch_size is 8"),
        ("preprocessor_config.json", "", {"downsample_mode": "4x"}, "builds no downsample_mode but 16x"),
        ("tokenizer_config.json", "", {"slice_end_token": None}, "the tokenizer's files name no slice_end_token"),
    ],
)
def test_what_is_not_built_is_refused(
    file: str, section: str, changes: dict[str, Any], line: str, folder: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(saved(folder), tmp_path / "checkpoint"))
    content = read_json(checkpoint / file)
    (content[section] if section else content).update(changes)
    write_json(checkpoint / file, content)
    with pytest.raises(SourceError, match=re.escape(line)):
        read(checkpoint)


def test_tensors_of_the_class_s_own_size_have_the_shapes_of_transformers(folder: Path, tmp_path: Path) -> None:
    """With all layers of Qwen3.5 and of the vision encoder, and so with the sizes that a config leaves to its class."""
    config = transformers.MiniCPMV4_6Config(image_token_id=5, vision_config={"patch_size": 14, "image_size": 980})
    with torch.device("meta"):
        model = transformers.MiniCPMV4_6ForConditionalGeneration(config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    checkpoint = Path(shutil.copytree(saved(folder), tmp_path / "checkpoint"))
    stated = {"model_type": "minicpmv4_6", "image_token_id": 5}
    write_json(checkpoint / "config.json", stated | {"vision_config": {"patch_size": 14, "image_size": 980}})
    settings = read_json(checkpoint / "preprocessor_config.json")
    write_json(checkpoint / "preprocessor_config.json", settings | {"patch_size": 14})
    opened = open_checkpoint(checkpoint)
    facts, _ = family_config(opened)
    assert dict(architecture(opened, facts, wanted).shapes) == wanted
