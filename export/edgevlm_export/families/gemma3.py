"""Gemma 3 with pictures (4B, 12B, 27B): the facts about preprocessing and prompt that the runtime needs, and graphs."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm.runtime.core import import_openvino
from edgevlm_export.families import llava
from edgevlm_export.families.base import Architecture, FamilyExporter, is_tied
from edgevlm_export.families.preprocessing import check_always_done, read_arithmetic, read_image_token_id
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.connectors import average_pool
from edgevlm_export.graphs.constants import Constants, named
from edgevlm_export.graphs.layers import rms_norm
from edgevlm_export.graphs.modules import Norm, Tensor
from edgevlm_export.graphs.stages import Graph, Stage, Values
from edgevlm_export.graphs.token_merging import merged_tokens
from edgevlm_export.graphs.tower import Tower, pooling_head, tower_stages
from edgevlm_export.graphs.vision_transformer import last_norm
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader

# What transformers' Gemma3Config, Gemma3ImageProcessor and Gemma3Processor assume where the checkpoint is silent:
# models/gemma3/ of transformers 5.24.
_DEFAULTS: dict[str, Any] = {
    "image_token_index": 262144,
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "mm_tokens_per_image": 256,
}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    **llava.STEPS,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
_TEXT_HARMLESS = ("cache_implementation",)
"""How transformers 4 keeps the cache of local layers."""
_PREPROCESSOR_HARMLESS = (*llava.PROCESSOR_HARMLESS, "image_seq_length")
"""The latter is processor_config.json's, and is checked there."""
_TOKENS = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
_SIGLIP = "siglip_vision_model"


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.gemma3` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    config = checkpoint.section("", _DEFAULTS)
    tower, size = _tower(llava.tower_section(config, _SIGLIP)), preprocessor.section("size")
    side = size.size("height")
    if size.size("width") != side or side != tower.image_size:
        raise SourceError(
            f"the checkpoint contradicts itself: {preprocessor.file} makes views of {side} x {size.size('width')}"
            f" pixels, vision_config.image_size is {tower.image_size}"
        )
    facts = {
        **_tokens(checkpoint, config),
        "image_seq_len": _image_seq_len(checkpoint, config, tower),
        "preprocessing": {"side": side, "pan_and_scan": _pan_and_scan(preprocessor), **read_arithmetic(preprocessor)},
    }
    return facts, preprocessor


def _tokens(checkpoint: Checkpoint, config: ConfigReader) -> dict[str, Any]:
    """Return what the tokens of an image block are called, and the id of the image token. Raises `SourceError`."""
    tokens: dict[str, str] = {}
    ids: dict[str, int] = {}
    for name, usual in _TOKENS.items():
        key = f"{name}_token_id" if f"{name}_token_id" in config else f"{name}_token_index"
        token = checkpoint.named_tokens.get(f"{name}_token", usual)
        token_id = read_image_token_id(checkpoint, config.get(key), key)
        if (held := checkpoint.added_tokens.get(token, {}).get("id", token_id)) != token_id:
            raise SourceError(f"the checkpoint contradicts itself: {token} is {held}, {key} of config.json {token_id}")
        tokens[f"{name}_token"], ids[name] = token, token_id
    return {**tokens, "image_token_id": ids["image"]}


def _image_seq_len(checkpoint: Checkpoint, config: ConfigReader, tower: Tower) -> int:
    """Return the image tokens of a view, which are a square of averaged patches."""
    count, patches = config.size("mm_tokens_per_image"), tower.side
    side = math.isqrt(count)
    if side**2 != count or patches % side:
        raise SourceError(
            f"config.json contradicts itself: mm_tokens_per_image {count} are no square that {patches} patches a side"
            " can be averaged to"
        )
    if (stated := checkpoint.read("processor_config.json").get("image_seq_length", count)) != count:
        raise SourceError(
            f"the checkpoint contradicts itself: processor_config.json says {stated} image tokens a view, config.json"
            f" {count}"
        )
    return count


def _pan_and_scan(preprocessor: ConfigReader) -> dict[str, Any] | None:
    """Return which pictures are cropped, None where `do_pan_and_scan` is not asked for."""
    numbers = {
        "min_crop_size": preprocessor.size("pan_and_scan_min_crop_size"),
        "max_num_crops": preprocessor.size("pan_and_scan_max_num_crops"),
        "min_ratio_to_activate": preprocessor.number("pan_and_scan_min_ratio_to_activate"),
    }
    return numbers if preprocessor.flag("do_pan_and_scan") else None


def _tower(section: ConfigReader, prefix: str = "") -> Tower:
    return llava.make_tower(section, -1, prefix)


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    ids = [f"{name}_token_{kind}" for name in _TOKENS for kind in ("id", "index")]
    config = checkpoint.section("", _DEFAULTS, harmless=(*ids, "mm_tokens_per_image"))  # the facts have them
    text, seen = text_section(config, _TEXT_HARMLESS), llava.tower_section(config, _SIGLIP)
    names = llava.Names.found(tensors, "mm_soft_emb_norm.weight")
    decoder = read_decoder(text, names.decoder, names.head, tied=is_tied(config, text, tensors, names.head))
    tower = _tower(seen, names.tower)
    width, hidden = tower.hidden_size, decoder.hidden_size
    factor = tower.side // math.isqrt(facts["image_seq_len"])
    norm = Norm(f"{names.projector}.mm_soft_emb_norm", width, tower.layer_norm_eps, unit_offset=True)
    projection = Tensor(f"{names.projector}.mm_input_projection_weight", (width, hidden))

    def connect(values: Values, constants: Constants) -> None:
        x = average_pool(values["hidden_states"], tower.side, width, factor)
        x = rms_norm(x, constants, norm)
        weight = constants.transposed(projection.name)
        values["last_hidden_state"] = named(import_openvino().opset13.matmul(x, weight, False, True), names.projector)

    def graph(tower: Tower) -> Graph:
        inputs = {"pixel_values": ("f32", (-1, tower.num_channels, tower.image_size, tower.image_size))}
        end = Stage(partial(last_norm, tower), (tower.post_layernorm,))
        stages = [*tower_stages(tower), end, Stage(connect, (norm, projection))]
        return Graph(inputs, stages, "last_hidden_state", "last_hidden_state")

    def merged(ratio: float) -> Graph:
        return graph(replace(tower, merged_tokens=merged_tokens(ratio, tower.patches, tower.layers)))

    return Architecture(
        replace(decoder, groups_images=True),
        graph(tower),
        pooling_head(tower.prefix),
        (config, text, seen),
        DecoderTraits(atomic_images=True),
        merged_vision=merged,
    )


EXPORTER = FamilyExporter(family_config, architecture, covers_onnx=False, renamed=llava.RENAMED)
