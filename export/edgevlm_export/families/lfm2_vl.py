"""LFM2-VL and LFM2.5-VL: the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm_export.families.base import Architecture, FamilyExporter, is_tied, read_activation, read_vision_sizes
from edgevlm_export.families.preprocessing import check_always_done, read_arithmetic, read_image_token_id
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.modules import Linear, Norm
from edgevlm_export.graphs.naflex import NaFlexTransformer, Projector, naflex_graph
from edgevlm_export.graphs.tower import pooling_head
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

# What transformers' Lfm2VlImageProcessor, Lfm2VlConfig and Siglip2VisionConfig assume where the checkpoint is silent:
# models/lfm2_vl/ and models/siglip2/ of transformers 5.24.
_DEFAULTS: dict[str, Any] = {
    "image_token_id": 396,
    "downsample_factor": 2,
    "projector_hidden_act": "gelu",
    "projector_hidden_size": 2560,
    "projector_bias": True,
    "projector_use_layernorm": True,
    "tie_word_embeddings": True,
}
_SPLITTING: dict[str, Any] = {
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "tile_size": 512,
    "max_pixels_tolerance": 2.0,
}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    **_SPLITTING,
    "downsample_factor": 2,
    "encoder_patch_size": 16,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 16,
    "num_patches": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
_PROCESSOR_KEYS = ("encoder_patch_size", "max_image_tokens", "max_num_patches", "min_image_tokens", *_SPLITTING)
_HARMLESS = (*_PROCESSOR_KEYS, "image_token_index", "use_image_special_tokens", "vision_feature_select_strategy")
"""The processor's settings, which config.json may repeat, and what transformers does not read."""
_PREPROCESSOR_HARMLESS = (
    "data_format",
    "default_to_square",
    "do_pad",
    "image_processor_type",
    "max_num_patches",
    "return_row_col_info",
    "size",
)
"""Padding is for batches; the sizes follow from the tiles and the image tokens."""
_TEXT_HARMLESS = (
    "block_dim",
    "block_mlp_init_scale",
    "block_norm_eps",
    "block_out_init_scale",
    "block_use_swiglu",
    "block_use_xavier_init",
    "conv_dim",
    "conv_dim_out",
    "conv_use_xavier_init",
    "num_heads",
    "use_pos_enc",
)
"""Of training and of LiquidAI's own code; transformers reads none of them."""
_TOKENS = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
}
_PROJECTOR_EPS = 1e-5
"""Of torch's LayerNorm, which no config changes."""


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.lfm2_vl` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    if "model_type" not in checkpoint.section("text_config"):
        raise SourceError("config.json states no text_config.model_type")
    vision = checkpoint.section("vision_config", _VISION_DEFAULTS)
    sizes = {name: preprocessor.size(name) for name in ("encoder_patch_size", "downsample_factor")}
    stated = {
        "encoder_patch_size": vision.size("patch_size"),
        "downsample_factor": checkpoint.section("", _DEFAULTS).size("downsample_factor"),
    }
    if different := next((name for name in sizes if sizes[name] != stated[name]), None):
        raise SourceError(
            f"the checkpoint contradicts itself: {different} of {preprocessor.file} is {sizes[different]}, that of"
            f" config.json {stated[different]}"
        )
    least, most = preprocessor.size("min_image_tokens"), preprocessor.size("max_image_tokens")
    if least > most:
        raise SourceError(f"{preprocessor.file}: min_image_tokens {least} is more than max_image_tokens {most}")
    facts = {
        **_tokens(checkpoint, preprocessor),
        **sizes,
        "min_image_tokens": least,
        "max_image_tokens": most,
        "splitting": _splitting(preprocessor, math.prod(sizes.values())),
        "table_side": _table_side(vision),
        **read_arithmetic(preprocessor),
    }
    return facts, preprocessor


def _tokens(checkpoint: Checkpoint, preprocessor: ConfigReader) -> dict[str, Any]:
    """Return what the tokens of an image block are called, and the image token's id. Raises `SourceError`."""
    named = preprocessor.flag("use_image_special_tokens", True)
    if not (named and checkpoint.read("processor_config.json").get("use_image_special_tokens", True)):
        raise UnsupportedError("the native route builds no image blocks without special tokens around them")
    names = {name: checkpoint.named_tokens.get(name, usual) for name, usual in _TOKENS.items()}
    token, token_id = names["image_token"], read_image_token_id(checkpoint, _DEFAULTS["image_token_id"])
    if (held := checkpoint.added_tokens.get(token, {}).get("id", token_id)) != token_id:
        raise SourceError(f"the checkpoint contradicts itself: {token} is {held}, image_token_id {token_id}")
    return {**names, "image_token_id": token_id}


def _splitting(preprocessor: ConfigReader, unit: int) -> dict[str, Any] | None:
    """Return how large pictures are split into tiles, None where they are not. Raises `SourceError`.

    `unit` is the side of the square of pixels that becomes one image token.
    """
    tile, least, most = (preprocessor.size(name) for name in ("tile_size", "min_tiles", "max_tiles"))
    thumbnail, tolerance = preprocessor.flag("use_thumbnail"), preprocessor.number("max_pixels_tolerance")
    if not preprocessor.flag("do_image_splitting") or least == most == 1:
        return None
    if not 2 <= least <= most:  # of one tile the reference counts the image tokens of the thumbnail
        raise SourceError(f"{preprocessor.file}: min_tiles must be between 2 and max_tiles ({most}), not {least}")
    if tile % unit:
        raise SourceError(f"{preprocessor.file}: tile_size must be a multiple of {unit}, not {tile}")
    return {
        "tile_size": tile,
        "min_tiles": least,
        "max_tiles": most,
        "use_thumbnail": thumbnail,
        "max_pixels_tolerance": tolerance,
    }


def _table_side(vision: ConfigReader) -> int:
    """Return the side of the grid of patches that the position table has a row for. Raises `SourceError`."""
    rows = vision.size("num_patches")
    side = math.isqrt(rows)
    if side**2 != rows:
        raise SourceError(f"config.json: {vision.name_of('num_patches')} must be a square, not {rows}")
    return side


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    config = checkpoint.section("", _DEFAULTS, harmless=_HARMLESS)
    text, seen = text_section(config, _TEXT_HARMLESS), config.section("vision_config", _VISION_DEFAULTS)
    if (layer := config.get("vision_feature_layer", -1)) != -1:
        raise UnsupportedError(f"the native route builds no vision_feature_layer {layer!r}")
    if (kind := seen.get("model_type")) != "siglip2_vision_model":
        raise UnsupportedError(f"the native route builds no {kind!r} vision model; it knows siglip2_vision_model")
    config.get("image_token_id")
    decoder = read_decoder(text, "model.language_model", "lm_head", tied=is_tied(config, text, tensors))
    seen.flag("vision_use_head")  # of another task
    published = "model.vision_tower.vision_model"
    prefix = published if f"{published}.post_layernorm.weight" in tensors else "model.vision_tower"
    vision = NaFlexTransformer(
        prefix=prefix,
        image_size=facts["table_side"] * seen.size("patch_size"),
        patch_size=seen.size("patch_size"),
        **read_vision_sizes(seen),
    )
    seen.get("num_patches")
    graph = naflex_graph(vision, _projector(config, vision, decoder.hidden_size))
    fixed = decoder.has_fixed_states
    traits = DecoderTraits(rewindable=not fixed, fixed_states=fixed)
    return Architecture(decoder, graph, pooling_head(prefix), (config, text, seen), traits)


def _projector(config: ConfigReader, vision: NaFlexTransformer, hidden: int) -> Projector:
    """Return what makes image tokens `hidden` channels wide."""
    at, bias, merge = "model.multi_modal_projector", config.flag("projector_bias"), config.size("downsample_factor")
    joined, inner = vision.hidden_size * merge**2, config.size("projector_hidden_size")
    norm = Norm(f"{at}.layer_norm", joined, _PROJECTOR_EPS, bias=True)
    return Projector(
        norm if config.flag("projector_use_layernorm") else None,
        Linear(f"{at}.linear_1", inner, joined, bias),
        Linear(f"{at}.linear_2", hidden, inner, bias),
        read_activation(config, "projector_hidden_act"),
        merge,
    )


EXPORTER = FamilyExporter(
    family_config, architecture, covers_onnx=False, renamed={"vision_tower.vision_model.": "vision_tower."}
)
