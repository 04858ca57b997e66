"""LightOnOCR: the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.families.base import Architecture, FamilyExporter, is_tied, read_activation, read_side
from edgevlm_export.families.preprocessing import CLIP_DEFAULTS, check_always_done, read_arithmetic, read_image_token_id
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.decoder import GatedMLP
from edgevlm_export.graphs.modules import Linear, Norm, PatchConvolution
from edgevlm_export.graphs.packed_vit import Block, PackedTransformer
from edgevlm_export.graphs.pixtral import Projector, pixtral_graph, pixtral_rope
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

# What transformers' PixtralImageProcessor, LightOnOcrConfig and PixtralVisionConfig assume where the checkpoint is
# silent: models/lighton_ocr/ and models/pixtral/ of transformers 5.24.
_DEFAULTS: dict[str, Any] = {"image_token_id": 151655, "spatial_merge_size": 2, "tie_word_embeddings": True}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "size": {"longest_edge": 1024},
    "patch_size": {"height": 16, "width": 16},
    **CLIP_DEFAULTS,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 16,
    "hidden_act": "gelu",
}
_FIXED = {"projector_hidden_act": "gelu", "multimodal_projector_bias": False, "vision_feature_layer": -1}
"""What published files state and the reference does not read."""
_PREPROCESSOR_HARMLESS = ("data_format", "default_to_square", "do_pad", "image_processor_type")
"""`do_pad` makes pictures of a batch equally large; here each stands alone."""
_VISION_HARMLESS = ("head_dim", "image_size")
"""The class computes the one anew, and takes pictures of any size."""
_THETA = 10000.0
_EPS = 1e-5
"""Of all norms of the vision transformer, which no config changes."""
_DECODER, _ENCODER, _PROJECTION = "model.language_model", "model.vision_encoder", "model.vision_projection"


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.lighton_ocr` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    for name in ("vision_config", "text_config"):
        if "model_type" not in checkpoint.section(name):
            raise SourceError(f"config.json states no {name}.model_type")
    patch = read_side(checkpoint.section("vision_config", _VISION_DEFAULTS), "patch_size")
    merge, unit = checkpoint.section("", _DEFAULTS).size("spatial_merge_size"), _unit(preprocessor)
    stated = checkpoint.read("processor_config.json")
    for name, value in (("patch_size", patch), ("spatial_merge_size", merge)):
        if stated.get(name, value) != value:
            raise SourceError(
                f"the checkpoint contradicts itself: {name} of processor_config.json is {stated[name]}, that of"
                f" config.json {value}"
            )
    if unit % patch:
        raise SourceError(
            f"the checkpoint contradicts itself: pictures are resized to multiples of {unit} pixels, and patches have"
            f" {patch}"
        )
    facts = {
        "image_token": checkpoint.named_tokens.get("image_token", "<|image_pad|>"),
        "image_token_id": read_image_token_id(checkpoint, _DEFAULTS["image_token_id"]),
        "patch_size": patch,
        "merge_size": merge,
        "unit": unit,
        "longest_edge": preprocessor.section("size").size("longest_edge"),
        **read_arithmetic(preprocessor),
    }
    return facts, preprocessor


def _unit(preprocessor: ConfigReader) -> int:
    """Return what sides of resized pictures are multiples of, which the image processor calls its patch size."""
    if isinstance(preprocessor.get("patch_size"), int):
        return preprocessor.size("patch_size")
    sides = preprocessor.section("patch_size")
    unit = sides.size("height")
    if sides.size("width") != unit:
        raise SourceError(f"{preprocessor.file}: patch_size must be a square, not {sides.size('width')}x{unit}")
    return unit


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    config = checkpoint.section("", _DEFAULTS)
    text, seen = text_section(config), config.section("vision_config", _VISION_DEFAULTS, harmless=_VISION_HARMLESS)
    for key, value in _FIXED.items():
        if (found := config.get(key, value)) != value:
            raise UnsupportedError(f"the native route builds no {key} {found!r}")
    for key in ("image_token_id", "spatial_merge_size"):
        config.get(key)
    decoder = read_decoder(text, _DECODER, "lm_head", tied=is_tied(config, text, tensors))
    vision = _vision(seen, facts["merge_size"])
    width, hidden = vision.hidden_size, decoder.hidden_size
    projector = Projector(
        Norm(f"{_PROJECTION}.norm", width, text.number("rms_norm_eps")),
        Linear(f"{_PROJECTION}.patch_merger.merging_layer", width, width * vision.merge**2),
        Linear(f"{_PROJECTION}.linear_1", hidden, width),
        Linear(f"{_PROJECTION}.linear_2", hidden, hidden),
    )
    return Architecture(decoder, pixtral_graph(vision, projector), (), (config, text, seen))


def _vision(section: ConfigReader, merge: int) -> PackedTransformer:
    if (kind := section.get("model_type")) != "pixtral":
        raise UnsupportedError(f"the native route builds no {kind!r} vision encoder of LightOnOCR; it knows pixtral")
    hidden = section.size("hidden_size")
    heads = section.heads("num_attention_heads", hidden)
    if hidden // heads % 4:
        raise SourceError(f"config.json: heads of {hidden // heads} channels cannot be rotated by row and column")
    patches = PatchConvolution(
        f"{_ENCODER}.patch_conv", hidden, section.size("num_channels"), read_side(section, "patch_size"), bias=False
    )
    blocks = tuple(_block(section, index, hidden) for index in range(section.size("num_hidden_layers")))
    rope, pre_norm = pixtral_rope(hidden // heads, _theta(section)), Norm(f"{_ENCODER}.ln_pre", hidden, _EPS)
    return PackedTransformer(patches, None, blocks, None, (), heads, merge, rope, pre_norm=pre_norm)


def _block(section: ConfigReader, index: int, hidden: int) -> Block:
    at, inner = f"{_ENCODER}.transformer.layers.{index}", section.size("intermediate_size")
    q, k, v, o = (Linear(f"{at}.attention.{name}_proj", hidden, hidden) for name in "qkvo")
    before, after = (Norm(f"{at}.{name}_norm", hidden, _EPS) for name in ("attention", "ffn"))
    gate, up = (Linear(f"{at}.feed_forward.{name}_proj", inner, hidden) for name in ("gate", "up"))
    mlp = GatedMLP(
        gate, up, Linear(f"{at}.feed_forward.down_proj", hidden, inner), read_activation(section, "hidden_act")
    )
    return Block(at, before, (q, k, v), o, after, mlp)


def _theta(section: ConfigReader) -> float:
    """Return the base of the rotations, stated as transformers 5 does it (`rope_parameters`) or as 4 (`rope_theta`)."""
    assumed = {"rope_theta": section.get("rope_theta", _THETA), "rope_type": "axial"}
    parameters = section.section("rope_parameters", assumed)
    if (kind := parameters.get("rope_type")) not in ("axial", "default"):
        raise UnsupportedError(f"the native route does not build RoPE of type {kind} in the vision encoder")
    theta = parameters.number("rope_theta")
    if other := next(parameters.unread(), None):
        raise UnsupportedError(f"the native route does not build RoPE with {other[1]}")
    return theta


EXPORTER = FamilyExporter(family_config, architecture, covers_onnx=False)
