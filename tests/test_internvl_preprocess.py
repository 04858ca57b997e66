"""Tiles of InternVL against transformers' image processor, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from edgevlm.families.base import Detail, ImageBudget
from edgevlm.families.internvl import InternVL
from edgevlm.families.tiling import Grid, nearest_grid
from edgevlm_export.samples import pixel_values
from tests.conftest import noise, photograph
from tests.families.internvl import IMAGE_SEQ_LEN, TILE, image_processor, reference_pixels

DETAILS: tuple[Detail, ...] = ("auto", "low", "high")
SIZES = [  # height, width
    (1, 1),
    (2, 3),
    (1, 500),
    (500, 1),
    (3, 200),
    (200, 4),
    (TILE, TILE),
    (TILE, 2 * TILE),
    (3 * TILE, 4 * TILE),
    (TILE + 1, TILE),
    (33, 77),
    (101, 99),
    (200, 300),
    (427, 641),
]


def family(processor: Any) -> InternVL:
    """The runtime's family from the facts that the exporter takes from such a processor's file."""
    names = ("min_patches", "max_patches", "resample", "rescale_factor", "image_mean", "image_std")
    return InternVL(
        {
            "image_token": "<IMG_CONTEXT>",
            "image_token_id": 5,
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "image_seq_len": IMAGE_SEQ_LEN,
            "preprocessing": {
                "tile": processor.size["height"],
                **{name: getattr(processor, name) for name in names},
            },
        }
    )


def assert_equal(found: Any, wanted: np.ndarray) -> None:
    values = pixel_values(found.views)
    assert Grid(*found.layout).views == len(values) == len(wanted)
    assert values.dtype == wanted.dtype == np.float32
    assert np.array_equal(values, wanted)


@pytest.mark.parametrize("options", [{}, {"max_patches": 5}, {"max_patches": 1}, {"min_patches": 3, "resample": 2}])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_high_equals_the_reference(height: int, width: int, options: dict[str, Any]) -> None:
    processor, image = image_processor(**options), noise(height, width)
    assert_equal(family(processor).preprocess(image, ImageBudget("high")), reference_pixels(image, processor))


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_high_equals_the_reference_on_photographs_at_the_real_size(name: str) -> None:
    processor, image = image_processor(size={"height": 448, "width": 448}), photograph(name)
    found = family(processor).preprocess(image, ImageBudget("high"))
    assert found.layout == (2, 3)
    assert_equal(found, reference_pixels(image, processor))


def test_grids_equal_the_reference() -> None:
    sides = np.exp(np.random.default_rng(1).uniform(0, np.log(3000), (400, 2))).astype(int).tolist()
    exact = [(a * 100, b * 100) for a, b in itertools.product(range(1, 8), repeat=2)]
    for (height, width), most in itertools.product([*sides, *exact], (1, 2, 6, 12)):
        cols, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
        assert nearest_grid(height, width, 448, 1, most) == (rows, cols), (height, width, most)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_low_is_one_tile_as_the_reference_makes_it_without_splitting(height: int, width: int) -> None:
    processor, image = image_processor(), noise(height, width)
    wanted = reference_pixels(image, processor, crop_to_patches=False)
    assert_equal(family(processor).preprocess(image, ImageBudget("low")), wanted)


def test_auto_takes_the_grids_that_the_pixels_fill() -> None:
    made = family(image_processor())
    for height, width in SIZES:
        auto, high = (made.preprocess(noise(height, width), ImageBudget(detail)) for detail in ("auto", "high"))
        rows, cols = auto.layout
        assert rows * cols * TILE**2 <= max(height * width, TILE**2)
        assert len(auto) <= len(high)
    assert made.preprocess(noise(2 * TILE - 1, TILE), ImageBudget("auto")).layout == (1, 1)
    assert made.preprocess(noise(3 * TILE, 4 * TILE), ImageBudget("auto")).layout == (3, 4)
    assert made.preprocess(noise(2 * TILE, 3 * TILE), ImageBudget("auto")).layout == (2, 3)
    assert made.preprocess(noise(TILE, 3 * TILE + 5), ImageBudget("auto")).layout == (1, 3)


@pytest.mark.parametrize("detail", DETAILS)
def test_max_tiles_bounds_the_views_with_the_thumbnail(detail: Detail) -> None:
    made = family(image_processor())
    for height, width in SIZES:
        free = len(made.preprocess(noise(height, width), ImageBudget(detail)))
        counts = [
            len(made.preprocess(noise(height, width), ImageBudget(detail, max_views=most))) for most in range(1, 15)
        ]
        assert all(count <= most for most, count in enumerate(counts, 1))
        assert counts == sorted(counts)  # a higher limit never costs tiles
        assert counts[-1] == free
    lowered = made.preprocess(noise(200, 300), ImageBudget("high", max_views=5))
    assert_equal(lowered, reference_pixels(noise(200, 300), image_processor(max_patches=4)))
