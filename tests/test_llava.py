"""LLaVA against transformers: views and prompts bit for bit, embeddings, logits and greedy tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgevlm.errors import OptionError
from edgevlm.families.base import Detail
from edgevlm.families.llava import Llava
from edgevlm_export.samples import pixel_values
from tests.conftest import photograph
from tests.families import llava as tiny

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


def noise(height: int, width: int) -> np.ndarray:
    """A picture in which no two places are alike."""
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)


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
        found = pixel_values(family(processor).preprocess(image, detail, None).views)
        assert found.dtype == wanted.dtype == np.float32
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_pixel_values_equal_the_reference_at_the_real_size(photo: str) -> None:
    processor = tiny.clip_processor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    found = family(processor).preprocess(photograph(photo), "high", None)
    assert np.array_equal(pixel_values(found.views), tiny.reference_pixels(photograph(photo), processor))


@pytest.mark.parametrize("name", ["CLIP", "LLaVA, padded"])
@pytest.mark.parametrize("shape", [(2, 40_000), (40_000, 2)])
def test_a_picture_too_long_to_be_resized_is_cropped_first(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevlm.families.llava.MAX_PIXELS", 1_000_000)
    [view] = family(PROCESSORS[name]).preprocess(np.full((*shape, 3), 200, np.uint8), "high", None).views
    assert view.pixels.shape == (tiny.SIDE, tiny.SIDE, 3)
    assert name != "CLIP" or (view.pixels == 200).all()


def test_a_crop_while_resizing_is_the_crop_of_what_was_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    made, image = family(PROCESSORS["CLIP"]), photograph("china.jpg")
    [wanted] = made.preprocess(image, "high", None).views
    monkeypatch.setattr("edgevlm.families.llava.MAX_PIXELS", 100)
    [found] = made.preprocess(image, "high", None).views
    assert np.abs(found.pixels.astype(int) - wanted.pixels).max() <= 1


def test_max_tiles_below_one_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^max_tiles must be at least 1, not 0$"):
        family(PROCESSORS["CLIP"]).preprocess(noise(9, 9), "high", 0)
