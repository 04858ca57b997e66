"""Idefics3 and SmolVLM: the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.checkpoint import Checkpoint
from edgevlm_export.families.base import Architecture, Section, read_decoder
from edgevlm_export.graphs import decoder as decoders
from edgevlm_export.graphs import siglip
from edgevlm_export.graphs.blocks import Block, Flow, Graph
from edgevlm_export.graphs.connectors import pixel_shuffle
from edgevlm_export.graphs.layers import Constants, linear

# What transformers' Idefics3ImageProcessor and Idefics3VisionConfig assume where the checkpoint is silent.
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "resample": 1,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}
_VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_PROJECTION = "model.connector.modality_projection.proj"
_ALWAYS_DONE = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")


def family_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts that `edgevlm.families.idefics3` reads. Raises `SourceError` where they do not fit together."""
    stated = checkpoint.read("preprocessor_config.json")
    preprocessor = _PREPROCESSOR_DEFAULTS | {name: value for name, value in stated.items() if value is not None}
    for name in _ALWAYS_DONE:
        if not preprocessor[name]:
            raise SourceError(f"preprocessor_config.json sets {name} to false, which edgevlm does not support")
    vision = Section(checkpoint.config, "vision_config", _VISION_DEFAULTS)
    patch_size = vision.size("patch_size")
    try:
        longest_edge, tile = preprocessor["size"]["longest_edge"], preprocessor["max_image_size"]["longest_edge"]
    except (KeyError, TypeError):
        raise SourceError("preprocessor_config.json states no longest_edge for size and max_image_size") from None
    names = checkpoint.read("tokenizer_config.json")
    return {
        "image_token": names.get("image_token") or "<image>",
        "image_token_id": _image_token_id(checkpoint),
        "fake_image_token": names.get("fake_image_token") or "<fake_token_around_image>",
        "global_image_token": names.get("global_image_token") or "<global-img>",
        "image_seq_len": _image_seq_len(checkpoint, tile, patch_size),
        "patch_size": patch_size,
        "position_grid": vision.size("image_size") // patch_size,
        "preprocessing": {
            "longest_edge": longest_edge,
            "tile": tile,
            "do_image_splitting": preprocessor["do_image_splitting"],
            "resample": preprocessor["resample"],
            "rescale_factor": preprocessor["rescale_factor"],
            "image_mean": preprocessor["image_mean"],
            "image_std": preprocessor["image_std"],
        },
    }


def _image_token_id(checkpoint: Checkpoint) -> int:
    image_token_id = checkpoint.config.get("image_token_id")
    if image_token_id is None:
        raise SourceError("config.json states no image_token_id")
    return int(image_token_id)


def _image_seq_len(checkpoint: Checkpoint, tile: int, patch_size: int) -> int:
    """Return the image tokens of one tile: its patches, `scale_factor` x `scale_factor` of them in each token."""
    scale_factor = int(checkpoint.config.get("scale_factor", 2))
    computed = (tile // patch_size) ** 2 // scale_factor**2
    stated = checkpoint.read("processor_config.json").get("image_seq_len", computed)
    if stated != computed:
        raise SourceError(
            f"the checkpoint contradicts itself: processor_config.json says {stated} image tokens a tile, "
            f"the sizes in config.json and preprocessor_config.json make {computed}"
        )
    return computed


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> Architecture:
    """Return the model's graphs. Raises `SourceError`."""
    decoder = read_decoder(checkpoint.config, "model.text_model", "lm_head")
    vision = _vision(checkpoint)
    factor = Section(checkpoint.config, "", {"scale_factor": 2}).size("scale_factor")
    folded = vision.hidden_size * factor**2
    shapes = dict(siglip.shapes(vision)) | dict(decoders.shapes(decoder))
    shapes[f"{_PROJECTION}.weight"] = (decoder.hidden_size, folded)
    side = facts["preprocessing"]["tile"] // vision.patch_size

    def connect(flow: Flow, constants: Constants) -> None:
        image = pixel_shuffle(flow["hidden_states"], side, vision.hidden_size, factor)
        flow["last_hidden_state"] = linear(image, constants, _PROJECTION)

    def vision_graph(constants: Constants) -> Graph:
        inputs = {
            "pixel_values": ("f32", (-1, vision.num_channels, -1, -1)),
            "patch_attention_mask": ("boolean", (-1, -1, -1)),
            "patch_position_ids": ("i64", (-1, -1)),
        }
        connector = Block(lambda flow: connect(flow, constants), folded * decoder.hidden_size)
        return Graph(inputs, [*siglip.blocks(vision, constants), connector], "last_hidden_state", "last_hidden_state")

    return Architecture(decoder, shapes, ("lm_head.weight",), vision_graph)


def _vision(checkpoint: Checkpoint) -> siglip.VisionTransformer:
    section = Section(checkpoint.config, "vision_config", _VISION_DEFAULTS)
    hidden = section.size("hidden_size")
    return siglip.VisionTransformer(
        prefix="model.vision_model",
        hidden_size=hidden,
        intermediate_size=section.size("intermediate_size"),
        num_hidden_layers=section.size("num_hidden_layers"),
        num_attention_heads=section.heads("num_attention_heads", hidden),
        num_channels=section.size("num_channels"),
        image_size=section.size("image_size"),
        patch_size=section.size("patch_size"),
        layer_norm_eps=section.number("layer_norm_eps"),
        hidden_act=section.activation("hidden_act"),
    )
