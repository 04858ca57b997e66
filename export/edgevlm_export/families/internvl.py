"""InternVL (3 and 3.5): the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.families.base import (
    Architecture,
    FamilyExporter,
    is_tied,
    read_activation,
    read_side,
    read_vision_sizes,
)
from edgevlm_export.families.preprocessing import CLIP_DEFAULTS, check_always_done, read_arithmetic, read_image_token_id
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.connectors import pixel_shuffle
from edgevlm_export.graphs.constants import Constants
from edgevlm_export.graphs.internvit import InternViT, vision_stages
from edgevlm_export.graphs.layers import activation, layer_norm, linear
from edgevlm_export.graphs.modules import Linear, Norm
from edgevlm_export.graphs.stages import Graph, Stage, Values
from edgevlm_export.graphs.token_merging import merged_tokens
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

# What transformers' GotOcr2ImageProcessor, InternVLConfig and InternVLVisionConfig assume where the checkpoint is
# silent: models/got_ocr2/ and models/internvl/ of transformers 5.24.
_DEFAULTS: dict[str, Any] = {
    "image_token_id": 151667,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": True,
}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "size": {"height": 384, "width": 384},
    "min_patches": 1,
    "max_patches": 12,
    **CLIP_DEFAULTS,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "attention_bias": False,
    "use_qk_norm": False,
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
}
_HARMLESS = ("image_seq_length",)
"""It follows from the sizes, and processor_config.json states it anew."""
_PREPROCESSOR_HARMLESS = (
    "crop_to_patches",
    "data_format",
    "default_to_square",
    "image_processor_type",
    "image_seq_length",
)
"""`InternVLProcessor` asks for tiles whatever `crop_to_patches` says."""
_VISION_HARMLESS = (
    "hidden_dropout_prob",
    "dropout",
    "projection_dropout",
    "initializer_factor",
    "layer_scale_init_value",
)
"""How training began, and what it left out."""
_TOKEN_NAMES = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
_PROJECTOR_EPS = 1e-5
"""Of torch's LayerNorm, which no config changes."""


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.internvl` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    if "model_type" not in checkpoint.section("text_config"):
        raise SourceError("config.json states no text_config.model_type")
    size = preprocessor.section("size")
    tile, least, most = size.size("height"), preprocessor.size("min_patches"), preprocessor.size("max_patches")
    if size.size("width") != tile:
        raise SourceError(f"{preprocessor.file}: size must be a square, not {size.size('width')}x{tile}")
    if least > most:
        raise SourceError(f"{preprocessor.file}: min_patches {least} is more than max_patches {most}")
    tokens = {name: checkpoint.named_tokens.get(name, usual) for name, usual in _TOKEN_NAMES.items()}
    facts = {
        "image_token": tokens.pop("context_image_token"),
        "image_token_id": read_image_token_id(checkpoint, _DEFAULTS["image_token_id"]),
        **tokens,
        "image_seq_len": _image_seq_len(checkpoint, tile),
        "preprocessing": {
            "tile": tile,
            "min_patches": least,
            "max_patches": most,
            **read_arithmetic(preprocessor),
        },
    }
    return facts, preprocessor


def _image_seq_len(checkpoint: Checkpoint, tile: int) -> int:
    """Return the image tokens of one tile."""
    vision = checkpoint.section("vision_config", _VISION_DEFAULTS)
    size, patch = read_side(vision, "image_size"), read_side(vision, "patch_size")
    if size != tile:
        raise SourceError(
            f"the checkpoint contradicts itself: tiles of {tile} pixels, and vision_config.image_size {size};"
            " edgevlm does not stretch InternVL's positions"
        )
    factor = _factor(checkpoint.section("", _DEFAULTS))
    if size // patch % factor:
        raise SourceError(
            f"config.json contradicts itself: {size // patch} patches a side cannot be folded by {factor}"
        )
    computed = (size // patch // factor) ** 2
    stated = checkpoint.read("processor_config.json").get("image_seq_length", computed)
    if stated != computed:
        raise SourceError(
            f"the checkpoint contradicts itself: processor_config.json says {stated} image tokens a tile, "
            f"the sizes in config.json make {computed}"
        )
    return computed


def _factor(config: ConfigReader) -> int:
    """Return how many patches a side make one image token. Raises `SourceError`."""
    ratio = config.number("downsample_ratio")
    factor = int(1 / ratio)
    if factor < 1 or ratio != 1 / factor:
        raise SourceError(f"config.json: downsample_ratio must be one over a whole number, not {ratio}")
    return factor


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    config = checkpoint.section("", _DEFAULTS, harmless=_HARMLESS)
    text, seen = text_section(config), config.section("vision_config", _VISION_DEFAULTS, harmless=_VISION_HARMLESS)
    if (layer := config.get("vision_feature_layer")) != -1:
        raise UnsupportedError(f"the native route builds no vision_feature_layer {layer!r}")
    if (strategy := config.get("vision_feature_select_strategy")) != "default":
        raise UnsupportedError(f"the native route builds no vision_feature_select_strategy {strategy!r}")
    config.get("image_token_id")
    names = _Names(tensors)
    decoder = read_decoder(text, names.decoder, names.head, tied=is_tied(config, text, tensors, names.head))
    vision, factor = _vision(seen, names.vision), _factor(config)
    act = read_activation(config, "projector_hidden_act")
    folded, hidden = vision.hidden_size * factor**2, decoder.hidden_size
    tile = facts["preprocessing"]["tile"]
    norm = Norm(f"{names.projector}.layer_norm", folded, _PROJECTOR_EPS, bias=True)
    linear_1 = Linear(f"{names.projector}.linear_1", hidden, folded, bias=True)
    linear_2 = Linear(f"{names.projector}.linear_2", hidden, hidden, bias=True)

    def connect(values: Values, constants: Constants) -> None:
        x = pixel_shuffle(values["hidden_states"], vision.side, vision.hidden_size, factor)
        x = activation(linear(layer_norm(x, constants, norm), constants, linear_1), act)
        values["last_hidden_state"] = linear(x, constants, linear_2)

    def graph(vision: InternViT) -> Graph:
        inputs = {"pixel_values": ("f32", (-1, vision.num_channels, tile, tile))}
        stages = [*vision_stages(vision), Stage(connect, (norm, linear_1, linear_2))]
        return Graph(inputs, stages, "last_hidden_state", "last_hidden_state")

    def merged(ratio: float) -> Graph:
        counts = merged_tokens(ratio, vision.side**2, vision.num_hidden_layers)
        return graph(replace(vision, merged_tokens=counts))

    unused = (vision.mask_token,) if seen.flag("use_mask_token") else ()
    return Architecture(decoder, graph(vision), unused, (config, text, seen), merged_vision=merged)


class _Names:
    """What weights are called: as published and as transformers saves them, or as its classes hold them."""

    def __init__(self, tensors: Container[str]) -> None:
        held = "model.language_model.embed_tokens.weight" in tensors
        self.decoder = "model.language_model" if held else "language_model.model"
        self.head = "lm_head" if "lm_head.weight" in tensors or held else "language_model.lm_head"
        self.vision, self.projector = (
            f"model.{name}" if held else name for name in ("vision_tower", "multi_modal_projector")
        )


def _vision(section: ConfigReader, prefix: str) -> InternViT:
    norm = section.get("norm_type")
    if norm not in ("layer_norm", "rms_norm"):
        raise UnsupportedError(f"the native route does not build the norm {norm!r} of {section.name_of('norm_type')}")
    return InternViT(
        prefix=prefix,
        image_size=read_side(section, "image_size"),
        patch_size=read_side(section, "patch_size"),
        **read_vision_sizes(section),
        attention_bias=section.flag("attention_bias"),
        use_qk_norm=section.flag("use_qk_norm"),
        rms=norm == "rms_norm",
        last_norm=not section.flag("use_mean_pooling"),
        positions=section.flag("use_absolute_position_embeddings"),
    )


EXPORTER = FamilyExporter(family_config, architecture)
