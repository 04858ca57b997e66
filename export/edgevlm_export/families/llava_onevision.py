"""LLaVA-OneVision: the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.families import llava
from edgevlm_export.families.base import Architecture, FamilyExporter
from edgevlm_export.families.preprocessing import check_always_done, read_arithmetic
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

# What transformers' LlavaOnevisionConfig and LlavaOnevisionImageProcessor assume where the checkpoint is silent:
# models/llava_onevision/ of transformers 5.24.
_GRIDS = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
_ANYRES = "anyres_max_9"
_DEFAULTS: dict[str, Any] = llava.DEFAULTS | {
    "image_token_index": 151646,
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
    "image_grid_pinpoints": _GRIDS,
    "vision_aspect_ratio": _ANYRES,
}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    **llava.STEPS,
    "size": {"height": 384, "width": 384},
    "image_grid_pinpoints": _GRIDS,
    "do_center_crop": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": llava.CLIP_MEAN,
    "image_std": llava.CLIP_STD,
}
_HARMLESS = (*llava.HARMLESS, "use_image_newline_parameter", "video_token_id", "video_token_index")
"""transformers adds the newline always; and there are no videos here."""
_PREPROCESSOR_HARMLESS = (*llava.PROCESSOR_HARMLESS, "do_pad")
"""`do_pad` adds empty tiles to pictures of fewer ones in a batch, which are not looked at; here each stands alone."""


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.llava_onevision` reads, and the image processor's settings as read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    config = checkpoint.section("", _DEFAULTS)
    tower, tile = llava.read_tower(config), _tile(preprocessor)
    grids = preprocessor.get("image_grid_pinpoints")
    _check_grids(grids, tile, preprocessor.file)
    stated = checkpoint.read("processor_config.json")
    pairs = {
        "side of a view": (tile, tower.image_size),
        "image_grid_pinpoints": (grids, config.get("image_grid_pinpoints")),
        "image tokens of a view": (stated.get("num_image_tokens", tower.patches), tower.patches),
        "vision_aspect_ratio": (stated.get("vision_aspect_ratio", _ANYRES), config.get("vision_aspect_ratio")),
    }
    for what, (processor, model) in pairs.items():
        if processor != model:
            raise SourceError(f"the checkpoint contradicts itself: its processor and its config.json differ in {what}")
    facts = {
        **llava.image_token(checkpoint, config),
        "patches_per_side": tower.side,
        "max_tiles_of_features": _most_tiles(config.text("vision_aspect_ratio")),
        "preprocessing": {"tile": tile, "image_grid_pinpoints": grids, **read_arithmetic(preprocessor)},
    }
    return facts, preprocessor


def _tile(preprocessor: ConfigReader) -> int:
    size = preprocessor.section("size")
    tile = size.size("height")
    if size.size("width") != tile or preprocessor.flag("do_center_crop") or preprocessor.get("crop_size"):
        raise SourceError(f"{preprocessor.file}: views must be squares of one size, not cropped")
    return tile


def _check_grids(grids: Any, tile: int, file: str) -> None:
    """Raise `SourceError` for grids that are not pairs of a height and a width in whole tiles."""
    pairs = grids if isinstance(grids, list) and grids else [None]
    for each in pairs:
        sides = each if isinstance(each, list) and len(each) == 2 else [None]
        if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 or side % tile for side in sides):
            raise SourceError(f"{file}: image_grid_pinpoints must be heights and widths in tiles of {tile}, not {each}")


def _most_tiles(aspect_ratio: str) -> int:
    """Return as many tiles' patches as the model reads of a picture. Raises `UnsupportedError`."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", aspect_ratio)
    if not found:
        raise UnsupportedError(f"the native route builds no vision_aspect_ratio {aspect_ratio!r}")
    return int(found[1])


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:  # noqa: ARG001
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    config = checkpoint.section("", _DEFAULTS, harmless=_HARMLESS)
    if "model_type" not in config.section("text_config"):
        raise SourceError("config.json states no text_config.model_type")
    for key in ("image_grid_pinpoints", "vision_aspect_ratio"):  # the runtime's, which has them as facts
        config.get(key)
    if config.get("vision_feature_select_strategy") != "full":
        raise UnsupportedError("the native route builds no vision_feature_select_strategy but full")
    return llava.make_architecture(config, tensors, has_newline=True)


EXPORTER = FamilyExporter(family_config, architecture, covers_onnx=False, renamed=llava.RENAMED)
