"""LLaVA against transformers: views and prompts bit for bit, embeddings, logits and greedy tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from edgevlm import VLM
from edgevlm.families.base import Detail, ImageBudget
from edgevlm.families.llava import Llava
from edgevlm_export import ExportOptions, export
from edgevlm_export.samples import pixel_values
from tests.conftest import F32, noise, photograph
from tests.families import llava as tiny
from tests.helpers.graphs import check_tower_fused, runtime_kinds

QUICK = ExportOptions("fp32", via="native", verify=False)

DETAILS: tuple[Detail, ...] = ("auto", "low", "high")
SIZES = [  # height, width
    (1, 1),
    (2, 3),
    (1, 500),
    (500, 1),
    (3, 200),
    (28, 28),
    (28, 56),
    (57, 28),
    (33, 77),
    (101, 99),
    (427, 641),
]


def family(processor: Any) -> Llava:
    """The runtime's family from the facts that the exporter takes from such a processor's file."""
    same = ("resample", "rescale_factor", "image_mean", "image_std")
    return Llava(
        {
            "image_token": "<image>",
            "image_token_id": 4,
            "image_seq_len": 16,
            "preprocessing": {
                "side": processor.size.get("height") or processor.crop_size["height"],
                "shortest_edge": processor.size.get("shortest_edge"),
                "pad": bool(processor.do_pad),
                **{name: getattr(processor, name) for name in same},
            },
        }
    )


PROCESSORS = {
    "CLIP": tiny.clip_processor(),
    "CLIP, bilinear": tiny.clip_processor(resample=2),
    "CLIP, smaller crop": tiny.clip_processor(crop_size={"height": 21, "width": 21}),
    "LLaVA, padded": tiny.clip_processor("Llava", do_pad=True),
    "SigLIP": tiny.siglip_processor(),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixel_values_equal_the_reference(name: str, height: int, width: int) -> None:
    processor, image = PROCESSORS[name], noise(height, width)
    wanted = tiny.reference_pixels(image, processor)
    for detail in DETAILS:
        found = pixel_values(family(processor).preprocess(image, ImageBudget(detail)).views)
        assert found.dtype == wanted.dtype == np.float32
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_pixel_values_equal_the_reference_at_the_real_size(photo: str) -> None:
    processor = tiny.clip_processor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    found = family(processor).preprocess(photograph(photo), ImageBudget("high"))
    assert np.array_equal(pixel_values(found.views), tiny.reference_pixels(photograph(photo), processor))


@pytest.mark.parametrize("name", ["CLIP", "LLaVA, padded"])
@pytest.mark.parametrize("shape", [(2, 40_000), (40_000, 2)])
def test_a_picture_too_long_to_be_resized_is_cropped_first(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevlm.families.llava.MAX_PIXELS", 1_000_000)
    [view] = family(PROCESSORS[name]).preprocess(np.full((*shape, 3), 200, np.uint8), ImageBudget("high")).views
    assert view.pixels.shape == (tiny.SIDE, tiny.SIDE, 3)
    assert name != "CLIP" or (view.pixels == 200).all()


def test_a_crop_while_resizing_is_the_crop_of_what_was_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    made, image = family(PROCESSORS["CLIP"]), photograph("china.jpg")
    [wanted] = made.preprocess(image, ImageBudget("high")).views
    monkeypatch.setattr("edgevlm.families.llava.MAX_PIXELS", 100)
    [found] = made.preprocess(image, ImageBudget("high")).views
    assert np.abs(found.pixels.astype(int) - wanted.pixels).max() <= 1


@pytest.mark.parametrize("variant", tiny.BUILDER.variants)
def test_the_graphs_run_fused(variant: str, tmp_path: Path) -> None:
    checkpoint = tiny.BUILDER.variants[variant](tmp_path)
    vlm = VLM(export(checkpoint, tmp_path / "out", QUICK).folder, F32)
    config = AutoConfig.from_pretrained(checkpoint)
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    layers = 3 + 1 + config.vision_feature_layer
    check_tower_fused(vlm, layers)
    assert runtime_kinds(vlm.vision._compiled)["MVN"] == 2 * layers + int(has_class_token)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_compressed_graphs_run_fused(precision: Any, tmp_path: Path) -> None:
    checkpoint = tiny.make_llava(tmp_path / "checkpoint")
    folder = export(checkpoint, tmp_path / "out", replace(QUICK, precision=precision)).folder
    check_tower_fused(VLM(folder, F32), layers=2, quantized=True)
