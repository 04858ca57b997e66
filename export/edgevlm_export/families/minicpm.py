"""MiniCPM-V 4.6: the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm_export.families.base import Architecture, FamilyExporter, is_tied, read_vision_sizes
from edgevlm_export.families.preprocessing import check_always_done, read_arithmetic, read_image_token_id
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.modules import Linear, Norm
from edgevlm_export.graphs.packed_vit import Merger, PlainMLP
from edgevlm_export.graphs.stages import Graph
from edgevlm_export.graphs.vision_transformer import EncoderLayer, VisionTransformer
from edgevlm_export.graphs.window_merging import WINDOW, MergingTransformer, merging_stages
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

# What transformers' config classes and image processor assume where the checkpoint is silent: models/minicpmv4_6/ of
# transformers 5.24.
_DEFAULTS: dict[str, Any] = {
    "insert_layer_id": 6,
    "downsample_mode": "16x",
    "merge_kernel_size": [2, 2],
    "merger_times": 1,
    "drop_vision_last_layer": False,
    "tie_word_embeddings": False,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "window_kernel_size": [2, 2],
}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "slice_mode": True,
    "downsample_mode": "16x",
    "use_image_id": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}
_HARMLESS = ("image_size", "video_token_id", "patch_size", "image_token_id")
"""Of videos, what the vision encoder states itself, and what the runtime has as a fact."""
_TEXT_HARMLESS = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
_VISION_HARMLESS = ("insert_layer_id",)
"""That of config.json itself goes before it."""
_PREPROCESSOR_HARMLESS = ("data_format", "default_to_square", "do_pad", "image_processor_type")
_TAGS = [f"{name}_{end}_token" for name in ("image", "slice", "image_id") for end in ("start", "end")]
_MERGER_EPS = 1e-6
"""Of the norm before the last MLP, which no config changes."""


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.minicpm` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    vision, patch = checkpoint.section("vision_config", _VISION_DEFAULTS), preprocessor.size("patch_size")
    if vision.size("patch_size") != patch:
        raise SourceError(
            f"the checkpoint contradicts itself: patch_size of {preprocessor.file} is {patch}, vision_config.patch_size"
            f" is {vision.size('patch_size')}"
        )
    if preprocessor.get("downsample_mode") != "16x":
        raise SourceError(f"{preprocessor.file}: edgevlm builds no downsample_mode but 16x")
    facts = {
        **_tokens(checkpoint),
        "use_image_id": preprocessor.flag("use_image_id", True),
        "patch_size": patch,
        "table_side": vision.size("image_size") // patch,
        "preprocessing": {
            "scale_resolution": preprocessor.size("scale_resolution"),
            "max_slice_nums": preprocessor.size("max_slice_nums") if preprocessor.flag("slice_mode", True) else 1,
            **read_arithmetic(preprocessor),
        },
    }
    return facts, preprocessor


def _tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the tokens of an image block are called, and the image token's id. Raises `SourceError`."""
    named = checkpoint.named_tokens
    if missing := [name for name in ("image_token", *_TAGS) if name not in named]:
        raise SourceError(f"{checkpoint.folder}: the tokenizer's files name no {missing[0]}")
    tokens = {name: named[name] for name in ("image_token", *_TAGS)}
    return {**tokens, "image_token_id": read_image_token_id(checkpoint)}


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:  # noqa: ARG001
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    config = checkpoint.section("", _DEFAULTS, harmless=_HARMLESS)
    text = text_section(config, _TEXT_HARMLESS, "qwen3_5_text")
    seen = config.section("vision_config", _VISION_DEFAULTS, harmless=_VISION_HARMLESS)
    _refuse_others(config, seen)
    decoder = read_decoder(text, "model.language_model", "lm_head", tied=is_tied(config, text, tensors))
    vision = _read_vision(config, seen, decoder.hidden_size)
    graph = Graph(vision.inputs, merging_stages(vision), "image_embeds", "image_embeds")
    fixed = decoder.has_fixed_states
    traits = DecoderTraits(3, recurrent=decoder.recurrent, rewindable=not fixed, fixed_states=fixed)
    return Architecture(decoder, graph, ("mtp.*",), (config, text, seen), traits)


def _refuse_others(config: ConfigReader, seen: ConfigReader) -> None:
    """Raise `UnsupportedError` for mergers of another kind."""
    for section, key, built in (
        (config, "downsample_mode", "16x"),
        (config, "merge_kernel_size", [2, 2]),
        (config, "merger_times", 1),
        (config, "drop_vision_last_layer", False),
        (seen, "window_kernel_size", [2, 2]),
    ):
        if (found := section.get(key)) != built:
            raise UnsupportedError(f"the native route builds no {section.name_of(key)} {found!r}")


def _read_vision(config: ConfigReader, seen: ConfigReader, hidden_size: int) -> MergingTransformer:
    """Return the vision submodel, whose output has `hidden_size` channels. Raises `SourceError`."""
    prefix = "model.vision_tower"
    sizes = read_vision_sizes(seen)
    vision = VisionTransformer(prefix, image_size=seen.size("image_size"), patch_size=seen.size("patch_size"), **sizes)
    after, at, width = config.get("insert_layer_id"), f"{prefix}.vit_merger", vision.hidden_size
    if isinstance(after, bool) or not isinstance(after, int) or not 0 <= after < vision.num_hidden_layers:
        raise SourceError(
            f"config.json: insert_layer_id must be one of {vision.num_hidden_layers} layers, not {after!r}"
        )
    q, k, v, out = (Linear(f"{at}.self_attn.{name}_proj", width, width, True) for name in ("q", "k", "v", "out"))
    joined, inner = WINDOW * width, WINDOW * vision.intermediate_size
    pre_norm = Norm(f"{at}.pre_norm", joined, vision.layer_norm_eps, bias=True)
    first, second = Linear(f"{at}.linear_1", inner, joined, True), Linear(f"{at}.linear_2", width, inner, True)
    windows = EncoderLayer(at, vision.norm(f"{at}.layer_norm1"), q, k, v, out, pre_norm, first, second)
    end = "model.merger.mlp.0"
    mlp = PlainMLP(
        Linear(f"{end}.linear_1", joined, joined, True), Linear(f"{end}.linear_2", hidden_size, joined, True), "gelu"
    )
    merger = Merger(Norm(f"{end}.pre_norm", joined, _MERGER_EPS, bias=True), mlp, joins_first=True)
    return MergingTransformer(vision, windows, after, merger)


EXPORTER = FamilyExporter(family_config, architecture, covers_onnx=False)
