"""LFM2-VL: pictures and prompts as transformers makes them, graphs, published configurations, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Lfm2VlConfig, Siglip2VisionConfig
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from edgevlm import VLM
from edgevlm.errors import SourceError
from edgevlm.families import make_family
from edgevlm.families.base import PIXEL_VALUES, ImageBudget
from edgevlm.families.lfm2_vl import Lfm2VL, stretched_table
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import architecture, family_config
from edgevlm_export.families import lfm2_vl as exporter
from edgevlm_export.routes import native as native_route
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from tests.conftest import F32, noise, photograph
from tests.families.lfm2_vl import (
    SETTINGS,
    Resize,
    as_published,
    image_processor,
    make_checkpoint,
    packed,
    pillow_resize,
    reference_processor,
    resizing_with,
    torch_resize,
)
from tests.helpers.graphs import runtime_kinds
from tests.helpers.json_files import read_json, write_json
from tests.helpers.published import published_folder

QUESTION = "What does the display of unit 12 show? Größe 42.7"
QUICK = ExportOptions("fp32", via="native", verify=False)
HIGH = ImageBudget("high")
LAYERS = ["conv", "conv", "full_attention"] * 2 + ["conv", "conv", *["full_attention", "conv"] * 4]
"""Of both published text models."""
PUBLISHED_SETTINGS = {**SETTINGS, "encoder_patch_size": 16, "tile_size": 512}
PUBLISHED_SETTINGS |= {"min_image_tokens": 64, "max_image_tokens": 256, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {
        "model_type": "lfm2_vl",
        "projector_hidden_size": 2048,
        "projector_use_layernorm": False,
        "text_config": {
            "model_type": "lfm2",
            "block_ff_dim": inner,
            "hidden_size": hidden,
            "layer_types": LAYERS,
            "num_attention_heads": hidden // 64,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rope_theta": 1000000.0,
            "tie_embedding": True,
        },
        "vision_config": {"model_type": "siglip2_vision_model", "vision_use_head": False, **vision},
    }
    for name, hidden, inner, vision in (
        ("LiquidAI__LFM2.5-VL-450M", 1024, 6656, {}),
        (
            "LiquidAI__LFM2.5-VL-1.6B",
            2048,
            12288,
            {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27},
        ),
    )
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint as those on the hub are. Tests must not change it."""
    folder = tmp_path_factory.mktemp("published")
    return as_published(make_checkpoint(folder / "saved"), folder / "checkpoint")


@pytest.fixture(scope="module")
def exported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export, without compression."""
    return export(published, tmp_path_factory.mktemp("exported") / "out", QUICK).folder


def family_of(settings: dict[str, Any]) -> Lfm2VL:
    """The runtime's family with an image processor's settings."""
    splitting = {name: settings[name] for name in exporter._SPLITTING if name != "do_image_splitting"}
    facts = {
        **settings,
        **exporter._TOKENS,
        "image_token_id": 396,
        "table_side": 16,
        "splitting": splitting if settings["do_image_splitting"] else None,
    }
    family = make_family("lfm2_vl", facts)
    assert isinstance(family, Lfm2VL)
    return family


def reference_pictures(settings: dict[str, Any], resize: Resize, *images: np.ndarray) -> Any:
    """What transformers' image processor makes of pictures."""
    with resizing_with(resize):
        return image_processor(**settings)(
            [[*images]], input_data_format="channels_last", return_row_col_info=True, return_tensors="pt"
        )


def reference_text(settings: dict[str, Any], pictures: Any, words: Any) -> str:
    """The image block that transformers' processor writes for the first of the pictures."""
    processor = reference_processor(words, image_processor(**settings), None)
    return str(processor.replace_image_token(pictures, 0, use_image_special_tokens=True))


