"""LLaVA-OneVision against transformers: views, features and prompts of every shape of picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from edgevlm import VLM, GenerationConfig
from edgevlm.families.base import IMAGE_EMBEDS, Detail, ImageBudget
from edgevlm.families.llava_onevision import Grid, LlavaOnevision, resized
from edgevlm_export import ExportOptions, export
from edgevlm_export.samples import pixel_values
from tests.conftest import F32, noise, photograph
from tests.families import llava_onevision as tiny
from tests.families.llava_onevision import GRIDS, TILE
from tests.helpers.graphs import check_tower_fused

DETAILS: tuple[Detail, ...] = ("auto", "low", "high")
SIZES = [  # height, width
    (1, 1),
    (2, 3),
    (1, 500),
    (500, 1),
    (1, 30000),
    (3, 200),
    (28, 28),
    (28, 56),
    (57, 28),
    (84, 84),
    (85, 84),
    (33, 77),
    (101, 99),
    (150, 168),
    (200, 70),
    (427, 641),
]
SHORT = GenerationConfig(max_new_tokens=12)
QUICK = ExportOptions("fp32", via="native", verify=False)
SHORT_BUDGET = ImageBudget("high")
SIDE = TILE // tiny.PATCH


def family(processor: Any, patch: int = tiny.PATCH, most: int = 4) -> LlavaOnevision:
    """The runtime's family from the facts that the exporter takes from such a processor's file."""
    names = ("image_grid_pinpoints", "resample", "rescale_factor", "image_mean", "image_std")
    return LlavaOnevision(
        {
            "image_token": "<image>",
            "image_token_id": 3,
            "patches_per_side": processor.size["height"] // patch,
            "max_tiles_of_features": most,
            "preprocessing": {"tile": processor.size["height"], **{name: getattr(processor, name) for name in names}},
        }
    )


@pytest.mark.parametrize("options", [{}, {"resample": 2, "image_grid_pinpoints": GRIDS[3:9]}])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_high_equals_the_reference(height: int, width: int, options: dict[str, Any]) -> None:
    processor, image = tiny.image_processor(**options), noise(height, width)
    found = pixel_values(family(processor).preprocess(image, ImageBudget("high")).views)
    [wanted] = tiny.reference_views([image], processor)
    assert found.dtype == wanted.dtype == np.float32
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if max(size) < 1000])
def test_low_is_the_view_of_one_picture_among_several(height: int, width: int) -> None:
    processor, image = tiny.image_processor(), noise(height, width)
    wanted, other = tiny.reference_views([image, image], processor)
    assert np.array_equal(wanted, other)
    found = family(processor).preprocess(image, ImageBudget("low"))
    assert found.layout == Grid()
    assert np.array_equal(pixel_values(found.views), wanted)


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_high_equals_the_reference_at_the_real_size(name: str) -> None:
    grids = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
    processor = tiny.image_processor(size={"height": 384, "width": 384}, image_grid_pinpoints=grids)
    found = family(processor, 14, 9).preprocess(photograph(name), ImageBudget("high"))
    assert found.layout == (2, 2, 9, 0)
    assert np.array_equal(pixel_values(found.views), tiny.reference_views([photograph(name)], processor)[0])


def packed(features: torch.Tensor, size: tuple[int, int], newline: torch.Tensor, most: int) -> np.ndarray:
    """Return what the reference makes of a picture's views `(T, patches, D)`."""
    vision = SimpleNamespace(image_size=TILE, patch_size=tiny.PATCH)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=GRIDS))
    [made], _ = LlavaOnevisionModel.pack_image_features(model, [features], [size], newline, f"anyres_max_{most}")
    return made.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("most", [1, 4, 9])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_features_equal_the_reference(height: int, width: int, most: int) -> None:
    made, random = family(tiny.image_processor(), most=most), torch.Generator().manual_seed(3)
    details: tuple[Detail, ...] = ("high", "low")
    for detail in details:
        if detail == "low" and max(height, width) > 1000:
            continue
        visual = made.preprocess(noise(height, width), ImageBudget(detail))
        features = torch.randn(len(visual), SIDE**2, 24, generator=random)
        newline = torch.randn(24, generator=random)
        wanted = packed(features, (height, width), newline, most)
        outputs = [{IMAGE_EMBEDS: np.concatenate([each.numpy(), newline.numpy()[None]])} for each in features]
        found = made.assemble(visual.layout, outputs)[IMAGE_EMBEDS]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert made.image_text(visual.layout) == "<image>" * len(wanted)


