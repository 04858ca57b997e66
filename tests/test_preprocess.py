"""Tiles and prompt blocks of the Idefics3 family against transformers' own processors, bit for bit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from edgevlm.errors import OptionError
from edgevlm.families.base import RGB, Detail, ImageBudget, Visual
from edgevlm.families.idefics3 import Grid
from edgevlm_export.samples import pixel_values
from tests.conftest import LONGEST_EDGE, TILE, image_processor, noise, photograph
from tests.families.idefics3 import family, sized

SIZES = [  # height, width
    (1, 1),
    (2, 3),
    (1, 500),
    (500, 1),
    (3, 200),
    (4, 64),
    (10, 3000),
    (3000, 10),
    (1, 30000),
    (30000, 1),
    (200, 300),
    (300, 200),
    (200, 200),
    (TILE, TILE),
    (TILE, 2 * TILE),
    (2 * TILE, TILE),
    (3 * TILE, 4 * TILE),
    (4 * TILE, 4 * TILE),
    (TILE + 1, TILE),
    (TILE, TILE + 1),
    (4 * TILE + 1, 4 * TILE),
    (4 * TILE, 4 * TILE + 1),
    (255, 255),
    (33, 77),
    (101, 99),
    (427, 641),
]
DETAILS: tuple[Detail, ...] = ("auto", "low", "high")


class Reference(NamedTuple):
    """What the reference makes of one picture."""

    pixel_values: np.ndarray  # (T, 3, H, W)
    rows: int
    cols: int


def reference(processor: Any, image: RGB, **options: Any) -> Reference:
    """What the processor makes of one picture.

    It is told that channels come last: left to guess, it takes a picture of 1, 3 or 4 rows for one of as many channels
    and answers with the wrong grid. The runtime's pictures have their channels last always, so it has nothing to guess.
    """
    given = {"return_tensors": "np", "return_row_col_info": True, "input_data_format": "channels_last"}
    out = processor(image, **given, **options)
    return Reference(out["pixel_values"][0], out["rows"][0][0], out["cols"][0][0])


def assert_equal(found: Visual, wanted: Visual | Reference) -> None:
    if isinstance(wanted, Visual):
        assert isinstance(wanted.layout, Grid)
        wanted = Reference(pixel_values(wanted.views), *wanted.layout)
    values, others = pixel_values(found.views), wanted.pixel_values
    assert found.layout == (wanted.rows, wanted.cols)
    assert len(found) == len(values) == len(others)
    assert values.dtype == others.dtype == np.float32
    assert np.array_equal(values, others)


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_high_equals_the_reference(kind: str, height: int, width: int) -> None:
    processor, image = image_processor(kind), noise(height, width)
    assert_equal(family(processor).preprocess(image, ImageBudget("high")), reference(processor, image))


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_high_equals_the_reference_on_photographs(kind: str, name: str) -> None:
    processor, image = image_processor(kind), photograph(name)
    found = family(processor).preprocess(image, ImageBudget("high"))
    assert found.layout == (3, 4)
    assert_equal(found, reference(processor, image))


@pytest.mark.parametrize("longest_edge", [50, TILE, 255, 300, 5 * TILE])
def test_high_equals_the_reference_at_other_sizes(longest_edge: int) -> None:
    processor = sized(longest_edge, TILE)
    for height, width in [*np.random.default_rng(longest_edge).integers(1, 500, (12, 2)).tolist(), (1, 500), (900, 7)]:
        image = noise(height, width)
        assert_equal(family(processor).preprocess(image, ImageBudget("high")), reference(processor, image))


@pytest.mark.parametrize(
    ("longest_edge", "tile", "height", "width", "grid"),
    [
        pytest.param(2048, 512, 1200, 1600, (3, 4), id="SmolVLM2 landscape"),
        pytest.param(2048, 512, 2048, 513, (4, 2), id="SmolVLM2 portrait, one over"),
        pytest.param(2048, 512, 10, 3000, (1, 4), id="SmolVLM2 panorama"),
        pytest.param(1820, 364, 427, 640, (4, 5), id="Idefics3-8B photograph size"),
        pytest.param(5000, 512, 3000, 10, (8, 1), id="beyond the reference's 4096"),
        pytest.param(5000, 512, 7, 400, (1, 8), id="beyond the reference's 4096, wide"),
    ],
)
def test_high_equals_the_reference_at_real_sizes(
    longest_edge: int, tile: int, height: int, width: int, grid: tuple[int, int]
) -> None:
    processor, image = sized(longest_edge, tile), noise(height, width)
    found = family(processor).preprocess(image, ImageBudget("high"))
    assert (*found.layout, len(found)) == (*grid, grid[0] * grid[1] + 1)
    assert_equal(found, reference(processor, image))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_low_equals_the_reference_without_splitting(height: int, width: int) -> None:
    processor, image = image_processor("idefics3"), noise(height, width)
    found = family(processor).preprocess(image, ImageBudget("low"))
    assert (*found.layout, len(found)) == (0, 0, 1)
    assert_equal(found, reference(processor, image, do_image_splitting=False))


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize(("height", "width"), [(1, 500), (300, 200), (64, 64), (427, 641)])
def test_a_checkpoint_that_does_not_split(detail: Detail, height: int, width: int) -> None:
    processor, image = image_processor("smolvlm", do_image_splitting=False), noise(height, width)
    assert_equal(family(processor).preprocess(image, ImageBudget(detail)), reference(processor, image))


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize("max_tiles", [None, 1, 5])
def test_a_longest_edge_of_one_tile_leaves_the_global_view(detail: Detail, max_tiles: int | None) -> None:
    processor = sized(TILE, TILE)
    for height, width in [(427, 641), (900, 7), (TILE, TILE), (1, 1)]:
        image = noise(height, width)
        found = family(processor).preprocess(image, ImageBudget(detail, max_views=max_tiles))
        assert (*found.layout, len(found)) == (0, 0, 1)
        assert_equal(found, reference(processor, image))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"resample": 0}, id="nearest"),
        pytest.param({"resample": 2}, id="bilinear"),
        pytest.param({"resample": 3}, id="bicubic"),
        pytest.param({"rescale_factor": 1 / 127.5}, id="rescale_factor"),
    ],
)
def test_resampling_and_rescaling_are_the_checkpoints(options: dict[str, Any]) -> None:
    processor, image = image_processor("idefics3", **options), noise(150, 333)
    assert_equal(family(processor).preprocess(image, ImageBudget("high")), reference(processor, image))


def test_one_mean_and_one_std_for_all_channels() -> None:
    processor, image = sized(LONGEST_EDGE, TILE), noise(150, 333)
    processor.image_mean, processor.image_std = 0.45, 0.3
    assert_equal(family(processor).preprocess(image, ImageBudget("high")), reference(processor, image))


def random_sizes(seed: int, count: int) -> list[tuple[int, int]]:
    """Heights and widths, small and extreme ones as likely as large ones."""
    sides = np.exp(np.random.default_rng(seed).uniform(0, np.log(700), (count, 2))).astype(int)
    return [(max(height, 1), max(width, 1)) for height, width in sides.tolist()]


@pytest.mark.parametrize("longest_edge", [LONGEST_EDGE, 300])
def test_auto_never_enlarges_and_never_makes_more_tiles_than_high(longest_edge: int) -> None:
    made = family(sized(longest_edge, TILE))
    splits = 0
    for height, width in random_sizes(1, 200):
        image = np.zeros((height, width, 3), np.uint8)
        auto, high = made.preprocess(image, ImageBudget("auto")), made.preprocess(image, ImageBudget("high"))
        assert max(auto.layout) * TILE <= max(height, width), (height, width)
        assert all(a <= b for a, b in zip(auto.layout, high.layout, strict=True)) and len(auto) <= len(high), (
            height,
            width,
        )
        splits += auto.layout != (0, 0)
    assert splits > 50  # else the bounds above held for want of tiles


def test_auto_is_high_for_a_picture_that_fills_the_grid_and_low_for_one_that_fills_no_two_tiles() -> None:
    made = family(image_processor("idefics3"))
    large, small = noise(200, LONGEST_EDGE), noise(2 * TILE - 1, 2 * TILE - 1)
    assert_equal(made.preprocess(large, ImageBudget("auto")), made.preprocess(large, ImageBudget("high")))
    assert_equal(made.preprocess(small, ImageBudget("auto")), made.preprocess(small, ImageBudget("low")))


def test_auto_keeps_the_tiles_that_the_pixels_fill() -> None:
    found = family(image_processor("idefics3")).preprocess(noise(TILE, 3 * TILE + 5), ImageBudget("auto"))
    assert (*found.layout, len(found)) == (1, 3, 4)


@pytest.mark.parametrize(
    ("height", "grid"),
    [(20, (1, 3)), (94, (1, 3)), (96, (2, 3)), (144, (2, 3)), (158, (2, 3)), (160, (3, 3)), (192, (3, 3))],
)
def test_auto_gives_a_picture_the_grid_nearest_to_its_shape(height: int, grid: tuple[int, int]) -> None:
    """A picture of 3 x 2.25 tiles is shrunk to two rows by a ninth, where three rows would stretch it by a third."""
    found = family(image_processor("idefics3")).preprocess(noise(height, 3 * TILE), ImageBudget("auto"))
    assert found.layout == grid
    assert {view.pixels.shape for view in found.views} == {(TILE, TILE, 3)}


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize(("longest_edge", "tile"), [(LONGEST_EDGE, TILE), (300, TILE), (50, TILE), (315, 63)])
def test_max_tiles_is_respected(detail: Detail, longest_edge: int, tile: int) -> None:
    made = family(sized(longest_edge, tile))
    for height, width in random_sizes(2, 40):
        image = np.zeros((height, width, 3), np.uint8)
        free = made.preprocess(image, ImageBudget(detail))
        counts = []
        for max_tiles in (1, 2, 3, 4, 5, 7, 10, 13, 17):
            tiles = made.preprocess(image, ImageBudget(detail, max_views=max_tiles))
            counts.append(len(tiles))
            assert len(tiles) <= max_tiles, (height, width, max_tiles)
            assert len(tiles) == math.prod(tiles.layout) + 1
            assert all(a <= b for a, b in zip(tiles.layout, free.layout, strict=True))
        assert counts == sorted(counts)  # a higher limit never costs tiles


def test_max_tiles_that_does_not_bind_changes_nothing() -> None:
    made, image = family(image_processor("idefics3")), noise(200, 300)
    free = made.preprocess(image, ImageBudget("high"))
    assert len(free) == 13
    assert_equal(made.preprocess(image, ImageBudget("high", max_views=13)), free)
    assert_equal(made.preprocess(image, ImageBudget("high", max_views=100)), free)


@pytest.mark.parametrize(
    ("max_tiles", "grid"), [(12, (2, 3)), (7, (2, 3)), (6, (2, 2)), (5, (2, 2)), (4, (0, 0)), (1, (0, 0))]
)
def test_max_tiles_lowers_the_grid_by_whole_tiles_of_the_longer_side(max_tiles: int, grid: tuple[int, int]) -> None:
    tiles = family(image_processor("idefics3")).preprocess(noise(200, 300), ImageBudget("high", max_views=max_tiles))
    assert tiles.layout == grid


def test_a_lowered_grid_is_the_references_at_that_longest_edge() -> None:
    image = noise(200, 300)
    lowered = family(image_processor("idefics3")).preprocess(image, ImageBudget("high", max_views=7))
    assert_equal(lowered, reference(image_processor("idefics3"), image, size={"longest_edge": 3 * TILE}))


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", ["max_image_tokens", "max_views"])
def test_a_budget_below_one_is_refused(name: str, number: int) -> None:
    with pytest.raises(OptionError, match=f"^{name} must be at least 1, not {number}$"):
        ImageBudget(**{name: number})


def test_a_budget_of_image_tokens_is_one_of_whole_views() -> None:
    made, image = family(image_processor("idefics3")), noise(200, 300)
    for tokens in range(4, 60):
        found = made.preprocess(image, ImageBudget("high", max_image_tokens=tokens))
        assert made.image_text(found.layout).count("<image>") == 4 * len(found) <= tokens
        assert_equal(found, made.preprocess(image, ImageBudget("high", max_views=tokens // 4)))
    with pytest.raises(
        OptionError,
        match=r"^max_image_tokens is 3, but a picture takes this model 4 image tokens or more; allow at least 4$",
    ):
        made.preprocess(image, ImageBudget("low", max_image_tokens=3))


@pytest.mark.parametrize("detail", DETAILS)
def test_the_picture_is_left_as_it_was(detail: Detail) -> None:
    image = noise(70, 200)
    image.flags.writeable = False
    before = image.copy()
    family(image_processor("idefics3")).preprocess(image, ImageBudget(detail))
    assert np.array_equal(image, before)


@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (1, 2), (2, 1), (3, 4), (4, 4), (6, 6)])
def test_image_text_equals_the_reference(rows: int, cols: int) -> None:
    made = family(image_processor("idefics3"))
    wanted = get_image_prompt_string(
        rows,
        cols,
        image_seq_len=4,
        fake_token_around_image="<fake_token_around_image>",
        image_token="<image>",
        global_image_token="<global-img>",
    )
    assert made.image_text(Grid(rows, cols)) == wanted
    assert wanted.count("<image>") == made.tokens_per_view * (rows * cols + 1)


@pytest.mark.parametrize(
    ("tile", "patch_size", "image_size"),
    [
        pytest.param(64, 8, 64, id="tiny"),
        pytest.param(512, 16, 512, id="SmolVLM2-256M"),
        pytest.param(384, 14, 384, id="SmolVLM, a patch that does not divide the tile"),
        pytest.param(364, 14, 980, id="Idefics3-8B, a table larger than the tile"),
        pytest.param(96, 8, 40, id="a table smaller than the tile"),
    ],
)
def test_vision_inputs_equal_the_reference(tile: int, patch_size: int, image_size: int) -> None:
    made = family(sized(4 * tile, tile), patch_size, image_size)
    inputs = made.constants
    config = transformers.Idefics3VisionConfig(
        hidden_size=4, num_attention_heads=1, patch_size=patch_size, image_size=image_size
    )
    embeddings = Idefics3VisionEmbeddings(config)
    seen = []
    embeddings.position_embedding.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].numpy()))
    mask = inputs["patch_attention_mask"]
    assert mask.shape == (1, tile // patch_size, tile // patch_size)
    with torch.inference_mode():
        embeddings(torch.zeros(1, 3, tile, tile), torch.from_numpy(mask))
    assert inputs["patch_position_ids"].dtype == np.int64
    assert np.array_equal(inputs["patch_position_ids"], seen[0])
