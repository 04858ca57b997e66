"""Idefics3 and SmolVLM: the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.families.base import Architecture, FamilyExporter, is_tied, read_vision_sizes
from edgevlm_export.families.preprocessing import check_always_done, read_arithmetic, read_image_token_id
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.connectors import pixel_shuffle
from edgevlm_export.graphs.constants import Constants
from edgevlm_export.graphs.layers import linear
from edgevlm_export.graphs.modules import Linear
from edgevlm_export.graphs.stages import Graph, Stage, Values
from edgevlm_export.graphs.token_merging import merged_tokens
from edgevlm_export.graphs.vision_transformer import VisionTransformer, vision_stages
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader

# What transformers' Idefics3ImageProcessor, Idefics3Config and Idefics3VisionConfig (and SmolVLM's, which are alike)
# assume where the checkpoint is silent: models/idefics3/ of transformers 5.24.
_DEFAULTS = {"scale_factor": 2}
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
_PREPROCESSOR_HARMLESS = ("do_pad", "image_processor_type", "image_seq_len", "return_row_col_info", "video_sampling")
"""`do_pad` adds black tiles to pictures of fewer ones in a batch, which are not looked at; here each stands alone."""
_VISION_HARMLESS = ("max_image_size", "size", "tie_word_embeddings", "use_base_siglip")
"""Sizes that the image processor's file states anew, and how training began."""
_TOKEN_NAMES = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
}
_PROJECTION = "model.connector.modality_projection.proj"


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.idefics3` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    vision = checkpoint.section("vision_config", _VISION_DEFAULTS)
    patch_size = vision.size("patch_size")
    longest_edge, tile = (preprocessor.section(name).size("longest_edge") for name in ("size", "max_image_size"))
    facts = {
        **_token_names(checkpoint),
        "image_token_id": read_image_token_id(checkpoint),
        "image_seq_len": _image_seq_len(checkpoint, tile, patch_size),
        "patch_size": patch_size,
        "position_grid": vision.size("image_size") // patch_size,
        "preprocessing": {
            "longest_edge": longest_edge,
            "tile": tile,
            "do_image_splitting": preprocessor.flag("do_image_splitting"),
            **read_arithmetic(preprocessor),
        },
        **_video(checkpoint, tile),
    }
    return facts, preprocessor


def _video(checkpoint: Checkpoint, tile: int) -> dict[str, Any]:
    """Return the facts about videos as `video`, none where the checkpoint does not say how they are sampled.

    SmolVLM2's files have `video_sampling`, but for its `video_size`, which `size` beside it goes before, as in the
    reference; transformers 5 saves what it read from there.
    """
    if checkpoint.model_type != "smolvlm":
        return {}
    video = checkpoint.video_processor(_PREPROCESSOR_DEFAULTS, ())
    sampling, frames, size = video, "num_frames", video.section("size")
    if "video_sampling" in video:
        sampling, frames = video.section("video_sampling"), "max_frames"
        size = size if "size" in video else sampling.section("video_size")
    if "fps" not in sampling or frames not in sampling:
        return {}
    check_always_done(video)
    if (stated := video.section("max_image_size").size("longest_edge")) != tile:
        raise SourceError(f"the checkpoint contradicts itself: frames of videos are {stated} pixels, tiles {tile}")
    facts = {
        "token": checkpoint.named_tokens.get("video_token", "<video>"),
        "fps": sampling.number("fps"),
        "max_frames": sampling.size(frames),
        "longest_edge": size.size("longest_edge"),
        **read_arithmetic(video),
    }
    return {"video": facts}


def _token_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what the image tokens are called: Idefics3's processor knows them, SmolVLM's asks the tokenizer."""
    given = checkpoint.named_tokens if checkpoint.model_type == "smolvlm" else {}
    return {name: given.get(name, usual) for name, usual in _TOKEN_NAMES.items()}


def _image_seq_len(checkpoint: Checkpoint, tile: int, patch_size: int) -> int:
    """Return the image tokens of one tile: its patches, `scale_factor` x `scale_factor` of them in each token."""
    scale_factor = checkpoint.section("", _DEFAULTS).size("scale_factor")
    computed = (tile // patch_size) ** 2 // scale_factor**2
    stated = checkpoint.read("processor_config.json").get("image_seq_len", computed)
    if stated != computed:
        raise SourceError(
            f"the checkpoint contradicts itself: processor_config.json says {stated} image tokens a tile, "
            f"the sizes in config.json and in the image processor's file make {computed}"
        )
    return computed


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:
    """Return the model's graphs. Raises `SourceError`."""
    config = checkpoint.section("", _DEFAULTS, harmless=("vocab_size",))
    text, seen = text_section(config), config.section("vision_config", _VISION_DEFAULTS, harmless=_VISION_HARMLESS)
    decoder = read_decoder(text, "model.text_model", "lm_head", tied=is_tied(config, text, tensors))
    vision = _vision(seen)
    factor = config.size("scale_factor")
    if text.get("pixel_shuffle_factor", factor) != factor:
        raise SourceError("config.json contradicts itself: scale_factor and text_config.pixel_shuffle_factor differ")
    config.get("image_token_id")
    folded = vision.hidden_size * factor**2
    projection = Linear(_PROJECTION, decoder.hidden_size, folded)
    tile = facts["preprocessing"]["tile"]
    side = tile // vision.patch_size

    def connect(values: Values, constants: Constants) -> None:
        image = pixel_shuffle(values["hidden_states"], side, vision.hidden_size, factor)
        values["last_hidden_state"] = linear(image, constants, projection)

    def graph(vision: VisionTransformer) -> Graph:
        edge, row, patches = (tile, side, side**2) if vision.merged_tokens else (-1, -1, -1)
        inputs = {
            "pixel_values": ("f32", (-1, vision.num_channels, edge, edge)),
            "patch_attention_mask": ("boolean", (-1, row, row)),
            "patch_position_ids": ("i64", (-1, patches)),
        }
        stages = [*vision_stages(vision), Stage(connect, (projection,))]
        return Graph(inputs, stages, "last_hidden_state", "last_hidden_state")

    def merged(ratio: float) -> Graph:
        counts = merged_tokens(ratio, side**2, vision.num_hidden_layers)
        return graph(replace(vision, merged_tokens=counts))

    sections = (config, text, seen)
    return Architecture(decoder, graph(vision), ("lm_head.weight",), sections, merged_vision=merged)


def _vision(section: ConfigReader) -> VisionTransformer:
    return VisionTransformer(
        prefix="model.vision_model",
        image_size=section.size("image_size"),
        patch_size=section.size("patch_size"),
        **read_vision_sizes(section),
    )


def encode_in_torch(model: Any, pixel_values: Any, constants: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return transformers' image_embeds, its patches standing where the runtime's do.

    transformers 4.55.1 to 4.57 stands them one place too low in float32 (docs/reference.md).
    """
    import torch

    places = torch.from_numpy(constants["patch_position_ids"])
    table = model.model.vision_model.embeddings.position_embedding
    hook = table.register_forward_pre_hook(lambda _, inputs: (places.expand_as(inputs[0]),))
    image_embeds = model.model.get_image_features(pixel_values[None])
    hook.remove()
    return image_embeds, {"image_hidden_states": image_embeds}


EXPORTER = FamilyExporter(family_config, architecture, encode_in_torch)