SIZES = [(9, 9), (1, 500), (500, 1), (16, 60), (45, 45), (46, 45), (64, 65), (100, 70), (33, 200), (300, 41)]
SIZES += [tuple(size) for size in np.random.default_rng(5).integers(5, 200, (40, 2)).tolist()]
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": SETTINGS,
    "no thumbnail": {**SETTINGS, "use_thumbnail": False},
    "not split": {**SETTINGS, "do_image_splitting": False},
    "few tiles": {**SETTINGS, "max_tiles": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_views_and_image_block_equal_the_reference(variant: str, published: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    settings, words = VARIANTS[variant], PreTrainedTokenizerFast.from_pretrained(published)
    family = family_of(settings)
    split = 0
    for size in SIZES:
        visual = family.preprocess(noise(*size), HIGH)
        wanted = reference_pictures(settings, pillow_resize, noise(*size))
        found = [view.inputs()[PIXEL_VALUES][0] for view in visual.views]
        expected = packed(wanted)
        assert [each.shape for each in found] == [each.shape for each in expected]
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
        assert family.image_text(visual.layout) == reference_text(settings, wanted, words)
        split += len(visual) > 1
    assert (split > 0) == settings["do_image_splitting"]


def test_a_strip_that_the_reference_fails_at_is_shown_within_its_bounds() -> None:
    """Its thumbnail has more patches there than a tile, and both cannot be put into one batch."""
    with pytest.raises(RuntimeError, match="equal size"):
        reference_pictures(SETTINGS, pillow_resize, noise(600, 3))
    split = family_of(SETTINGS).preprocess(noise(600, 3), HIGH).layout
    assert split.rows * split.cols == 10
    assert split.whole.tokens <= SETTINGS["max_image_tokens"]


@pytest.mark.parametrize(
    ("size", "tokens", "views"),
    [
        ((1200, 1600), 6 * 256 + 13 * 18, 7),
        ((512, 512), 256, 1),
        ((480, 640), 13 * 18, 1),
        ((720, 720), 256, 1),
        ((740, 740), 4 * 256 + 256, 5),
        ((300, 200), 10 * 7, 1),
    ],
)
def test_a_picture_has_the_published_processor_s_views(size: tuple[int, int], tokens: int, views: int) -> None:
    """Of torchvision's resampling Pillow's is a level off at most."""
    family, image = family_of(PUBLISHED_SETTINGS), noise(*size)
    visual = family.preprocess(image, HIGH)
    assert len(visual) == views
    assert family.image_text(visual.layout).count("<image>") == tokens
    expected = packed(reference_pictures(PUBLISHED_SETTINGS, torch_resize, image))
    found = [view.inputs()[PIXEL_VALUES][0] for view in visual.views]
    level = float(np.diff(family.lookup).max())
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= 1.001 * level
        assert np.mean(got != want) < 0.25


def test_resampling_is_a_level_off_torchvision_s_at_most() -> None:
    given = torch.from_numpy(photograph("china.jpg").copy()).permute(2, 0, 1)[None].contiguous()
    for size in ((512, 1024), (416, 576), (200, 300), (900, 1500), (64, 33)):
        here, there = (resize(given, size).int() for resize in (pillow_resize, torch_resize))
        assert int((here - there).abs().max()) <= 1
        assert float((here != there).float().mean()) < 0.25


def test_auto_takes_no_more_tiles_than_the_picture_has_pixels_for() -> None:
    family = family_of(PUBLISHED_SETTINGS)
    for size, auto_tiles in {(740, 740): 0, (1200, 1600): 6, (520, 2600): 5, (1080, 1920): 2}.items():
        high, auto, low = (family.preprocess(noise(*size), ImageBudget(detail)) for detail in ("high", "auto", "low"))
        tiles = [each.layout.rows * each.layout.cols for each in (high, auto, low)]
        assert tiles[1] == auto_tiles <= min(tiles[0], size[0] * size[1] // 512**2)
        assert tiles[2] == 0
        assert low.layout.whole.tokens <= 256


@pytest.mark.parametrize("size", [(2, 2), (1, 7), (2, 40), (5, 3), (16, 16), (26, 36), (64, 15)])
def test_positions_are_stretched_as_in_the_reference(size: tuple[int, int]) -> None:
    table = torch.randn(16, 16, 8, generator=torch.Generator().manual_seed(1))
    rows, cols = size
    wanted = Siglip2VisionEmbeddings.resize_positional_embeddings(table, torch.tensor([size]), rows * cols)[0].numpy()
    indices, weights = stretched_table(rows, cols, 16)
    assert len(indices) <= 4 or min(size) < 16
    found = (table.reshape(256, 8).numpy()[indices] * weights[..., None]).sum(0)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_pieces_make_the_same_model(exported: Path, published: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With a limit below one layer's weights every layer is a piece of its own, a convolution's state included."""
    monkeypatch.setattr(native_route, "PARTITION_WEIGHTS", 1000)
    report = export(published, tmp_path / "out", ExportOptions("fp32", via="native"))
    assert report.verification is not None
    assert report.verification.greedy_agreement == 1
    options: dict[str, Any] = {"max_new_tokens": 32, "detail": "high"}
    whole, pieced = (
        VLM(folder, F32).generate(photograph("china.jpg"), QUESTION, **options) for folder in (exported, report.folder)
    )
    assert pieced.token_ids == whole.token_ids


def test_the_parts_run_fused(exported: Path) -> None:
    """Two layers of attention and two of convolutions: a product for each projection, a state for each convolution."""
    vlm = VLM(exported, F32)
    kinds = runtime_kinds(vlm.language_model._compiled)
    assert kinds["ScaledDotProductAttention"] == 2
    assert kinds["MemoryInput"] == kinds["MemoryOutput"] == 2 * 2 + 2
    assert kinds["FullyConnected"] == 4 * 4 + 1
    assert kinds["RMS"] == 4 * 2 + 2 * 2 + 1
    seen = runtime_kinds(vlm.vision._compiled)
    assert seen["FullyConnected"] == 1 + 2 * 4 + 2
    assert seen["Softmax"] == 0


@pytest.mark.parametrize("as_held", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_and_their_shapes_are_those_of_transformers(name: str, as_held: bool, tmp_path: Path) -> None:
    """With all layers, and so with the sizes that a config leaves to its class."""
    found = published_folder(name)
    config = read_json(found / "config.json") if found else PUBLISHED[name]
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "processor_config.json", {"image_processor": PUBLISHED_SETTINGS})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    wanted = {
        each if as_held else each.replace("vision_tower.", "vision_tower.vision_model."): tuple(weight.shape)
        for each, weight in model.state_dict().items()
        if each != "lm_head.weight"  # tied
    }
    checkpoint = Checkpoint(tmp_path, name, None, config)
    facts, preprocessor = family_config(checkpoint)
    made = architecture(checkpoint, facts, wanted)
    assert dict(made.shapes) == wanted
    assert overlooked([*made.sections, preprocessor]) == {}
    assert (facts["image_token_id"], facts["table_side"]) == (396, 16)
    assert len(made.decoder.states) == 6 * 2 + 10
    assert not made.traits.rewindable


def test_what_a_config_is_silent_about_is_what_the_class_has() -> None:
    settings = {name: value for name, value in exporter._PREPROCESSOR_DEFAULTS.items() if name != "do_convert_rgb"}
    silent = image_processor().__class__()
    for made, defaults in (
        (Lfm2VlConfig(), exporter._DEFAULTS),
        (Siglip2VisionConfig(), exporter._VISION_DEFAULTS),
        (silent, settings),
    ):
        found = {name: getattr(made, name) for name in defaults}
        assert {name: list(each) if isinstance(each, tuple) else each for name, each in found.items()} == defaults


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "other patches": (
        "processor_config.json",
        "image_processor",
        {"encoder_patch_size": 8},
        "encoder_patch_size of processor_config.json is 8, that of config.json 4",
    ),
    "few tokens": (
        "processor_config.json",
        "image_processor",
        {"min_image_tokens": 32},
        "min_image_tokens 32 is more than max_image_tokens 16",
    ),
    "one tile": ("processor_config.json", "image_processor", {"min_tiles": 1}, "min_tiles must be between 2 and"),
    "odd tiles": ("processor_config.json", "image_processor", {"tile_size": 30}, "tile_size must be a multiple of 8"),
    "no names": ("processor_config.json", "", {"use_image_special_tokens": False}, "without special tokens around"),
    "no RGB": ("processor_config.json", "image_processor", {"do_convert_rgb": False}, "sets do_convert_rgb to false"),
    "a table": ("config.json", "vision_config", {"num_patches": 24}, "num_patches must be a square, not 24"),
    "another encoder": (
        "config.json",
        "vision_config",
        {"model_type": "siglip_vision_model"},
        "builds no 'siglip_vision_model' vision model; it knows siglip2_vision_model",
    ),
    "an earlier layer": ("config.json", "", {"vision_feature_layer": -2}, "builds no vision_feature_layer -2"),
    "no decoder": ("config.json", "text_config", {"model_type": None}, "states no text_config.model_type"),
    "a mixture": ("config.json", "text_config", {"model_type": "lfm2_moe"}, "builds no 'lfm2_moe' decoder; it knows"),
    "a window": (
        "config.json",
        "text_config",
        {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"]},
        "does not build layers of type sliding_attention",
    ),
    "few types": ("config.json", "text_config", {"layer_types": ["conv"]}, "must name the types of 4 layers"),
    "no attention": ("config.json", "text_config", {"layer_types": ["conv"] * 4}, "layers are all without attention"),
    "no list": (
        "config.json",
        "text_config",
        {"layer_types": None, "full_attn_idxs": 3},
        "full_attn_idxs must be a list of layers, not 3",
    ),
    "no places": (
        "config.json",
        "text_config",
        {"conv_L_cache": 1},
        "builds no convolution of text_config.conv_L_cache 1",
    ),
    "another id": ("config.json", "", {"image_token_id": 7}, "the checkpoint contradicts itself: <image> is 4"),
    "unknown arithmetic": (
        "config.json",
        "text_config",
        {"conv_activation": "silu"},
        "edgevlm does not know text_config.conv_activation ('silu')",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_together_or_is_not_built_is_refused(case: str, published: Path, tmp_path: Path) -> None:
    file, section, changes, line = REFUSED[case]
    checkpoint = Path(shutil.copytree(published, tmp_path / "checkpoint"))
    content = read_json(checkpoint / file)
    (content[section] if section else content).update(changes)
    write_json(checkpoint / file, content)
    with pytest.raises(SourceError, match=re.escape(line)):
        export(checkpoint, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()
