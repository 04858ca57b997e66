"""A budget of image tokens means the same for every family."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgevlm import OptionError
from edgevlm.families import FAMILIES
from edgevlm.families.base import DETAILS, Detail, ImageBudget

TILE = 32
PIXELS = {"resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IDEFICS3: dict[str, Any] = {
    "image_token": "<image>",
    "image_token_id": 4,
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_seq_len": 5,
    "patch_size": 8,
    "position_grid": 4,
    "preprocessing": {"longest_edge": 4 * TILE, "tile": TILE, "do_image_splitting": True, **PIXELS},
}
QWEN_VL: dict[str, Any] = {
    "image_token": "<|image_pad|>",
    "image_token_id": 4,
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "vision_start_token_id": 5,
    "patch_size": TILE // 2,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 4 * TILE**2,
    "max_pixels": 100 * TILE**2,
    **PIXELS,
}
FACTS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "image_token_id": 4,
        "image_seq_len": 16,
        "preprocessing": {
            "side": TILE,
            "pan_and_scan": {"min_crop_size": TILE, "max_num_crops": 4, "min_ratio_to_activate": 1.2},
            **PIXELS,
        },
    },
    "gemma4": {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "image_token_id": 4,
        "pad_token_id": 0,
        "preprocessing": {
            "patch_size": TILE // 4,
            "pooling_kernel_size": 2,
            "max_soft_tokens": 70,
            **PIXELS,
        },
    },
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "granite_docling": {
        "image_token": "<image>",
        "image_token_id": 4,
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "image_seq_len": 5,
        "preprocessing": {"tile": TILE, "min_patches": 1, "max_patches": 12, **PIXELS},
    },
    "internvl": {
        "image_token": "<IMG_CONTEXT>",
        "image_token_id": 4,
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "image_seq_len": 5,
        "preprocessing": {"tile": TILE, "min_patches": 1, "max_patches": 12, **PIXELS},
    },
    "lfm2_vl": {
        "image_token": "<image>",
        "image_token_id": 4,
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
        "encoder_patch_size": TILE // 2,
        "downsample_factor": 2,
        "min_image_tokens": 4,
        "max_image_tokens": 16,
        "splitting": {
            "tile_size": 2 * TILE,
            "min_tiles": 2,
            "max_tiles": 10,
            "use_thumbnail": True,
            "max_pixels_tolerance": 2.0,
        },
        "table_side": 4,
        **PIXELS,
    },
    "lighton_ocr": {
        "image_token": "<|image_pad|>",
        "image_token_id": 4,
        "patch_size": TILE // 2,
        "merge_size": 2,
        "unit": TILE // 2,
        "longest_edge": 6 * TILE,
        **PIXELS,
    },
    "llava": {
        "image_token": "<image>",
        "image_token_id": 4,
        "image_seq_len": 16,
        "preprocessing": {"side": TILE, "shortest_edge": TILE, "pad": False, **PIXELS},
    },
    "llava_onevision": {
        "image_token": "<image>",
        "image_token_id": 4,
        "patches_per_side": 4,
        "max_tiles_of_features": 9,
        "preprocessing": {
            "tile": TILE,
            "image_grid_pinpoints": [[rows * TILE, cols * TILE] for rows in range(1, 7) for cols in range(1, 7)],
            **PIXELS,
        },
    },
    "minicpmv4_6": {
        **{
            f"{name}_{end}_token": f"<{name}{end}>"
            for name in ("image", "slice", "image_id")
            for end in ("start", "end")
        },
        "image_token": "<|image_pad|>",
        "image_token_id": 4,
        "use_image_id": True,
        "patch_size": TILE // 4,
        "table_side": 8,
        "preprocessing": {"scale_resolution": 4 * TILE, "max_slice_nums": 9, **PIXELS},
    },
    "qwen2_vl": {"model_type": "qwen2_vl", **QWEN_VL},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl", "window_size": 4 * TILE, **QWEN_VL},
    "qwen3_5": {"model_type": "qwen3_5", "table_side": 8, **QWEN_VL},
    "qwen3_vl": {"model_type": "qwen3_vl", "table_side": 8, **QWEN_VL},
}
LEAST = {
    "gemma3": 16,
    "gemma4": 1,
    "idefics3": 5,
    "smolvlm": 5,
    "granite_docling": 5,
    "internvl": 5,
    "lfm2_vl": 4,
    "lighton_ocr": 1,
    "llava": 16,
    "llava_onevision": 17,
    "minicpmv4_6": 4,
    "qwen2_vl": 4,
    "qwen2_5_vl": 4,
    "qwen3_5": 4,
    "qwen3_vl": 4,
}
SIZES = [(20, 30), (TILE, TILE), (64, 96), (100, 250), (250, 90), (400, 400)]


def test_every_family_is_here() -> None:
    assert FACTS.keys() == LEAST.keys() == FAMILIES.keys()


def image_tokens(family: Any, size: tuple[int, int], budget: ImageBudget) -> int:
    """Return how many image tokens the prompt has for a picture of that size."""
    visual = family.preprocess(np.zeros((*size, 3), np.uint8), budget)
    return family.image_text(visual.layout).count(family.image_token)


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize("name", FACTS)
def test_a_picture_stays_within_its_budget(name: str, detail: Detail) -> None:
    family = FAMILIES[name](FACTS[name])
    for size in SIZES:
        free = image_tokens(family, size, ImageBudget(detail))
        budgets = [ImageBudget(detail, tokens) for tokens in range(LEAST[name], free + 3)]
        counts = [image_tokens(family, size, budget) for budget in budgets]
        assert all(count <= budget.max_image_tokens for count, budget in zip(counts, budgets, strict=True))
        assert counts[0] == LEAST[name]
        assert counts[-3:] == [free] * len(counts[-3:])  # a budget that does not bind changes nothing


@pytest.mark.parametrize("name", [name for name, least in LEAST.items() if least > 1])
def test_a_picture_that_no_budget_fits_is_refused(name: str) -> None:
    family, least = FAMILIES[name](FACTS[name]), LEAST[name]
    line = (
        f"max_image_tokens is {least - 1}, but a picture takes this model {least} image tokens or more;"
        f" allow at least {least}"
    )
    with pytest.raises(OptionError, match=f"^{re.escape(line)}$"):
        image_tokens(family, (64, 96), ImageBudget("low", least - 1))


@pytest.mark.parametrize("name", FACTS)
def test_both_bounds_hold_together(name: str) -> None:
    family, pixels = FAMILIES[name](FACTS[name]), np.zeros((100, 250, 3), np.uint8)
    for views in range(1, 9):
        budget = ImageBudget("high", max_image_tokens=60, max_views=views)
        assert len(family.preprocess(pixels, budget)) <= views
        assert image_tokens(family, (100, 250), budget) <= 60
        assert image_tokens(family, (100, 250), replace(budget, max_views=None)) <= 60
