"""GLM-OCR: the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm_export.families.base import (
    Architecture,
    FamilyExporter,
    is_tied,
    read_activation,
    read_axial_theta,
    read_side,
)
from edgevlm_export.families.preprocessing import (
    CLIP_DEFAULTS,
    check_always_done,
    read_arithmetic,
    read_block_token_ids,
    read_pixels,
)
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.decoder import GatedMLP
from edgevlm_export.graphs.glm_vision import ConvolutionMerger, glm_graph
from edgevlm_export.graphs.modules import FrameConvolution, Linear, Norm, PatchConvolution
from edgevlm_export.graphs.packed_vit import Block, PackedTransformer, axial_rope
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader

# What transformers' Glm46VImageProcessor, GlmOcrConfig and GlmOcrVisionConfig assume where the checkpoint is silent:
# models/glm46v/ and models/glm_ocr/ of transformers 5.24.
_DEFAULTS: dict[str, Any] = {
    "image_token_id": 59280,
    "video_token_id": 59281,
    "image_start_token_id": 59256,
    "image_end_token_id": 59257,
    "video_start_token_id": 59258,
    "video_end_token_id": 59259,
    "tie_word_embeddings": False,
}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    **CLIP_DEFAULTS,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "hidden_act": "silu",
    "attention_bias": True,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 1536,
    "intermediate_size": 4096,
}
_HARMLESS = (
    "image_end_token_id",
    "image_start_token_id",
    "video_end_token_id",
    "video_start_token_id",
    "video_token_id",
)
"""Of videos, and ids that the runtime has as facts."""
_TEXT_HARMLESS = ("num_nextn_predict_layers",)
"""Of a layer for multi-token prediction, which transformers does not load either."""
_VISION_HARMLESS = ("hidden_dropout_prob", "image_size")
"""The class takes pictures of any size."""
_PREPROCESSOR_HARMLESS = ("data_format", "default_to_square", "do_pad", "image_processor_type")
_TOKENS = {"image_token": "<|image|>", "image_start": "<|begin_of_image|>", "image_end": "<|end_of_image|>"}
_SIZES = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}
"""What the image processor calls the sizes of `vision_config`."""
_LAYER_NORM_EPS = 1e-5
"""Of the merger's norm, which no config changes."""
_DECODER, _VISION = "model.language_model", "model.visual"


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.glm_ocr` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    vision = checkpoint.section("vision_config", _VISION_DEFAULTS)
    for name, other in _SIZES.items():
        if preprocessor.size(name) != (stated := read_side(vision, other)):
            raise SourceError(
                f"the checkpoint contradicts itself: {name} of {preprocessor.file} is {preprocessor.size(name)},"
                f" {vision.name_of(other)} is {stated}"
            )
    tokens = {**_TOKENS, "image_token": checkpoint.named_tokens.get("image_token", _TOKENS["image_token"])}
    facts = {
        "model_type": checkpoint.model_type,
        "image_token": tokens["image_token"],
        "image_token_id": read_block_token_ids(checkpoint, tokens, _DEFAULTS)["image_token_id"],
        "vision_start": tokens["image_start"],
        "vision_end": tokens["image_end"],
        **{name: preprocessor.size(name) for name in _SIZES},
        **read_pixels(preprocessor),
        **read_arithmetic(preprocessor),
    }
    return facts, preprocessor


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:  # noqa: ARG001
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    config = checkpoint.section("", _DEFAULTS, harmless=_HARMLESS)
    text = text_section(config, _TEXT_HARMLESS)
    seen = config.section("vision_config", _VISION_DEFAULTS, harmless=_VISION_HARMLESS)
    config.get("image_token_id")
    decoder = read_decoder(text, _DECODER, "lm_head", tied=is_tied(config, text, tensors))
    if (out := seen.size("out_hidden_size")) != decoder.hidden_size:
        raise SourceError(
            f"config.json contradicts itself: {seen.name_of('out_hidden_size')} is {out}, and the decoder has"
            f" {decoder.hidden_size} channels"
        )
    vision = _vision(seen)
    graph = glm_graph(vision, _merger(seen, vision, out))
    unused = (f"{_DECODER}.layers.{len(decoder.layers)}.*",)
    return Architecture(decoder, graph, unused, (config, text, seen), DecoderTraits(position_axes=3))


def _vision(section: ConfigReader) -> PackedTransformer:
    hidden = section.size("hidden_size")
    heads = section.heads("num_heads", hidden)
    if hidden // heads % 4:
        raise SourceError(f"config.json: heads of {hidden // heads} channels cannot be rotated by row and column")
    patches = FrameConvolution(
        f"{_VISION}.patch_embed.proj",
        hidden,
        section.size("in_channels"),
        read_side(section, "temporal_patch_size"),
        read_side(section, "patch_size"),
    )
    return PackedTransformer(
        patches,
        None,
        tuple(_block(section, index, hidden, hidden // heads) for index in range(section.size("depth"))),
        None,
        (),
        heads,
        section.size("spatial_merge_size"),
        axial_rope(hidden // heads, read_axial_theta(section)),
        post_norm=Norm(f"{_VISION}.post_layernorm", hidden, section.number("rms_norm_eps")),
    )


def _block(section: ConfigReader, index: int, hidden: int, head_dim: int) -> Block:
    at, inner = f"{_VISION}.blocks.{index}", section.size("intermediate_size")
    eps, bias = section.number("rms_norm_eps"), section.flag("attention_bias")
    before, after = (Norm(f"{at}.norm{number}", hidden, eps) for number in (1, 2))
    qkv, proj = Linear(f"{at}.attn.qkv", 3 * hidden, hidden, bias), Linear(f"{at}.attn.proj", hidden, hidden, bias)
    q_norm, k_norm = (Norm(f"{at}.attn.{name}_norm", head_dim, eps) for name in "qk")
    mlp = _mlp(section, f"{at}.mlp", hidden, inner, bias=bias)
    return Block(at, before, (qkv,), proj, after, mlp, q_norm=q_norm, k_norm=k_norm)


def _mlp(section: ConfigReader, at: str, hidden: int, inner: int, *, bias: bool = False) -> GatedMLP:
    gate, up = (Linear(f"{at}.{name}_proj", inner, hidden, bias) for name in ("gate", "up"))
    return GatedMLP(gate, up, Linear(f"{at}.down_proj", hidden, inner, bias), read_activation(section, "hidden_act"))


def _merger(section: ConfigReader, vision: PackedTransformer, out: int) -> ConvolutionMerger:
    """Return what makes image tokens of `out` channels; the reference takes colours for the factor of its MLP."""
    at = f"{_VISION}.merger"
    return ConvolutionMerger(
        PatchConvolution(f"{_VISION}.downsample", out, vision.hidden_size, vision.merge),
        Linear(f"{at}.proj", out, out),
        Norm(f"{at}.post_projection_norm", out, _LAYER_NORM_EPS, bias=True),
        _mlp(section, at, out, out * section.size("in_channels")),
    )


EXPORTER = FamilyExporter(family_config, architecture, covers_onnx=False)