@pytest.mark.parametrize("sizes", [((27, 27), (20, 20)), ((162, 40), (81, 20)), ((5, 7), (5, 7)), ((9, 4), (11, 8))])
def test_interpolation_equals_torch(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    before, after = sizes
    grid = np.random.default_rng(0).normal(size=(*before, 6)).astype(np.float32)
    given = torch.from_numpy(grid).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(given, list(after), mode="bilinear")[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(resized(grid, *after), wanted, atol=2e-6)


def test_auto_takes_the_grids_that_the_pixels_fill() -> None:
    made = family(tiny.image_processor())
    for height, width in SIZES:
        auto, high = (made.preprocess(noise(height, width), ImageBudget(detail)) for detail in ("auto", "high"))
        assert isinstance(auto.layout, Grid)
        assert auto.layout.rows * auto.layout.cols * TILE**2 <= height * width
        assert len(auto) <= len(high)
    for size, grid in {(27, 28): (0, 0), (28, 28): (1, 1), (3 * TILE, 4 * TILE): (3, 4), (20, 90): (1, 2)}.items():
        layout = made.preprocess(noise(*size), ImageBudget("auto")).layout
        assert isinstance(layout, Grid)
        assert layout[:2] == grid


@pytest.mark.parametrize("detail", DETAILS)
def test_max_tiles_bounds_the_views_with_that_of_the_whole(detail: Detail) -> None:
    made = family(tiny.image_processor())
    for height, width in (size for size in SIZES if max(size) < 1000):
        free = len(made.preprocess(noise(height, width), ImageBudget(detail)))
        counts = [
            len(made.preprocess(noise(height, width), ImageBudget(detail, max_views=most))) for most in range(1, 38)
        ]
        assert all(count <= most for most, count in enumerate(counts, 1))
        assert counts[0] == 1
        assert counts[-1] == free


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-OneVision checkpoint."""
    return tiny.make_llava_onevision(tmp_path_factory.mktemp("onevision") / "checkpoint")


@pytest.fixture(scope="module", name="exported")
def export_once(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """The tiny checkpoint's export, in float32."""
    return VLM(export(checkpoint, tmp_path_factory.mktemp("exports") / "out", QUICK).folder, F32)


def test_a_second_picture_turns_the_first_into_one_view(exported: VLM) -> None:
    """As the reference counts all pictures of a conversation together."""
    chat = exported.chat(SHORT, image_budget=SHORT_BUDGET)
    assert chat.ask("What?", photograph("china.jpg")).views > 1
    assert chat.ask("And this?", photograph("flower.jpg")).views == 2


def test_pictures_that_differ_only_in_their_padding_are_kept_apart(exported: VLM) -> None:
    """Two pictures of one colour have views alike and layouts that are not."""
    wide, tall = np.full((28, 56, 3), 77, np.uint8), np.full((56, 28, 3), 77, np.uint8)
    for image in (wide, tall, wide):
        fresh = VLM(exported.folder, F32).generate(image, "What?", SHORT, SHORT_BUDGET)
        assert exported.generate(image, "What?", SHORT, SHORT_BUDGET).token_ids == fresh.token_ids


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_compressed_graphs_run_fused(precision: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = export(checkpoint, tmp_path / "out", replace(QUICK, precision=precision)).folder
    check_tower_fused(VLM(folder, F32), layers=2, quantized=True)
