"""PaddleOCR-VL: the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm_export.families.base import Architecture, FamilyExporter, is_tied, read_activation, read_axial_theta
from edgevlm_export.families.preprocessing import (
    CLIP_DEFAULTS,
    check_always_done,
    read_arithmetic,
    read_block_token_ids,
    read_pixels,
)
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.modules import Embedding, Linear, Norm, PatchConvolution
from edgevlm_export.graphs.packed_vit import Block, Merger, PackedTransformer, PlainMLP, axial_rope, packed_stages
from edgevlm_export.graphs.stages import Graph
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader

# What transformers' PaddleOCRVLImageProcessor, PaddleOCRVLConfig and PaddleOCRVisionConfig assume where the checkpoint
# is silent: models/paddleocr_vl/ of transformers 5.24.
_DEFAULTS: dict[str, Any] = {
    "image_token_id": 100295,
    "video_token_id": 100296,
    "vision_start_token_id": 101305,
    "vision_end_token_id": 101306,
    "tie_word_embeddings": True,
}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 384 * 384, "longest_edge": 1536 * 1536},
    "patch_size": 14,
    "temporal_patch_size": 1,
    "merge_size": 2,
    **CLIP_DEFAULTS,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "spatial_merge_size": 2,
}
_HARMLESS = (
    "compression_ratio",
    "hidden_dropout_prob",
    "ignored_index",
    "max_sequence_length",
    "rope_is_neox_style",
    "use_3d_rope",
    "use_flash_attention",
    "video_token_id",
    "vision_end_token_id",
    "vision_start_token_id",
    "weight_share_add_bias",
)
"""What published files state of training and of other classes, which the reference does not read, and ids."""
_VISION_HARMLESS = ("temporal_patch_size", "tokens_per_second", "vision_use_head")
"""Of videos, which the reference does not take, and of a head that it does not load."""
_PREPROCESSOR_HARMLESS = ("data_format", "default_to_square", "do_pad", "image_processor_type")
_TOKENS = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "vision_start": "<|IMAGE_START|>",
    "vision_end": "<|IMAGE_END|>",
}
_SIZES = {"patch_size": "patch_size", "merge_size": "spatial_merge_size"}
"""What the image processor calls the sizes of `vision_config`."""
_EPS = 1e-5
"""Of the projector's norm, which no config changes."""


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.paddleocr_vl` reads, and the image processor's settings as read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    vision = checkpoint.section("vision_config", _VISION_DEFAULTS)
    for name, other in _SIZES.items():
        if preprocessor.size(name) != vision.size(other):
            raise SourceError(
                f"the checkpoint contradicts itself: {name} of {preprocessor.file} is {preprocessor.size(name)},"
                f" {vision.name_of(other)} is {vision.size(other)}"
            )
    if (frames := preprocessor.size("temporal_patch_size")) != 1:
        raise SourceError(f"{preprocessor.file}: temporal_patch_size is {frames}, and the encoder takes one picture")
    tokens = {**_TOKENS, "image_token": checkpoint.named_tokens.get("image_token", _TOKENS["image_token"])}
    facts = {
        "model_type": checkpoint.model_type,
        **tokens,
        "image_token_id": read_block_token_ids(checkpoint, tokens, _DEFAULTS)["image_token_id"],
        **{name: preprocessor.size(name) for name in _SIZES},
        "temporal_patch_size": frames,
        "table_side": _table_side(vision),
        **read_pixels(preprocessor),
        **read_arithmetic(preprocessor),
    }
    return facts, preprocessor


def _table_side(vision: ConfigReader) -> int:
    """Return the rows of the table of positions, which is a square. Raises `SourceError`."""
    size, patch = vision.size("image_size"), vision.size("patch_size")
    if size < patch:
        raise SourceError(f"config.json: {vision.name_of('image_size')} {size} is less than a patch's {patch}")
    return size // patch


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:  # noqa: ARG001
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    names = _Names(tensors)
    config = checkpoint.section("", _DEFAULTS, harmless=_HARMLESS)
    text = text_section(config, _HARMLESS)
    seen = config.section("vision_config", _VISION_DEFAULTS, harmless=_VISION_HARMLESS)
    config.get("image_token_id")
    decoder = read_decoder(text, names.decoder, "lm_head", tied=is_tied(config, text, tensors))
    vision = _vision(seen, names, decoder.hidden_size)
    graph = Graph(vision.inputs, packed_stages(vision), "image_embeds", "image_embeds")
    unused = (f"{names.vision}.head.*", f"{names.vision}.embeddings.packing_position_embedding.*")
    return Architecture(decoder, graph, unused, (config, text, seen), DecoderTraits(position_axes=3))


class _Names:
    """What weights begin with: as published, or as transformers 5 holds them in memory."""

    def __init__(self, tensors: Container[str]) -> None:
        held = "model.language_model.embed_tokens.weight" in tensors
        self.decoder = "model.language_model" if held else "model"
        self.vision = "model.visual.vision_model" if held else "visual.vision_model"
        self.projector = "model.projector" if held else "mlp_AR"


def _vision(section: ConfigReader, names: _Names, out: int) -> PackedTransformer:
    """Return the tower and its projector to the `out` channels of the decoder."""
    hidden, merge, at = section.size("hidden_size"), section.size("spatial_merge_size"), names.vision
    heads, eps = section.heads("num_attention_heads", hidden), section.number("layer_norm_eps")
    if hidden // heads % 4:
        raise SourceError(f"config.json: heads of {hidden // heads} channels cannot be rotated by row and column")
    patches = PatchConvolution(
        f"{at}.embeddings.patch_embedding", hidden, section.size("num_channels"), section.size("patch_size")
    )
    joined = hidden * merge**2
    mlp = PlainMLP(
        Linear(f"{names.projector}.linear_1", joined, joined, True),
        Linear(f"{names.projector}.linear_2", out, joined, True),
        "gelu",
    )
    return PackedTransformer(
        patches,
        Embedding(f"{at}.embeddings.position_embedding", _table_side(section) ** 2, hidden),
        tuple(_block(section, f"{at}.encoder.layers.{i}", hidden) for i in range(section.size("num_hidden_layers"))),
        Merger(Norm(f"{names.projector}.pre_norm", hidden, _EPS, bias=True), mlp),
        (),
        heads,
        merge,
        axial_rope(hidden // heads, read_axial_theta(section)),
        post_norm=Norm(f"{at}.post_layernorm", hidden, eps, bias=True),
    )


def _block(section: ConfigReader, at: str, hidden: int) -> Block:
    inner, eps = section.size("intermediate_size"), section.number("layer_norm_eps")
    q, k, v, out = (Linear(f"{at}.self_attn.{name}_proj", hidden, hidden, True) for name in ("q", "k", "v", "out"))
    before, after = (Norm(f"{at}.layer_norm{number}", hidden, eps, bias=True) for number in (1, 2))
    mlp = PlainMLP(
        Linear(f"{at}.mlp.fc1", inner, hidden, True),
        Linear(f"{at}.mlp.fc2", hidden, inner, True),
        read_activation(section, "hidden_act"),
    )
    return Block(at, before, (q, k, v), out, after, mlp)


EXPORTER = FamilyExporter(family_config, architecture, covers_onnx=False, renamed={"mlp_AR.": "projector."})
